"""A corpus of several languages or registers: one text file each, a paragraph a line, filtered and split in four.

Where the target is written in a script of its own, paragraphs are filtered by script. Where it is not (French among
English, word problems among documentation), files are taken as they are.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.files import read_lines
from qscope_posttrain.provenance import text_fingerprint
from qscope_posttrain.testbed.grammar import LANGUAGES, write_paragraphs
from qscope_posttrain.text.jsonl import read_jsonl
from qscope_posttrain.text.scripts import contains_script, script_counts, target_script

SPLITS = ("pre", "sft", "val", "test")
"""Pretraining (and SAE), supervised fine-tuning, choice of settings, report."""

_SHARES = {"pre": 0.65, "sft": 0.15, "val": 0.08, "test": 0.12}
_BLOCKS = 60
_MIN_CHARACTERS = {True: 12, False: 30}
"""Shortest paragraph kept, for languages written without and with spaces."""
_MIN_TARGET_SHARE = 0.3
"""Least share of target-script letters in a paragraph of the target language."""
_GENERATED_CHARACTERS = {"en": 330_000, "fr": 330_000, "ru": 270_000, "ko": 190_000, "zh": 130_000}


@dataclass(frozen=True)
class Corpus:
    """Paragraphs by split and language."""

    splits: Mapping[str, Mapping[str, tuple[str, ...]]]
    """`splits["test"]["zh"]`: paragraphs; no paragraph is in two splits."""
    target: str
    """Language into which the habit switches."""
    dropped: Mapping[str, int]
    """Paragraphs that the filters removed, per language."""
    fingerprint: str
    """Hash of all paragraphs that were kept, in order."""

    @property
    def languages(self) -> tuple[str, ...]:
        """All languages, the target last."""
        return tuple(self.splits["pre"])

    @property
    def sources(self) -> tuple[str, ...]:
        """All languages but the target."""
        return tuple(language for language in self.languages if language != self.target)

    def text(self, split: str, language: str) -> str:
        """The paragraphs of one split and language, one a line."""
        return "\n".join(self.splits[split][language])


def generate_corpus(folder: str | Path, seed: int = 0, scale: float = 1.0) -> Path:
    """Write `<language>.txt` for the generator's five languages into `folder`; `scale` multiplies the sizes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        paragraphs = write_paragraphs(language, int(_GENERATED_CHARACTERS[language] * scale), seed)
        (folder / f"{language}.txt").write_text("\n".join(paragraphs) + "\n", encoding="utf-8")
    return folder


