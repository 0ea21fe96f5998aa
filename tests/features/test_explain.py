"""Auto-interpretation end to end over HTTP: a judge that can read scores high, shuffled words score at chance."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest
import torch
from endpoint_server import serving

from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.models import OpenAIChatModel
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.explain.ask import (
    ExplainSettings,
    Split,
    decisions,
    explain_features,
    from_bands,
    fuzzing_items,
    shuffled_words,
    split_contexts,
)
from qscope_posttrain.features.explain.contexts import Context, ContextSettings, FeatureContexts
from qscope_posttrain.features.explain.explanation import FeatureId, Prediction
from qscope_posttrain.features.feature_set import read_explanations
from qscope_posttrain.report.summary import write_rows
from qscope_posttrain.sae.activations import ReLU
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

TOPICS = {"ladder": 0, "soup": 1, "kite": 2}
FILLER = ["the", "old", "grey", "man", "saw", "a", "near", "his", "door", "today", "and", "then", "went", "home"]


class WordWorld:
    """A tokenizer of whole words, a model that writes each topic word into a dimension of its own, and its SAE."""

    def __init__(self, make_model) -> None:
        self.words = [*TOPICS, *FILLER]
        self.model = make_model(num_hidden_layers=2, vocab_size=512)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
            self.model.model.embed_tokens.weight[:, 10] = 1.0
            for word, dimension in TOPICS.items():
                self.model.model.embed_tokens.weight[self.words.index(word), dimension] = 3.0
        encoder = torch.zeros(8, 64)
        encoder[torch.arange(3), torch.arange(3)] = 1.0
        self.sae = SparseAutoencoder(encoder, torch.zeros(8), encoder.clone(), torch.zeros(64), ReLU(), 1)

    def __call__(self, text, **_):
        if isinstance(text, list):
            return {"input_ids": [self(entry)["input_ids"] for entry in text]}
        return {"input_ids": [self.words.index(word) for word in text.split()]}

    pad_token_id = 0

    def decode(self, ids, **_):
        return "".join(" " + self.words[index] for index in ids)


@pytest.fixture(scope="module")
def world(make_model):
    return WordWorld(make_model)


@pytest.fixture(scope="module")
def lines():
    draw = random.Random(3)
    found = []
    for number in range(240):
        words = draw.choices(FILLER, k=draw.randint(6, 14))
        if number % 2:
            words[draw.randrange(1, len(words))] = list(TOPICS)[number % 3]
        found.append(" ".join(words))
    return found


def reader(body) -> str:
    """A perfect explainer and judge of this world."""
    content = body["messages"][-1]["content"]
    if "Description:" not in content:
        marked = re.findall(r"<<\s*(\w+)>>", content)
        return f'Here you are: {{"explanation": "the word {max(set(marked), key=marked.count)}"}}'
    word = re.search(r"the word (\w+)", content).group(1)
    wanted = f"<< {word}>>" if "<<" in content.split("Passages:")[1] else word
    found = [json.loads(line.split(". ", 1)[1]) for line in content.splitlines() if re.match(r"\d+\. ", line)]
    return json.dumps([int(wanted in passage) for passage in found])


SETTINGS = ExplainSettings(contexts=ContextSettings(window=16, before=8, absent=30), tests=12, others=3, strongest=4)


def explain(world, lines, tmp_path, server, settings=SETTINGS, ids=(0, 1, 2, 5)):
    with CompletionCache(tmp_path / "answers.jsonl") as cache:
        session = ChatSession(OpenAIChatModel("reader", server.url, concurrency=2), cache)
        return explain_features(world.model, world, lines, {1: world.sae}, {1: list(ids)}, session, settings)


def test_a_perfect_reader_scores_one_and_shuffled_words_chance(world, lines, tmp_path):
    with serving(reader) as server:
        found = explain(world, lines, tmp_path, server)
        assert [entry.text for entry in found.explanations] == ["the word ladder", "the word soup", "the word kite"]
        assert found.skipped == {FeatureId(1, 5): "fires on 0 of 240 texts"}
        for entry in found.explanations:
            assert entry.model == "reader"
            assert entry.detection == Prediction(12, 12, 12, 12)
            assert entry.fuzzing == Prediction(6, 6, 6, 6)
            assert found.controls["detection"][entry.feature].hits == 0
            assert found.controls["detection"][entry.feature].rejections < 12  # some hold the other feature's word
            assert found.controls["fuzzing"][entry.feature].balanced_accuracy == 0.5
        assert found.mean("detection").estimate == 1.0
        assert found.gain("fuzzing").estimate == 0.5
        sent = len(server.requests)
        assert sent == 3 + 2 * 3 * (5 + 3)  # 24 and 12 contexts, five a request
        assert explain(world, lines, tmp_path, server).explanations == found.explanations
        assert len(server.requests) == sent
    rows = found.to_table().rows
    assert rows[0][:4] == (1, 0, 40, "the word ladder")
    assert found.unread == {"detection": (0, 30), "fuzzing": (0, 18)}
    assert [row[:2] for row in found.summary_table().rows] == [("detection", 3), ("fuzzing", 3)]


def test_the_explainer_never_sees_what_is_held_out(world, lines, tmp_path):
    with serving(reader) as server:
        explain(world, lines, tmp_path, server, replace(SETTINGS, control=False))
        asked = [body["messages"][-1]["content"] for body in server.requests]
    strip = [re.sub("<<|>>", "", content) for content in asked]
    texts = [set(re.findall(r'^\d+\. "(.*?)"', content, flags=re.M)) for content in strip]
    shown = {content: found for content, found in zip(strip, texts, strict=True) if "Description" not in content}
    assert len(shown) == 3
    for content, found in shown.items():
        word = next(word for word in TOPICS if all(word in text for text in found))
        tested = set().union(*(t for c, t in zip(strip, texts, strict=True) if f"Description: the word {word}" in c))
        own = {text for text in tested if word in text}
        assert own
        assert not own & found, content


def test_a_judge_that_cannot_be_read_leaves_no_score(world, lines, tmp_path):
    def mute(body):
        return reader(body) if "Description" not in body["messages"][-1]["content"] else "[1, 0]?"

    with serving(mute) as server:
        found = explain(world, lines, tmp_path, server)
    assert {entry.detection for entry in found.explanations} == {Prediction(0, 0, 0, 0)}
    assert found.mean("detection") is None
    assert found.gain("detection") is None
    assert found.to_table().rows[0][4] is None
    # Five requests of detection and three of fuzzing for each feature, by its own words and by another's; the last one
    # of fuzzing is about two contexts, for which "[1, 0]" is an answer.
    assert found.unread == {"detection": (30, 30), "fuzzing": (12, 18)}
    assert found.summary_table().rows[0] == ("detection", 0, None, None, None, "30 of 30")


def test_an_explainer_that_cannot_be_read_is_an_error_with_its_words(world, lines, tmp_path):
    with serving(lambda body: "The marked words are animals.") as server:
        with pytest.raises(UserValueError, match=r"none of 3 features readably.*'The marked words are animals\.'"):
            explain(world, lines, tmp_path, server)
        # A greedy model would say the same again: further draws are not greedy.
        assert [body["temperature"] for body in server.requests] == [0.0] * 3 + [0.7] * 6


def test_without_methods_only_explains(world, lines, tmp_path):
    with serving(reader) as server:
        found = explain(world, lines, tmp_path, server, ExplainSettings(methods=()), ids=(1,))
        assert len(server.requests) == 1
    assert found.explanations[0].detection is None
    path = write_rows(tmp_path / "explanations.jsonl", (entry.to_dict() for entry in found.explanations))
    assert read_explanations(path) == found.explanations


def context(text, peak, length=4):
    return Context(text, tuple(range(length)), (peak, *[0.0] * (length - 1)))


def test_bands_by_hand():
    contexts = [context(n, float(n)) for n in range(20)]
    order = [int(entry.peak) for entry in from_bands(contexts)]
    assert order == [18, 16, 14, 12, 10, 8, 6, 4, 2, 0, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1]
    assert from_bands([]) == []
    assert len(from_bands(contexts[:7])) == 7


def test_split_shares_no_text():
    top = tuple(context(n, 100.0 - n) for n in range(5))
    sampled = tuple(context(n, 100.0 - n) for n in range(30))
    absent = tuple(context(n, 0.0) for n in range(20, 60))
    split = split_contexts(FeatureContexts(0, 1, 30, 60, top, sampled, absent), 5, 6, 10)
    seen = {entry.text for entry in (*split.strongest, *split.others)}
    assert len(seen) == 11
    assert not seen & {entry.text for entry in (*split.tests, *split.absent)}
    assert len(split.tests) == len(split.absent) == 10
    scarce = split_contexts(FeatureContexts(0, 1, 8, 60, top, sampled[:8], absent), 5, 6, 10)
    assert (len(scarce.tests), len(scarce.others)) == (3, 0)


def test_fuzzing_marks_as_many_other_tokens(world):
    tests = tuple(Context(n, (0, 3, 1, 4, 5, 6), (0.0, 2.0, 1.0, 0.0, 0.0, 0.0)) for n in range(8))
    items = fuzzing_items(world, Split((), (), tests, ()), "name")
    assert sum(item.positive for item in items) == 4
    for item in items:
        inside = re.findall("<<(.*?)>>", item.text)
        marked = [word for run in inside for word in run.split()]
        assert len(marked) == 2
        assert (marked == ["the", "soup"]) == item.positive
        assert item.positive or not {"the", "soup"} & set(marked)


def test_shuffled_words_are_a_permutation_without_fixed_point():
    words = {FeatureId(0, n): f"words {n}" for n in range(7)}
    for seed in range(20):
        others = shuffled_words(words, seed)
        assert sorted(others.values()) == sorted(words.values())
        assert all(others[feature] != words[feature] for feature in words)
    assert shuffled_words({FeatureId(0, 1): "alone"}, 0) == {}


@pytest.mark.parametrize("text", ["[1, 0]", "[1, 0, 2]", "[1, 0, [1]]", "yes", '{"a": 1}'])
def test_decisions_of_another_form_are_refused(text):
    with pytest.raises(ValueError):
        decisions(3)(text)
    assert decisions(3)("so: [1, 0, true]") == [True, False, True]


@pytest.mark.parametrize(("text", "message"), [("", "no explanations"), ("{}", "line 1"), ("x", "line 1")])
def test_files_of_another_form_are_refused(tmp_path, text, message):
    (tmp_path / "explanations.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_explanations(tmp_path / "explanations.jsonl")
    with pytest.raises(FileNotFoundError):
        read_explanations(tmp_path / "missing.jsonl")
