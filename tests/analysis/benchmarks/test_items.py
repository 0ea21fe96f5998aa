"""Items from every kind of source, templates that can name nothing but columns, and the feature sets of items."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from qscope_posttrain.analysis.benchmarks.feature_sets import (
    ItemFeatures,
    collect_item_features,
    fingerprints,
    token_sets,
)
from qscope_posttrain.analysis.benchmarks.items import BenchmarkItems, ItemSource, fill, plain_text, read_items
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

ROWS = [
    {"question": "How many?", "choices": ["one", "two"], "id": 7},
    {"question": 'Why {so}, "really"?', "choices": ["yes"], "id": 8},
]


def jsonl(path, rows=ROWS):
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_by_field_and_by_template(tmp_path, name):
    place = jsonl(tmp_path / name)
    found = read_items(ItemSource("d", place, field="question"))
    assert found.texts == ("How many?", 'Why {so}, "really"?')
    template = "{question}\n{choices}\n{{A}}"
    assert read_items(ItemSource("d", place, template=template)).texts[0] == "How many?\none\ntwo\n{A}"
    assert read_items(ItemSource("d", place, field="question"), "Q: {text}\nA:").texts[0] == "Q: How many?\nA:"
    assert read_items(ItemSource("d", place, field="question", first=1, limit=5)).texts == found.texts[1:]


def test_tables_with_and_without_header(tmp_path):
    (tmp_path / "a.csv").write_text('question,answer\n"How many, ""really""?",3\nWhy?,4\n')
    found = read_items(ItemSource("d", str(tmp_path / "a.csv"), field="question"))
    assert found.texts == ('How many, "really"?', "Why?")
    (tmp_path / "b.tsv").write_text('"Quoted" start\t3\nWhy?\t4\n')
    assert read_items(ItemSource("d", str(tmp_path / "b.tsv"), field="0")).texts == ('"Quoted" start', "Why?")
    assert read_items(ItemSource("d", str(tmp_path / "b.tsv"), template="{0} = {1}")).texts[1] == "Why? = 4"


def test_data_sets_on_disk(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"test": rows, "train": rows.select([0])}).save_to_disk(tmp_path / "many")
    assert len(read_items(ItemSource("d", str(tmp_path / "one"), field="question")).texts) == 2
    assert len(read_items(ItemSource("d", str(tmp_path / "many"), field="question", split="train")).texts) == 1
    with pytest.raises(ValueError, match="several splits; choose one of test, train"):
        read_items(ItemSource("d", str(tmp_path / "many"), field="question"))


def test_units():
    same = BenchmarkItems("d", ("It\N{RIGHT SINGLE QUOTATION MARK}s 3.", "it's   3"), ("a", "b"))
    assert len(set(same.plain_texts())) == 1
    assert plain_text("!?") == "!?"
    assert fingerprints(["a", "a", "b"])[0] == fingerprints(["a"])[0] != fingerprints(["b"])[0]


def test_units_from_columns_and_row_numbers(tmp_path):
    place = jsonl(tmp_path / "a.jsonl")
    assert read_items(ItemSource("d", place, field="question", unit="id")).units == ("7", "8")
    assert read_items(ItemSource("d", place, field="question", unit="#", unit_prefix="q", first=1)).units == ("q#1",)
    assert read_items(ItemSource("d", place, field="question")).units[0] == "how many"


def test_words():
    assert ItemSource.parse("gsm8k=data/a.jsonl:question") == ItemSource("gsm8k", "data/a.jsonl", field="question")
    found = ItemSource.parse(r"d=C:/data/a.jsonl:{a}:\n{b}")
    assert (found.source, found.template) == ("C:/data/a.jsonl", "{a}:\n{b}")


@pytest.mark.parametrize("word", ["gsm8k", "=a.jsonl:b", "d=a.jsonl", "d=a.jsonl:", "d=:b"])
def test_refusals_of_words(word):
    with pytest.raises(ValueError, match="expected NAME=SOURCE:FIELD"):
        ItemSource.parse(word)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question.__class__}", "no column 'question.__class__'"),
        ("{question[0]}", "no column"),
        ("{question!r}", "takes no format"),
        ("{question:>10}", "takes no format"),
        ("{answer}", "no column 'answer'; there are question"),
    ],
)
def test_templates_name_columns_and_nothing_else(template, message):
    with pytest.raises(ValueError, match=message):
        fill(template, {"question": "x"})


def test_refusals(tmp_path):
    place = jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": " "}])
    with pytest.raises(ValueError, match="'d', row 1: no text"):
        read_items(ItemSource("d", place, field="text"))
    with pytest.raises(ValueError, match="row 0: no column 'question'; there are text"):
        read_items(ItemSource("d", place, field="question"))
    with pytest.raises(FileNotFoundError, match="'d': no file"):
        read_items(ItemSource("d", str(tmp_path / "b.jsonl"), field="text"))
    with pytest.raises(ValueError, match="a prompt must contain"):
        read_items(ItemSource("d", place, field="text"), "Answer:")
    with pytest.raises(ValueError, match="either a field or a template"):
        ItemSource("d", place)
    with pytest.raises(ValueError, match="no items"):
        read_items(ItemSource("d", place, field="text", first=5))
    (tmp_path / "c.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object"):
        read_items(ItemSource("d", str(tmp_path / "c.jsonl"), field="text"))


@pytest.fixture(scope="module")
def sae():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(96, 64, generator=generator)
    return SparseAutoencoder(weights, torch.zeros(96), weights.clone(), torch.zeros(64), TopK(6), 2)


def last_features(model, tokenizer, text, sae, longest=512):
    ids = tokenizer(text)["input_ids"]
    ids = ids if len(ids) <= longest else ids[:1] + ids[-(longest - 1) :]
    seen = []
    handle = model.model.layers[2].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    values, indices = (seen[0][0, -1] @ sae.W_enc.T + sae.b_enc).topk(6)
    return sorted(indices[values > 0].tolist())


def test_feature_sets_are_those_of_the_last_token(make_model, tiny_tokenizer, texts, sae):
    model = make_model()
    benchmarks = [BenchmarkItems(name, tuple(lines), tuple(lines)) for name, lines in texts.items()]
    found = collect_item_features(model, tiny_tokenizer, benchmarks, {2: sae}, items_at_once=3)[2]
    assert [entry.name for entry in found] == list(texts)
    for entry in found:
        assert entry.cut == 0
        for number, text in enumerate(texts[entry.name]):
            assert entry.item(number).tolist() == last_features(model, tiny_tokenizer, text, sae)
        assert entry.counts.sum() == len(entry.indices)


def test_a_long_item_keeps_its_end(make_model, tiny_tokenizer, texts, sae):
    model = make_model()
    long = " ".join(texts["en"])
    items = [BenchmarkItems("d", (texts["en"][0], long), ("0", "1"))]
    found = collect_item_features(model, tiny_tokenizer, items, {2: sae}, max_length=24)[2][0]
    assert found.cut == 1 + (len(tiny_tokenizer(texts["en"][0])["input_ids"]) > 24)
    assert found.item(1).tolist() == last_features(model, tiny_tokenizer, long, sae, 24)


def test_memory_is_the_ids(make_model, tiny_tokenizer, texts, sae):
    items = [BenchmarkItems("d", tuple(texts["en"] * 40), tuple(map(str, range(4 * 40))))]
    found = collect_item_features(make_model(), tiny_tokenizer, items, {2: sae}, items_at_once=16)[2][0]
    held = sum(getattr(found, name).nbytes for name in ("offsets", "indices", "texts", "units"))
    assert held <= len(found) * (4 * 6 + 24) + 8
    assert found.indices.dtype == np.int32


def test_selection_and_sums():
    features = ItemFeatures.from_sets("d", [[0, 1], [], [1, 3]], 4)
    assert (features.features, features.empty, features.counts.tolist()) == (3, 1, [1, 2, 0, 1])
    assert features.sum_over_features([1, 10, 100, 1000]).tolist() == [11, 0, 1010]
    rest = features.select([True, False, True])
    assert [rest.item(n).tolist() for n in range(2)] == [[0, 1], [1, 3]]
    assert rest.also_in(features).all()
    assert features.select([2, 0]).item(0).tolist() == [1, 3]
    assert not features.also_in(ItemFeatures.from_sets("e", [[0]], 4)).any()


def test_token_sets(tiny_tokenizer):
    text = "The river, the river."
    found = token_sets(tiny_tokenizer, [BenchmarkItems("d", (text,), (text,))])[0]
    assert found.item(0).tolist() == sorted(set(tiny_tokenizer(text)["input_ids"]))
    assert found.width == len(tiny_tokenizer)


def test_refusals_of_sets():
    with pytest.raises(ValueError, match="features are 0 to 3"):
        ItemFeatures.from_sets("d", [[4]], 4)


def test_a_compressed_file_that_was_cut_off(tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"q": "%d"}\n' % number for number in range(5000)))[:-20])
    with pytest.raises(ValueError, match="is cut off or damaged"):
        read_items(ItemSource.parse(f"x={path}:q"))
