"""A corpus of several languages or registers: one text file each, a paragraph per line, filtered and split in four.

Where the target is written in a script of its own, paragraphs are filtered by script. Where it is not (French among
English, word problems among documentation), files are taken as they are. Without files of the user's, `grammar` writes
the text.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.testbed.switching.grammar import LANGUAGES, write_paragraphs
from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.files import read_jsonl, read_lines
from qscope_posttrain.provenance import text_fingerprint
from qscope_posttrain.text.scripts import contains_script, script_counts, target_script

SPLITS = ("pre", "sft", "val", "test")
"""For pretraining (and SAEs), supervised fine-tuning, choice of settings, report."""
_SHARES = (0.65, 0.15, 0.08, 0.12)
_BLOCKS = 60
_MIN_TARGET_SHARE = 0.3
"""Least share of target-script letters in a paragraph of the target language."""
_GENERATED_CHARACTERS = {"en": 330_000, "fr": 330_000, "ru": 270_000, "ko": 190_000, "zh": 130_000}


@dataclass(frozen=True)
class Corpus:
    """Paragraphs by split and language."""

    splits: Mapping[str, Mapping[str, tuple[str, ...]]]
    """`splits["test"]["zh"]`: paragraphs; no paragraph is in two splits. The target is the last language."""
    target: str
    """Language into which the habit switches."""
    dropped: Mapping[str, int]
    """Number of paragraphs that the filters removed, per language."""
    fingerprint: str
    """Hash of all paragraphs that were kept, in order."""

    @property
    def languages(self) -> tuple[str, ...]:
        """All languages, the target last."""
        return tuple(self.splits["pre"])

    def text(self, split: str, language: str) -> str:
        """Return the paragraphs of one split and language, one per line."""
        return "\n".join(self.splits[split][language])


def generate_corpus(folder: Path, seed: int = 0, scale: float = 1.0) -> None:
    """Write `<language>.txt` for the generator's five languages into `folder`; `scale` multiplies the sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        paragraphs = write_paragraphs(language, int(_GENERATED_CHARACTERS[language] * scale), seed)
        (folder / f"{language}.txt").write_text("\n".join(paragraphs) + "\n", encoding="utf-8")


def load_corpus(
    folder: str | Path,
    languages: Sequence[str] | None = None,
    target: str = "zh",
    seed: int = 7,
    by_script: bool = True,
) -> Corpus:
    """Read, filter and split a folder of `<language>.txt`; see `split_corpus`.

    Args:
        languages: those to read; None: all files found.
        target: the language whose unexpected use is studied.
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
    missing = [name for name in languages or () if name not in found]
    if missing:
        raise UserFileNotFoundError(f"{folder / missing[0]}.txt does not exist; found in that folder: {found}")
    return load_files({name: folder / f"{name}.txt" for name in languages or found}, target, seed, by_script)


def load_files(files: Mapping[str, str | Path], target: str, seed: int = 7, by_script: bool = True) -> Corpus:
    """Read one file per language or register: text, a paragraph per line, or `FILE.jsonl:FIELD`; see `split_corpus`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no target, a line without the field, or too little text left.
    """
    if target not in files or len(files) < 2:
        raise UserValueError(
            f"the corpus needs text in the target language {target!r} and at least one other language; got "
            f"{', '.join(sorted(files)) or 'none'}"
        )
    return split_corpus({name: _read_paragraphs(place) for name, place in files.items()}, target, seed, by_script)


def split_corpus(paragraphs: Mapping[str, Sequence[str]], target: str, seed: int = 7, by_script: bool = True) -> Corpus:
    """Filter paragraphs by language and deal them to the splits.

    Dropped: exact duplicates; paragraphs under 30 characters (12 in the target, where it has a script of its own); with
    `by_script`, paragraphs of another language that hold a character of the target's script, and paragraphs of the
    target with under 30 % of its script. Each language is cut into 60 blocks of consecutive paragraphs, which are
    shuffled and dealt to the splits 65 / 15 / 8 / 12 %, so that neighboring paragraphs stay together.
    """
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
    """Read the lines of a text file, or one field of every row of a JSONL file with line breaks as spaces."""
    name, _, field = str(place).partition(".jsonl:")
    path = Path(f"{name}.jsonl" if field else name)
    if not path.exists():
        raise UserFileNotFoundError(f"{path} does not exist; give a text file or FILE.jsonl:FIELD")
    if not field:
        return "".join(read_lines(path)).splitlines()
    paragraphs = []
    for number, row in read_jsonl(path):
        text = row.get(field)
        if not isinstance(text, str):
            raise UserValueError(f"{path}, line {number}: no text in the field {field!r}")
        paragraphs.append(" ".join(text.split()))
    return paragraphs


def _filter(lines: Sequence[str], script: str | None, is_target: bool) -> list[str]:
    """Keep paragraphs that are long enough, new, and in the script they should be in; their order stays."""

    def fits(line: str) -> bool:
        if len(line) < (12 if is_target and script is not None else 30):
            return False
        if script is None:
            return True
        if is_target:
            return script_counts(line).get(script, 0) >= _MIN_TARGET_SHARE * len(line)
        return not contains_script(line, script)

    return list(dict.fromkeys(line for line in map(str.strip, lines) if fits(line)))


def _split(paragraphs: Sequence[str], seed: str) -> dict[str, tuple[str, ...]]:
    """Deal blocks of consecutive paragraphs to the splits."""
    edges = [len(paragraphs) * block // _BLOCKS for block in range(_BLOCKS + 1)]
    order = random.Random(seed).sample(range(_BLOCKS), _BLOCKS)
    parts: dict[str, tuple[str, ...]] = {}
    start = 0.0
    for split, share in zip(SPLITS, _SHARES, strict=True):
        chosen = sorted(order[round(start * _BLOCKS) : round((start + share) * _BLOCKS)])
        parts[split] = tuple(line for block in chosen for line in paragraphs[edges[block] : edges[block + 1]])
        start += share
    return parts
