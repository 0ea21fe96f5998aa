"""Find the entries of a vocabulary that write a script, also where a tokenizer cuts characters into bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import regex
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.text.scripts import JAPANESE, contains_script, script_pattern

# Unicode blocks are mostly named after their script; these are not.
_MAIN_BLOCK = {
    "Han": "CJK_Unified_Ideographs",
    "Hangul": "Hangul_Syllables",
    "Greek": "Greek_and_Coptic",
    "Latin": "Basic_Latin",
    JAPANESE: "Hiragana",
}
_BYTE_TOKEN = regex.compile(r"<0x([0-9A-Fa-f]{2})>")


def script_token_ids(tokenizer: PreTrainedTokenizerBase, script: str) -> Tensor:
    """Find the ids of the vocabulary entries that write `script`, e.g. "Han", ascending.

    An entry belongs to the script if it contains a whole letter of it, or if it ends within one: its last bytes are
    the beginning of the UTF-8 encoding of a letter of the script, with a lead byte that occurs in the script's main
    Unicode block. The lead bytes are E4..E9 for Han, D0..D3 for Cyrillic, EA..ED for Hangul. The main block keeps out
    the byte E3, which begins rare ideographs but nearly always means kana or CJK punctuation. Where scripts share a
    lead byte (E0: Thai and all scripts of India), that byte alone belongs to each of them. Only kana need two bytes
    (E3 81 to E3 83): E3 alone begins CJK punctuation as well. Bytes that only continue a character (80..BF) are the
    same for all scripts and never decide.

    Args:
        tokenizer: byte-level BPE (Qwen, Llama 3, GPT-2), or one whose entries are text, with or without single-byte
            entries `<0xE4>` (SentencePiece models such as Gemma, WordPiece).
        script: a Unicode script name.

    Returns:
        int64 `[entries]` on the CPU; empty if the vocabulary cannot write the script. Special tokens are never in it.
    """
    _beginnings(script)  # also where no entry asks for them: an unknown script is an error
    found = [
        index
        for index, entry in _entries(tokenizer)
        if (contains_script(entry, script) if isinstance(entry, str) else _bytes_write(entry, script))
    ]
    return torch.tensor(sorted(found), dtype=torch.int64)


def _entries(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, str | bytes]]:
    """Id and content of every entry that is not special: bytes where the tokenizer works on bytes, else text."""
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    # In the GPT-2 alphabet of bytes these three are one Han character.
    byte_level = decoder is not None and decoder.decode(["ä½ł"]) == "你"
    for piece, index in tokenizer.get_vocab().items():
        if index in special:
            continue
        if index in added:
            yield index, added[index].content
        elif byte_level:
            yield index, bytes(map(_byte_alphabet().__getitem__, piece))
        elif match := _BYTE_TOKEN.fullmatch(piece):
            yield index, bytes.fromhex(match[1])
        else:
            yield index, piece


@cache
def _byte_alphabet() -> dict[str, int]:
    """The byte behind each of the 256 characters in which GPT-2 writes bytes: printable Latin-1 characters stand for
    themselves; the other bytes, in order, are the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _bytes_write(piece: bytes, script: str) -> bool:
    """Whether UTF-8 bytes contain a whole letter of `script` or end with the beginning of one."""
    return contains_script(piece.decode("utf-8", errors="ignore"), script) or (
        _unfinished_character(piece) in _beginnings(script)
    )


def _unfinished_character(piece: bytes) -> bytes:
    """The lead byte and what follows it, if `piece` ends before the character does; else empty."""
    for length in range(1, min(3, len(piece)) + 1):
        lead = piece[-length]
        if lead >= 0xC0:
            whole = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return piece[-length:] if length < whole else b""
        if lead < 0x80:
            break
    return b""


@cache
def _beginnings(script: str) -> frozenset[bytes]:
    """Proper beginnings of the encodings of letters of `script` whose lead byte occurs in its main block."""
    every_character = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    letters = [letter.encode() for letter in script_pattern(script).findall(every_character)]
    try:
        block = regex.compile(rf"\p{{Block={_MAIN_BLOCK.get(script, script)}}}")
    except regex.error as error:
        raise UserValueError(f"No main Unicode block is known for the script {script!r}.") from error
    leads = {letter[0] for letter in letters if block.match(letter.decode())}
    shortest = 2 if script == JAPANESE else 1
    return frozenset(letter[:end] for letter in letters if letter[0] in leads for end in range(shortest, len(letter)))