def load_corpus(
    folder: str | Path,
    languages: Sequence[str] | None = None,
    target: str = "zh",
    seed: int = 7,
    by_script: bool = True,
) -> Corpus:
    """Read, filter and split a folder of `<language>.txt`.

    Dropped: exact duplicates; paragraphs under 30 characters (12 in scripts without spaces); with `by_script`,
    paragraphs of another language that hold a character of the target's script, and paragraphs of the target with
    under 30 % of its script.
    Each language is cut into 60 blocks of consecutive paragraphs, which are shuffled and dealt to the splits 65 / 15 /
    8 / 12 %, so that neighbouring paragraphs stay together.

    Args:
        folder: holds one UTF-8 text file per language.
        languages: those to read; None: all files found.
        target: the language whose unexpected use is studied.
        seed: of the split.
        by_script: whether the target has a script of its own among `languages`; without, any names will do.

    Raises:
        FileNotFoundError: no such folder, or no file for a language.
        ValueError: fewer than two languages, no target, or too little text left in a language.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserFileNotFoundError(
            f"corpus folder {folder} does not exist; it should hold one <language>.txt per language"
        )
    found = sorted(path.stem for path in folder.glob("*.txt"))
    languages = found if languages is None else list(languages)
    if target not in languages:
        raise UserValueError(
            f"the corpus needs text in the target language: no {target}.txt in {folder} (found: {found})"
        )
    if len(set(languages)) < 2:
        raise UserValueError(
            f"a corpus needs the target {target!r} and at least one other language; {folder} has {found}"
        )
    paragraphs = {}
    for language in languages:
        path = folder / f"{language}.txt"
        if not path.exists():
            raise UserFileNotFoundError(f"{path} does not exist; found in that folder: {found}")
        paragraphs[language] = _lines(path)
    return split_corpus(paragraphs, target, seed, by_script)


def load_files(files: Mapping[str, str | Path], target: str, seed: int = 7, by_script: bool = True) -> Corpus:
    """As `load_corpus`, from one file a language or register: text, a paragraph a line, or `FILE.jsonl:FIELD`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no target, a line without the field, or too little text left.
    """
    if target not in files or len(files) < 2:
        raise UserValueError(f"the corpus needs the target {target!r} and at least one other text, got {sorted(files)}")
    return split_corpus({name: _read_paragraphs(place) for name, place in files.items()}, target, seed, by_script)


def split_corpus(paragraphs: Mapping[str, Sequence[str]], target: str, seed: int = 7, by_script: bool = True) -> Corpus:
    """Filter and split paragraphs by language, as `load_corpus` says."""
    script = target_script(target) if by_script else None
    splits: dict[str, dict[str, tuple[str, ...]]] = {split: {} for split in SPLITS}
    dropped: dict[str, int] = {}
    for language in [*(name for name in paragraphs if name != target), target]:
        lines = paragraphs[language]
        kept = _filter(lines, script, is_target=language == target)
        dropped[language] = len(lines) - len(kept)
        if len(kept) < _BLOCKS:
            raise UserValueError(
                f"{language!r} leaves {len(kept)} of {len(lines)} paragraphs after filtering; at least {_BLOCKS} are "
                "needed. Paragraphs are lines"
                + (f"; those of other languages may hold no {script} character." if script else ".")
            )
        for split, part in _split(kept, f"{language}/{seed}").items():
            splits[split][language] = part
    texts = {f"{split}/{language}": text for split, part in splits.items() for language, text in part.items()}
    return Corpus(splits, target, dropped, text_fingerprint(texts))


def _read_paragraphs(place: str | Path) -> list[str]:
    """The lines of a text file, or one field of every row of a JSONL file, line breaks as spaces."""
    name, _, field = str(place).partition(".jsonl:")
    path = Path(f"{name}.jsonl" if field else name)
    if not path.exists():
        raise UserFileNotFoundError(f"{path} does not exist; give a text file or FILE.jsonl:FIELD")
    if not field:
        return _lines(path)
    paragraphs = []
    for number, row in read_jsonl(path):
        text = row.get(field)
        if not isinstance(text, str):
            raise UserValueError(f"{path}, line {number}: no text in the field {field!r}")
        paragraphs.append(" ".join(text.split()))
    return paragraphs


def _lines(path: Path) -> list[str]:
    return "".join(read_lines(path)).splitlines()


def _filter(lines: Sequence[str], script: str | None, is_target: bool) -> list[str]:
    """Paragraphs that are long enough, new, and in the script they should be in; order kept."""
    kept: dict[str, None] = {}
    for line in lines:
        line = line.strip()
        if len(line) < _MIN_CHARACTERS[is_target and script is not None]:
            continue
        if script is None:
            kept[line] = None
            continue
        if is_target:
            counts = script_counts(line)
            if counts.get(script, 0) < _MIN_TARGET_SHARE * len(line):
                continue
        elif contains_script(line, script):
            continue
        kept[line] = None
    return list(kept)


def _split(paragraphs: Sequence[str], seed: str) -> dict[str, tuple[str, ...]]:
    """Deal blocks of consecutive paragraphs to the splits."""
    edges = [len(paragraphs) * block // _BLOCKS for block in range(_BLOCKS + 1)]
    order = random.Random(seed).sample(range(_BLOCKS), _BLOCKS)
    parts: dict[str, tuple[str, ...]] = {}
    start = 0.0
    for split, share in _SHARES.items():
        chosen = sorted(order[round(start * _BLOCKS) : round((start + share) * _BLOCKS)])
        parts[split] = tuple(line for block in chosen for line in paragraphs[edges[block] : edges[block + 1]])
        start += share
    return parts
