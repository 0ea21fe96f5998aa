"""Repetition in a sequence of token ids, words or characters: n-grams, the repeated tail, compression.

The n-gram rate finds any repeated phrase, but also grows with the length of ordinary text. The repeated tail is exact,
and finds only a loop that lasts to the end. The compression ratio also finds loops with small variations.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qscope_posttrain.errors import UserValueError


@dataclass(frozen=True)
class RepeatedTail:
    """The periodic end of a sequence x of n elements: x[i] = x[i - period] for all i from start + period to n - 1."""

    start: int  # First position from which the rest of the sequence has the period
    period: int  # Elements of one copy
    copies: int  # Whole copies, (n - start) // period; a last one that was cut off does not count

    @property
    def second_copy(self) -> int:
        """Position of the first element that repeats another one of the tail."""
        return self.start + self.period


def repeated_tail(tokens: Sequence[Any], *, min_copies: int = 3, min_tokens: int = 12) -> RepeatedTail | None:
    """Find the repeated block with which a sequence ends, if any.

    For every period p let L(p) be the length of the longest suffix that repeats itself after p elements. The result is
    the smallest p with L(p) // p >= min_copies and L(p) >= min_tokens. The last copy may be cut off at any element. A
    block that itself ends in enough copies of a smaller one (`| --- | --- | --- |` in a table that repeats) is reported
    by the smaller one.

    L(p) = p + z(p), where z(p) is the length of the common prefix of the reversed sequence and of the same without its
    first p elements. All z are found in at most 2 n comparisons (the Z algorithm; Gusfield 1997, section 1.4).

    Args:
        tokens: token ids, words, or a string (whose elements are its characters); also a 1-D array or tensor.
        min_copies: whole copies, at least 2.
        min_tokens: elements of all copies together, so that "!!!" is no loop.
    """
    if min_copies < 2 or min_tokens < 1:
        raise UserValueError(
            f"Expected min_copies >= 2 and min_tokens >= 1; got min_copies={min_copies}, min_tokens={min_tokens}."
        )
    elements = _elements(tokens)
    length = len(elements)
    for period, match in _self_matches(elements[::-1], length // min_copies):
        covered = period + match
        if covered >= min_tokens and covered >= min_copies * period:
            return RepeatedTail(start=length - covered, period=period, copies=covered // period)
    return None


def is_endless_repetition(tokens: Sequence[Any], *, ended: bool, min_copies: int = 4, min_tokens: int = 12) -> bool:
    """Whether a response (its tokens up to the end token) was in a loop when it was cut off: it has not `ended` by
    itself, and has a `repeated_tail`."""
    return not ended and repeated_tail(tokens, min_copies=min_copies, min_tokens=min_tokens) is not None


def ngram_repetition_rate(tokens: Sequence[Any], n: int = 3) -> float:
    """Share of n-grams that occurred before: 1 - (different n-grams) / (n-grams); 0 with fewer than n tokens. On token
    ids, -1 times it is TRL's repetition penalty reward (`get_repetition_penalty_reward(n, -1.0)`). On the words of a
    text, `text.split()`, it is the measure of "Demystifying Long Chain-of-Thought Reasoning", Appendix C.2."""
    if n < 1:
        raise UserValueError(f"n must be at least 1; got {n}.")
    elements = _elements(tokens)
    total = len(elements) - n + 1
    if total < 1:
        return 0.0
    different = {tuple(elements[start : start + n]) for start in range(total)}
    return 1 - len(different) / total


def compression_ratio(text: str) -> float:
    """Bytes of the text in UTF-8 over bytes after zlib (level 9): about 2 for prose, above 10 for most loops, below 1
    for a few words, 1 for none. Blocks more than 32 KiB apart are not seen as equal. The third digit depends on the
    build of zlib."""
    raw = text.encode("utf-8", errors="surrogatepass")
    return len(raw) / len(zlib.compress(raw, 9)) if raw else 1.0


def _elements(tokens: Sequence[Any]) -> Sequence[Any]:
    """Tensors and arrays as lists: comparing their elements one by one takes a hundred times as long."""
    return tokens.tolist() if hasattr(tokens, "tolist") else tokens


def _self_matches(sequence: Sequence[Any], last: int) -> Iterator[tuple[int, int]]:
    """(shift, z) for the shifts 1..last: `sequence[shift:]` begins with the same z elements as `sequence`, no more."""
    # `left` and `right` bound the match that reaches furthest: inside it the answer is known already.
    length = len(sequence)
    known = [0] * (last + 1)
    left = right = 0
    for shift in range(1, last + 1):
        match = min(known[shift - left], right - shift) if shift < right else 0
        if shift + match >= right:
            while shift + match < length and sequence[match] == sequence[shift + match]:
                match += 1
            left, right = shift, shift + match
        known[shift] = match
        yield shift, match
