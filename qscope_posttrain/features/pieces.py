"""Tokens as the text that a reader sees: pieces that joined are the decoded window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"


def text_pieces(tokenizer: Any, ids: Sequence[int], values: Sequence[float]) -> tuple[list[str], list[float]]:
    """(pieces, largest value of each). Tokens that are parts of one character, as in byte-level BPE, are one piece.

    Joined, the pieces are `tokenizer.decode(ids)`.
    """
    pieces: list[str] = []
    found: list[float] = []
    text, open_value = "", 0.0
    for position, value in enumerate(values):
        decoded = tokenizer.decode(list(ids[: position + 1]), clean_up_tokenization_spaces=False)
        open_value = max(open_value, value)
        last = position == len(values) - 1
        if (decoded.endswith(_INCOMPLETE) or not decoded.startswith(text)) and not last:
            continue
        pieces.append(decoded[len(text) :] if decoded.startswith(text) else decoded)
        found.append(open_value)
        text, open_value = decoded, 0.0
    return pieces, found


def marked(pieces: Sequence[str], values: Sequence[float], above: float = 0.0) -> str:
    """The text with runs of pieces whose value exceeds `above` between << and >>."""
    parts: list[str] = []
    inside = False
    for piece, value in zip(pieces, values, strict=True):
        if (value > above) != inside:
            parts.append("<<" if not inside else ">>")
            inside = not inside
        parts.append(piece)
    return "".join(parts) + (">>" if inside else "")
