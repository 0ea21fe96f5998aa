"""Every reader of a user's text, on everything that other programs make of the same text."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datasets import disable_progress_bars

import qscope_posttrain
from benchmarks.testbed.switching.corpus import load_files
from qscope_posttrain.analysis.benchmarks.items import ItemSource, read_items
from qscope_posttrain.analysis.benchmarks.performance import read_scores
from qscope_posttrain.endpoint.chat import PromptTemplates
from qscope_posttrain.errors import UserError
from qscope_posttrain.evaluation.safety import read_safety_prompts
from qscope_posttrain.features.feature_set import read_explanations
from qscope_posttrain.files import check_is_file, read_json, read_jsonl, read_lines, read_text
from qscope_posttrain.recipe_file import read_yaml
from qscope_posttrain.sae.checks import read_settings
from qscope_posttrain.sae.training.text_stream import file_source
from qscope_posttrain.synthesis.coverage import read_relevance
from qscope_posttrain.text.inputs import read_file, read_prompts, read_text_list, read_texts

disable_progress_bars()


class Reader(NamedTuple):
    read: Callable[[Path], Any]
    file: str
    content: str
    packed: bool = False
    """Whether it reads compressed files"""
    wide: bool = True
    """Whether it reads UTF-16 and UTF-32"""
    joined: bool = True
    """Whether byte order marks may stand inside"""
    empty: bool = False
    """Whether an empty file is right"""


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def items(field: str) -> Callable[[Path], Any]:
    return lambda path: vars(read_items(ItemSource("b", str(path), field))) | {"source": None}


def template(path: Path) -> Any:
    return PromptTemplates(path.parent, path.parent).messages(path.stem, who="Zoé")


def scores(path: Path) -> Any:
    table = read_scores(path)
    return table.models, table.benchmarks, table.scores.tolist()


TEXT = "Le café.\n小船离开了。\n"
TEXT_ROWS = jsonl({"text": "Le café.", "language": "fr"}, {"text": "a\u2028b 小船\x85", "language": "zh"})
EXPLANATION = {"layer": 1, "feature_id": 2, "text": "café", "model": "小"}
READERS = {
    "lines": Reader(lambda path: list(read_lines(path)), "a", TEXT, packed=True, empty=True),
    "text": Reader(read_text, "a.jinja", TEXT, empty=True),
    "jsonl": Reader(lambda path: list(read_jsonl(path)), "a.jsonl", TEXT_ROWS, packed=True, empty=True),
    "json": Reader(read_json, "a.json", '{"a": "café",\n"b": [1]}\n', packed=True),
    "texts": Reader(read_texts, "a.jsonl", TEXT_ROWS, packed=True),
    "text list": Reader(read_text_list, "a.txt", TEXT, packed=True),
    "text list of rows": Reader(read_text_list, "a.jsonl", TEXT_ROWS, packed=True),
    "prompts": Reader(read_prompts, "a.jsonl", jsonl({"prompt": "café", "language": "fr"})),
    "safety prompts": Reader(read_safety_prompts, "a.jsonl", jsonl({"prompt": "café", "harmful": True}), packed=True),
    "recipe": Reader(read_yaml, "a.yaml", "a: café\nb: [1, 小]\n"),
    "settings": Reader(lambda path: read_settings(path).values, "cfg.json", '{"a": "café",\n"b": 1}\n'),
    "items of jsonl": Reader(items("text"), "a.jsonl", TEXT_ROWS, packed=True),
    "items of csv": Reader(items("q"), "a.csv", 'q,a\n"café, ""x""",1\n小船,2\n', packed=True),
    "items of tsv": Reader(items("0"), "a.tsv", 'café "x\t1\n小船\t2\n', packed=True),
    "scores": Reader(scores, "a.csv", "model,café\na,1\nb,2\n小,3.5\n", packed=True),
    "relevance": Reader(read_relevance, "a.csv", "layer,feature,relevance,é\n1,2,0.5,小\n", packed=True),
    "explanations": Reader(read_explanations, "a.jsonl", jsonl(EXPLANATION), packed=True),
    "documents": Reader(lambda path: list(file_source(path).documents()), "a.txt", TEXT, packed=True, empty=True),
    "rows of documents": Reader(
        lambda path: list(file_source(path).documents()), "a.jsonl", TEXT_ROWS, packed=True, empty=True
    ),
    "template": Reader(template, "ask.jinja", "{% block user %}\nHé {{ who }}\n小\n{% endblock %}\n"),
    "corpus": Reader(
        lambda path: load_files({"fr": path, "zh": path}, "zh", by_script=False).splits,
        "a.txt",
        "".join(
            f"Une phrase numéro {number}, assez longue pour compter comme un paragraphe.\n" for number in range(60)
        ),
        packed=True,
        empty=True,
    ),
    "data of jsonl": Reader(
        lambda path: list(read_file(path)["train"]), "a.jsonl", TEXT_ROWS, packed=True, wide=False, joined=False
    ),
    "data of json": Reader(
        lambda path: list(read_file(path)["train"]),
        "a.json",
        '[{"text": "café"},\n{"text": "小"}]\n',
        packed=True,
        wide=False,
        joined=False,
    ),
    "data of csv": Reader(
        lambda path: list(read_file(path)["train"]),
        "a.csv",
        "text,b\ncafé,1\n小,2\n",
        packed=True,
        wide=False,
        joined=False,
    ),
}

