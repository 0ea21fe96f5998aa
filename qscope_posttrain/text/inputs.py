"""Read texts by language, lists of texts and prompts, as commands are given them: folders, text files or JSONL."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.files import bare_name, check_is_file, read_jsonl, read_lines, text_suffix


def read_texts(path: str | Path, limit: int | None = None) -> dict[str, list[str]]:
    """Texts by language, the first `limit` of each, from a folder of `<language>.txt` (one text per line) or a JSONL
    file of text and language. ValueError for a file or a line of another form, or a language without text."""
    location = Path(path)
    if location.is_dir():
        files = sorted(file for file in location.iterdir() if text_suffix(file) == ".txt" and file.name[0] != ".")
        if not files:
            raise UserFileNotFoundError(f"no <language>.txt in '{location}', for example en.txt, with one text a line.")
        texts = {bare_name(file): _lines(file, limit) for file in files}
        if len(texts) < len(files):
            raise UserValueError(f"'{location}' has a language twice: {', '.join(file.name for file in files)}.")
    elif not location.exists() and not location.is_symlink():
        raise UserFileNotFoundError(f"no texts at '{location}': expected a folder of <language>.txt, or a JSONL file.")
    else:
        texts = {}
        for number, row in read_jsonl(location):
            text, language = row.get("text"), row.get("language")
            if not isinstance(text, str) or not _is_name(language):
                raise UserValueError(
                    f"{location}, line {number}: expected strings 'text' and 'language', "
                    f"{_got(row, 'text', 'language')}."
                )
            kept = texts.setdefault(str(language), [])
            if text.strip() and (limit is None or len(kept) < limit):
                kept.append(text)
    empty = sorted(language for language, entries in texts.items() if not entries)
    if empty or not texts:
        raise UserValueError(f"'{location}' has no text in {', '.join(empty) or 'any language'}.")
    return texts


def read_text_list(path: str | Path, limit: int | None = None, jsonl: bool = False) -> list[str]:
    """Texts of one set: a text file with one per line, or JSONL with `text`, as which any file is read with `jsonl`.
    ValueError for a line of another form, or no text at all."""
    location = check_is_file(path)
    if text_suffix(location) != ".jsonl" and not jsonl:
        texts = _lines(location, limit)
    else:
        texts = []
        for number, row in read_jsonl(location):
            if not isinstance(row.get("text"), str):
                raise UserValueError(f"{location}, line {number}: expected a string 'text', {_got(row, 'text')}.")
            if row["text"].strip() and (limit is None or len(texts) < limit):
                texts.append(row["text"])
    if not texts:
        raise UserValueError(f"'{location}' has no texts.")
    return texts


def read_prompts(path: str | Path, limit: int | None = None, language: str | None = None) -> dict[str, list[Any]]:
    """Prompts by source language, the first `limit` of each, from JSONL with `prompt` (text or chat messages) and
    `language`, or as `read_texts`. `tools` and `chat_template_kwargs` beside a prompt stay with it, for the chat
    template. A row without a language is in `language`, and without that a ValueError, as a line of another form is."""
    location = Path(path)
    if location.is_dir():
        return {language: list(lines) for language, lines in read_texts(location, limit).items()}
    prompts: dict[str, list[Any]] = {}
    for number, row in read_jsonl(location, packed=False):
        prompt, own = row.get("prompt"), row.get("language", language)
        if not isinstance(prompt, str | list) or not _is_name(own):
            raise UserValueError(
                f"{location}, line {number}: expected 'prompt' (text or a list of messages) and 'language', "
                f"{_got(row, 'prompt', 'language')}."
            )
        kept = prompts.setdefault(str(own), [])
        if limit is None or len(kept) < limit:
            columns = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}
            kept.append({"prompt": prompt, **columns} if columns else prompt)
    if not prompts:
        raise UserValueError(f"'{location}' has no prompts.")
    return prompts


def _lines(file: Path, limit: int | None) -> list[str]:
    return list(islice((line.strip() for line in read_lines(file) if line.strip()), limit))


def _is_name(language: Any) -> bool:
    return isinstance(language, str) and bool(language.strip())


def _got(row: dict[str, Any], *wanted: str) -> str:
    """The values of the wanted keys, or the keys that are there."""
    if all(key in row for key in wanted):
        return "got " + " and ".join(f"{key!r}: {row[key]!r:.60}" for key in wanted)
    return f"got the keys {sorted(row)}"
