"""Negatives without an SAE: a row repeats a piece of its own text, and then goes on by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SHORTEST_PIECE = 4  # Tokens. A shorter piece runs on to the next boundary, so that no lone mark is repeated.
_CAPACITY = 256  # Tokens for which room is made at first


def boundary_tokens(tokenizer: PreTrainedTokenizerBase, boundaries: Sequence[str], vocabulary: int) -> Tensor:
    """[vocabulary] bool: tokens whose text, without spaces around it, ends with one of `boundaries`.

    A line break counts wherever it stands in the token.
    """
    is_boundary = torch.zeros(vocabulary, dtype=torch.bool)
    marks = tuple(mark for mark in boundaries if mark.strip())
    breaks = [mark for mark in boundaries if not mark.strip()]
    known = min(vocabulary, len(tokenizer))
    for token, text in enumerate(tokenizer.batch_decode([[token] for token in range(known)])):
        ends = bool(marks) and text.strip().endswith(marks)
        is_boundary[token] = ends or any(mark in text for mark in breaks)
    return is_boundary


class CopyRule:
    """Forces rows to repeat the piece of text that they have just written, from a given token on.

    A piece lies between two boundaries, or is `piece_length` tokens long where none comes. At the first boundary at
    or after generated token `start` of a row, the piece that ends there is repeated `copies` times. Everything before
    is the row's own, and everything after it too. All state is on the device of the logits.
    """

    def __init__(self, is_boundary: Tensor, start: Tensor, copies: int, piece_length: int) -> None:
        """`is_boundary` is [vocabulary] bool, `start` [rows] the first generated token at which copying may start."""
        self._is_boundary = is_boundary
        self._start = start
        self._copies = copies
        self._piece_length = piece_length
        self._said = 0
        self._tokens = torch.zeros(_CAPACITY, len(start), dtype=torch.long, device=start.device)
        self._piece = torch.zeros_like(start)
        self._begin = torch.full_like(start, -1)
        self._length = torch.ones_like(start)

    def read(self, token: Tensor) -> None:
        """Take note of the last token `[rows]` of each row."""
        if self._said == len(self._tokens):
            self._tokens = torch.cat([self._tokens, torch.zeros_like(self._tokens)])
        self._tokens[self._said] = token
        self._said = step = self._said + 1
        size = step - self._piece
        is_end = (self._is_boundary[token] & (size >= SHORTEST_PIECE)) | (size >= self._piece_length)
        ends = is_end & (self._begin < 0)
        begins = ends & (step >= self._start)
        self._begin = torch.where(begins, step, self._begin)
        self._length = torch.where(begins, size, self._length)
        self._piece = torch.where(ends & ~begins, step, self._piece)

    def __call__(self, step: int, logits: Tensor) -> Tensor:
        """Logits `[rows, vocabulary]` of generated token `step`: of a row that copies, one token alone is possible."""
        if not self._said:
            return logits
        since = step - self._begin
        copying = (self._begin >= 0) & (since < self._copies * self._length)
        source = torch.where(copying, self._piece + since % self._length, 0)
        forced = self._tokens.gather(0, source[None])[0]
        only = torch.full_like(logits, -torch.inf).scatter(1, forced[:, None], 0.0)
        return torch.where(copying[:, None], only, logits)


def copied_piece(own: Sequence[int], is_boundary: Tensor, start: int, piece_length: int) -> tuple[int, int] | None:
    """First token and end of the piece that `CopyRule` repeats in a row that begins with `own`, None without one.

    Args:
        own: the first tokens of the row, its own, without an end token; `start + piece_length` of them suffice.
        is_boundary, start, piece_length: as for `CopyRule`.
    """
    piece = 0
    for said, token in enumerate(own, 1):
        size = said - piece
        if (bool(is_boundary[token]) and size >= SHORTEST_PIECE) or size >= piece_length:
            if said >= start:
                return piece, said
            piece = said
    return None


def seeded_text(
    own: Sequence[int], is_boundary: Tensor, start: int, copies: int, piece_length: int
) -> list[int] | None:
    """The tokens of a row when `CopyRule` lets it go on by itself, for engines that take token ids and no rule.

    Returns:
        Its own text up to the boundary, then the copies; None where it ended before there was one. For the arguments
        see `copied_piece` and `CopyRule`.
    """
    piece = copied_piece(own, is_boundary, start, piece_length)
    return None if piece is None else [*own[: piece[1]], *(list(own[slice(*piece)]) * copies)]