SAME: dict[str, Callable[[str], bytes]] = {
    "byte order mark": lambda text: text.encode("utf-8-sig"),
    "carriage returns and line feeds": lambda text: text.replace("\n", "\r\n").encode(),
    "carriage returns": lambda text: text.replace("\n", "\r").encode(),
    "both": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    "no last line end": lambda text: text.rstrip("\n").encode(),
}
WIDE = {
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16-be": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
    "utf-16 and carriage returns": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
}
PACKED = {
    "gzip": lambda text: gzip.compress(text.encode()),
    "two gzip members": lambda text: gzip.compress(text[:9].encode()) + gzip.compress(text[9:].encode("utf-8")),
    "bzip2": lambda text: bz2.compress(text.encode()),
    "xz": lambda text: lzma.compress(text.encode()),
    "gzip with a mark": lambda text: gzip.compress(text.encode("utf-8-sig")),
}
REFUSED = {
    "latin-1": (lambda text: text.encode("latin-1", "ignore"), r"line \d+: not UTF-8"),
    "utf-16 without a mark": (lambda text: text.encode("utf-16-le"), r"line \d+: (a zero byte|not UTF-8)"),
    "raw half of a surrogate pair": (
        lambda text: text.replace("é", "\ud83d").encode("utf-8", "surrogatepass"), r"line \d+: half of a surrogate"
    ),
    "half of a surrogate pair in utf-16": (
        lambda text: text.replace("é", "\ud83d").encode("utf-16", "surrogatepass"),
        r"line \d+: half of a surrogate|UTF-16",
    ),
    "zero bytes": (lambda text: text.replace("é", "\0").encode(), r"line \d+: a zero byte"),
    "utf-16 that was cut off": (lambda text: text.encode("utf-16")[:-1], "UTF-16"),
    "gzip that was cut off": (lambda text: gzip.compress(text.encode())[:-9], "is compressed"),
    "zstd": (lambda text: b"(\xb5/\xfd" + text.encode(), "compressed with zstd"),
    "zip": (lambda text: b"PK\x03\x04" + text.encode(), "a zip archive"),
    "parquet": (lambda text: b"PAR1\x15" + text.encode(), "a Parquet file"),
    "noise": (lambda text: bytes(range(256)) * 4, r"line \d+|UTF-16"),
}  # fmt: skip


def put(folder: Path, reader: Reader, content: bytes) -> Path:
    path = folder / reader.file
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", READERS)
def test_every_spelling_of_a_text_is_read_alike(name, tmp_path):
    reader = READERS[name]
    clean = reader.content.removesuffix("\n") if name in ("lines", "text") else reader.content
    expected = reader.read(put(tmp_path, reader, clean.encode()))
    ways = SAME | (WIDE if reader.wide else {}) | (PACKED if reader.packed else {})
    for way, write in ways.items():
        assert reader.read(put(tmp_path, reader, write(clean))) == expected, way
    if reader.joined:
        marked = "\ufeff\ufeff" + clean.replace("\n", "\n\ufeff") if reader.file[-1] in "lt" else "\ufeff\ufeff" + clean
        assert reader.read(put(tmp_path, reader, marked.encode())) == expected


