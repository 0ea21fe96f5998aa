"""Recipes, tables, prompts, feature sets with anything in them: what comes out is the content, or a mistake of the
user's that names the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qscope_posttrain.analysis.benchmarks.items import ItemSource, read_items
from qscope_posttrain.analysis.benchmarks.performance import read_scores
from qscope_posttrain.errors import UserError
from qscope_posttrain.features.feature_set import FeatureSet, read_explanations
from qscope_posttrain.features.feature_set_file import FORMAT
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.recipe_file import read_yaml
from qscope_posttrain.synthesis.coverage import read_relevance
from qscope_posttrain.text.inputs import read_prompts, read_text_list, read_texts

fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

INTEGERS = st.integers(-2, 3) | st.integers(-(1 << 70), 1 << 70) | st.sampled_from([10**400, 1 << 63])
WORDS = st.sampled_from(["text", "prompt", "language", "zh", "layer", "feature_id", "model", "relevance", "", "\ufeff"])
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | WORDS, inner, max_size=4),
    max_leaves=12,
)
ROWS = st.lists(JSON, max_size=4).map(lambda rows: "\n".join(json.dumps(row) for row in rows))
YAML = st.text(st.sampled_from("ab1-:?&*!<>|[]{},#\"'%@`\n \t0.e_xo~"), max_size=60)
CELLS = st.text(st.sampled_from('a1,"\n\r\t.-e; '), max_size=40)
BYTES = st.binary(max_size=60)
MARKS = st.sampled_from(
    [b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0", b"\x1f\x8b", b"PK\x03\x04", b"BZh9"]
)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])

READERS: dict[str, Callable[[Path], Any]] = {
    "recipe.yaml": read_yaml,
    "prompts.jsonl": read_prompts,
    "texts.jsonl": read_texts,
    "list.jsonl": read_text_list,
    "list.txt": read_text_list,
    "explanations.jsonl": read_explanations,
    "items.jsonl": lambda path: read_items(ItemSource("b", str(path), "text")),
    "items.csv": lambda path: read_items(ItemSource("b", str(path), "a")),
    "items.tsv": lambda path: read_items(ItemSource("b", str(path), "0")),
    "scores.csv": read_scores,
    "relevance.csv": read_relevance,
}


def survives(path: Path, read: Callable[[Path], Any]) -> None:
    said = str(path)
    try:
        read(path)
    except UserError as error:
        said = str(error)
    assert str(path) in said or "benchmark 'b'" in said


@pytest.mark.promise("Any bytes given as an SAE, a FeatureSet, a recipe, JSONL or a table are read or refused by name")
@pytest.mark.parametrize("name", READERS)
@fuzz
@given(mark=MARKS, content=BYTES)
@example(mark=b"", content=b"\xed\xa0\xbd\xed")
@example(mark=b"\xff\xfe", content=b"\0\xd8")
@example(mark=b"", content=b"a: " + b"9" * 5000)
def test_any_bytes(tmp_path: Path, name: str, mark: bytes, content: bytes) -> None:
    (tmp_path / name).write_bytes(mark + content)
    survives(tmp_path / name, READERS[name])


@pytest.mark.promise("Any bytes given as an SAE, a FeatureSet, a recipe, JSONL or a table are read or refused by name")
@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@fuzz
@given(text=ROWS | YAML | CELLS, encoding=ENCODINGS)
@example(text="a: 2001-99-99", encoding="utf-8")
@example(text="a: !!timestamp b", encoding="utf-8")
@example(text="a: !!int ''", encoding="utf-8")
@example(text="a: &a [*a]", encoding="utf-8")
@example(text="[" * 3000, encoding="utf-8")
@example(text="a: &b {c: 1}\nd: {<<: [*b, *b], <<: 1}", encoding="utf-8")
@example(text='{"text": "\\ud83d"}', encoding="utf-8")
def test_any_text(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(text.encode(encoding, "replace"))
    survives(tmp_path / name, READERS[name])


@pytest.mark.promise("A YAML file constructs no objects, and cannot swell or hide a key")
def test_aliases_of_aliases_do_not_explode(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"recipe\.yaml is no recipe: its aliases stand for more than"):
        read_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("a: 1\nb:\n  c: 1\n  c: 2\n")
    with pytest.raises(UserError, match=r"recipe\.yaml, line 4: the key 'c' is given twice"):
        read_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("base: &base {a: 1}\nb: {<<: *base, c: 2}\n")
    assert read_yaml(tmp_path / "recipe.yaml") == {"base": {"a": 1}, "b": {"a": 1, "c": 2}}


def feature_set() -> FeatureSet:
    shapes = LayerFeatures.expected_shapes(2, 2, 4)
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    tensors |= {name: tensors[name].long() for name in ("feature_ids", "tokens")}
    rows = LayerFeatures(**tensors, labels=("zh", "en"), names=("a", "b"), residual_median_norm=8.0)
    model = {"model_type": "qwen3", "hidden_size": 4, "num_hidden_layers": 3}
    return FeatureSet(model=model, languages=("zh", "en"), layers={1: rows})


DOCUMENT_KEYS = st.sampled_from(
    ["version", "model", "languages", "settings", "provenance", "layers", "explanations", "model_type", "hidden_size"]
) | st.sampled_from(["num_hidden_layers", "embedding", "selector", "1", "labels", "names", "residual_median_norm"])


def change(value: Any, changes: dict[str, Any]) -> Any:
    """A JSON document with the values of some keys replaced, wherever they occur."""
    if not isinstance(value, dict):
        return value
    return {key: changes[key] if key in changes else change(inner, changes) for key, inner in value.items()}


@pytest.mark.promise("Any bytes given as an SAE, a FeatureSet, a recipe, JSONL or a table are read or refused by name")
@fuzz
@given(changes=st.dictionaries(DOCUMENT_KEYS, JSON, max_size=2), more=st.dictionaries(DOCUMENT_KEYS, JSON, max_size=1))
@example(changes={"residual_median_norm": 10**400}, more={})
@example(changes={"layers": {"9" * 5000: {}}}, more={})
@example(changes={}, more={"explanations": [{"layer": 1, "feature_id": 1, "text": "a", "model": "b", "detection": 1}]})
def test_documents_of_feature_sets(tmp_path: Path, changes: dict[str, Any], more: dict[str, Any]) -> None:
    path = feature_set().save(tmp_path / "features.safetensors")
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    document = json.loads(header["__metadata__"][FORMAT])
    header["__metadata__"][FORMAT] = json.dumps(change(document, changes) | more)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    survives(path, lambda file: str(FeatureSet.load(file)))


@pytest.mark.promise("Any bytes given as an SAE, a FeatureSet, a recipe, JSONL or a table are read or refused by name")
@fuzz
@given(at=st.integers(0, 1 << 14), byte=st.integers(0, 255))
def test_feature_sets_with_a_byte_changed(tmp_path: Path, at: int, byte: int) -> None:
    path = feature_set().save(tmp_path / "features.safetensors")
    content = bytearray(path.read_bytes())
    content[at % len(content)] = byte
    path.write_bytes(content)
    survives(path, lambda file: str(FeatureSet.load(file)))