@pytest.mark.parametrize("name", READERS)
def test_what_cannot_be_read_is_named(name, tmp_path):
    reader = READERS[name]
    refused = dict(REFUSED)
    if not reader.wide:
        refused |= {way: (write, "UTF-(16|32).*iconv|second byte order mark") for way, write in WIDE.items()}
    if not reader.packed:
        refused |= {way: (write, "is compressed.*unpack it") for way, write in PACKED.items()}
    if not reader.joined:
        refused["marks inside"] = (lambda text: ("\ufeff" + text).encode("utf-8-sig"), "second byte order mark")
    if not reader.empty:
        refused |= {"empty": (lambda text: b"", ""), "blank lines": (lambda text: b"\n \n", "")}
    for way, (write, says) in refused.items():
        path = put(tmp_path, reader, write(reader.content))
        with pytest.raises(UserError, match=says) as error:
            reader.read(path)
        assert path.name in str(error.value) or "benchmark 'b'" in str(error.value), way


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_named(name, tmp_path):
    reader = READERS[name]
    path = tmp_path / "in" / reader.file
    path.parent.mkdir()
    (tmp_path / "in" / "other.jinja").touch()
    os.mkfifo(path)
    kinds = {"pipe": "pipe or a device"}
    if name not in ("documents", "rows of documents", "texts", "prompts"):  # these read folders
        kinds["folder"] = "is a folder|has no rows|does not exist"
    if name != "template":  # a folder without one of its templates is fine
        kinds["link"] = "is a link to .*does not exist|does not exist|no text"
    for kind, says in kinds.items():
        path.unlink()
        {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "link": lambda: path.symlink_to("gone")}[kind]()
        with pytest.raises(UserError, match=says):
            reader.read(path)
        if kind == "folder":
            path.rmdir()
            path.touch()


def test_half_of_a_surrogate_pair_behind_an_escape(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "language": "en"}\n{"prompt": "b \\ud83d\\ude00", "language": "en"}\n')
    assert read_prompts(path) == {"en": ["a", "b \U0001f600"]}
    path.write_text('{"prompt": "a", "language": "en"}\n{"prompt": "b \\uD83D", "language": "en"}\n')
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 2: half of a surrogate pair \(U\+D83D\): the text is damaged"
    ):
        read_prompts(path)
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read: .*line 2: half of a surrogate pair"):
        read_file(path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("a")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ValueError, match=r"a\.txt' cannot be read \(Permission denied\)"):
        read_text(path)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "a.txt/b"])
def test_names_that_no_file_can_have(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(FileNotFoundError, match="no file at"):
        check_is_file(path)


def test_a_folder_of_texts_may_hold_what_other_systems_leave_there(tmp_path):
    (tmp_path / "en.txt").write_bytes("﻿a\r\nb".encode())
    (tmp_path / "fr.txt.gz").write_bytes(gzip.compress("é\n".encode()))
    (tmp_path / "._en.txt").write_bytes(b"\0\x05\x16\x07")
    assert read_texts(tmp_path) == {"en": ["a", "b"], "fr": ["é"]}
    (tmp_path / "en.txt.gz").write_bytes(gzip.compress(b"c"))
    with pytest.raises(ValueError, match="has a language twice"):
        read_texts(tmp_path)


OPENING = re.compile(
    r"(?<![\w.])open\(|\.(open|read_text|read_bytes)\(|\b(csv\.reader|csv\.DictReader|json\.load|yaml\.(safe_)?load)\("
    r"|\b(load_dataset|load_from_disk)\("
)
OWN_FILES = {
    "cli/main.py": "the null device, in place of a reader that is gone",
    "provenance.py": "bytes of a checked file, for their hash",
    "files.py": "the reader",
    "text/inputs.py": "the reader of data sets",
    "kernels/native/__init__.py": "the package's own source",
    "sae/archives.py": "binary files",
    "sae/weights_file.py": "the kind of a binary file by its first bytes, and the mappings of the process",
    "sae/download.py": "appending to a download",
    "sae/catalog.py": "the package's own data",
    "sae/training/records.py": "a log and checkpoints that only the package writes, in folders of its own",
    "record_file.py": "records in bytes, locked, written and checked line by line by itself",
}
"""Modules that may open files themselves, and why."""


def test_no_other_module_opens_files():
    root = Path(qscope_posttrain.__file__).parent
    sources = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    found = {name for name, source in sources.items() if OPENING.search(source)}
    bypassing = {name for name in found if not name.startswith(tuple(OWN_FILES))}
    assert not bypassing, "read with qscope_posttrain.files, or say in OWN_FILES why not"
    assert {"files.py", "text/inputs.py"} <= found
