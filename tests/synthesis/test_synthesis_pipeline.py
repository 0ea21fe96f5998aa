"""The loop without a network: order, rounds, verification, styles, kinds; and the rows that are saved."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pytest
from datasets import load_from_disk
from word_world import TOPIC, WORDS, grammar

from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.chat import ChatCompletion
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.features.explain.explanation import Explanation, FeatureId
from qscope_posttrain.synthesis.pipeline import STYLES, Synthesis, SynthesisSettings, synthesis_templates
from qscope_posttrain.synthesis.report import balanced, example_row, row_type, save_rows, type_counts

TARGETS = [FeatureId(1, number) for number in (7, 3, 5, 0, 9)]
EXPLANATIONS = {
    target: Explanation(1, target.feature_id, f"the word {WORDS[target.feature_id]}", "") for target in TARGETS
}


class Grammar:
    """The server's grammar in this process."""

    batch_size, concurrency, identity, route = 1, 1, {"name": "grammar"}, {}

    def __init__(self, answer=grammar, finish="stop") -> None:
        self.answer, self.finish, self.asked = answer, finish, []

    def complete(self, requests):
        (request,) = requests
        body = {"messages": asdict(request)["messages"], "seed": request.sample}
        self.asked.append(body)
        return [ChatCompletion(self.answer(body), self.finish, 5, 5, f"request {len(self.asked)}")]


def verify(texts, features):
    return [2.0 * (WORDS[feature.feature_id] in text.split()) for text, feature in zip(texts, features, strict=True)]


@pytest.fixture
def open_run(tmp_path):
    caches = []

    def start(model=None, function=None, targets=TARGETS, **settings):
        cache = CompletionCache(tmp_path / f"answers{len(caches)}.jsonl")
        caches.append(cache)
        model = model or Grammar()
        chosen = SynthesisSettings(TOPIC, **settings)
        synthesis = Synthesis(ChatSession(model, cache), synthesis_templates(), chosen)
        return function(synthesis) if function else synthesis.run(targets, EXPLANATIONS, verify), model

    yield start
    for cache in caches:
        cache.close()


@pytest.mark.promise("Synthesis keeps prompts that fire and nothing else")
def test_only_prompts_that_fire_are_kept(open_run):
    run, _ = open_run()
    kept = {id(example.draft) for example in run.examples}
    for draft in run.drafts:
        fires = WORDS[draft.feature.feature_id] in draft.text.split()
        assert (id(draft) in kept) == fires
    assert run.drawn == len(run.drafts)
    assert sum(draft.prompt_type == "vanilla" for draft in run.drafts) == run.vanilla_drawn


def test_rounds_ask_again_only_for_what_did_not_fire(open_run):
    run, _ = open_run(rounds=5, features_at_once=2)
    for target in TARGETS:
        for kind in ("harmful", "benign"):
            tries = [d for d in run.drafts if (d.feature, d.kind, d.prompt_type) == (target, kind, "vanilla")]
            fires = verify([draft.text for draft in tries], [target] * len(tries))
            assert all(value == 0 for value in fires[:-1])
            assert len(tries) == 5 or fires[-1] > 0


def test_a_feature_that_never_fires_is_given_up_and_named(open_run):
    def forgetful(body):
        answer = grammar(body)
        return answer.replace(WORDS[3], "it") if "test messages" in body["messages"][0]["content"] else answer

    run, _ = open_run(Grammar(forgetful))
    assert run.without == (FeatureId(1, 3),)
    assert FeatureId(1, 3) not in {example.draft.feature for example in run.examples}


def test_groups_come_in_the_order_of_the_targets(open_run):
    run, _ = open_run(features_at_once=1)
    assert list(dict.fromkeys(example.draft.feature for example in run.examples)) == TARGETS
    grouped, _ = open_run(features_at_once=3)
    texts = Counter(example.draft.text for example in run.examples)
    assert Counter(example.draft.text for example in grouped.examples) == texts  # groups change nothing else


def test_styles_take_turns(open_run):
    run, _ = open_run(styles=("one", "two", "three"), rounds=9)
    styles = [example.draft.style for example in run.examples if example.draft.prompt_type == "adversarial"]
    # Harmful and benign of each target in turn, the one from the first style on, the other from the second.
    assert styles == ["one", "two", "two", "three", "three", "one", "one", "two", "two", "three"]
    plain, _ = open_run(styles=())
    assert {example.draft.prompt_type for example in plain.examples} == {"vanilla"}


MANY = [FeatureId(1, number) for number in range(len(WORDS))]
MANY_EXPLANATIONS = {
    target: Explanation(1, target.feature_id, f"the word {WORDS[target.feature_id]}", "") for target in MANY
}


def always(texts, features):
    return [1.0] * len(texts)


@pytest.mark.parametrize("group", [16, 3])
def test_style_and_kind_are_independent(open_run, group):
    """Default kinds and styles: 20 features, so 40 rewrites over 8 cells."""

    def everything(synthesis):
        return synthesis.run(MANY, MANY_EXPLANATIONS, always)

    run, _ = open_run(function=everything, features_at_once=group)
    table = Counter((draft.style, draft.kind) for draft in run.drafts if draft.prompt_type == "adversarial")
    assert table == {(style, kind): 5 for style in STYLES for kind in ("harmful", "benign")}


@pytest.mark.parametrize(("vanilla", "rewrites"), [(40, 40), (13, 40), (9, 7), (2, 3)])
def test_style_and_kind_are_independent_in_the_control(open_run, vanilla, rewrites):
    def control(synthesis):
        return synthesis.random(vanilla, rewrites)

    drafts, _ = open_run(function=control)
    table = Counter((draft.style, draft.kind) for draft in drafts if draft.prompt_type == "adversarial")
    kinds = Counter(kind for _, kind in table.elements())
    assert kinds.total() == rewrites
    for (_, kind), count in table.items():
        assert abs(count - kinds[kind] / len(STYLES)) < 1
    styles = Counter(style for style, _ in table.elements())
    assert max(styles.values()) - min(styles[style] for style in STYLES) <= 2


@pytest.mark.parametrize("group", [16, 1])
def test_features_of_one_explanation_get_their_own_draws(open_run, group):
    """Three features of one explanation: each prompt that is counted was asked for, and asked for once."""
    same = {target: Explanation(1, target.feature_id, "the word ladder", "") for target in TARGETS[:3]}

    def everything(synthesis):
        return synthesis.run(list(same), same, always)

    run, model = open_run(function=everything, features_at_once=group, prompts_per_kind=2)
    written = [key for key in map(json.dumps, model.asked) if "You write test" in key or "You rewrite" in key]
    assert len(set(written)) == len(written)
    assert run.drawn == len(run.drafts) == len(written) == 3 * 2 * 2 * 2
    assert len({draft.request_id for draft in run.drafts}) == run.drawn
    assert len({(draft.text, draft.kind, draft.style) for draft in run.drafts}) > run.drawn / 2


def test_rewrites_of_the_same_words_get_their_own_draws(open_run):
    """An endpoint that writes one and the same vanilla prompt every time."""

    def monotonous(body):
        if "You write test" in body["messages"][0]["content"]:
            return json.dumps({"prompt": "tell me about the ladder"})
        return grammar(body)

    def control(synthesis):
        return synthesis.random(8, 24)

    drafts, model = open_run(Grammar(monotonous), function=control)
    assert len(drafts) == len(model.asked) == 32
    assert len({draft.request_id for draft in drafts}) == 32


def test_several_prompts_of_a_kind_are_different_requests(open_run):
    run, _ = open_run(prompts_per_kind=3, styles=(), rounds=9)
    counts = Counter((example.draft.feature, example.draft.kind) for example in run.examples)
    assert set(counts.values()) == {3}


def test_the_judge_decides_the_kind_and_the_kind_the_response(open_run):
    def strict(body):
        if "You decide whether" in body["messages"][0]["content"]:
            return json.dumps({"harmful": True})
        return grammar(body)

    run, _ = open_run(Grammar(strict))
    assert {example.response.kind for example in run.examples} == {"harmful"}
    assert {example.draft.kind for example in run.examples} == {"harmful", "benign"}
    assert all(example.response.text.startswith("i do not help") for example in run.examples)
    trusting, model = open_run(Grammar(strict), confirm_kind=False)
    assert all(example.response.kind == example.draft.kind for example in trusting.examples)
    assert not any("You decide whether" in body["messages"][0]["content"] for body in model.asked)


def test_without_a_kind_or_a_whole_response_there_is_no_row(open_run):
    def unsure(body):
        return "who knows" if "You decide whether" in body["messages"][0]["content"] else grammar(body)

    run, _ = open_run(Grammar(unsure))
    assert not run.examples
    assert run.undecided > 0
    assert run.rejected == {"no kind": run.undecided}
    for finish in ("length", "content_filter", "tool_calls"):
        cut, _ = open_run(Grammar(finish=finish))
        assert not cut.examples
        assert cut.rejected == {finish: cut.undecided}
        assert cut.undecided > 0
    silent, _ = open_run(Grammar(finish="None"))  # a server that gives no reason
    assert silent.examples


def test_random_control_knows_no_feature(open_run):
    def control(synthesis):
        return synthesis.random(7, 5)

    drafts, model = open_run(function=control)
    assert Counter(draft.prompt_type for draft in drafts) == {"vanilla": 7, "adversarial": 5}
    assert all(draft.feature is None for draft in drafts)
    assert len(model.asked) == 12
    assert not any("the word" in body["messages"][-1]["content"] for body in model.asked)
    assert {draft.style for draft in drafts} == {"", *STYLES}


def test_rows_are_saved_as_trl_reads_them(open_run, tmp_path):
    run, _ = open_run()
    rows = [example_row(example, dict.fromkeys(TARGETS, 0.75)) for example in run.examples]
    save_rows(rows[:3], tmp_path / "data")
    save_rows(rows, tmp_path / "data")  # replaces
    assert [dict(row) for row in load_from_disk(str(tmp_path / "data"))] == rows
    assert [path.name for path in tmp_path.iterdir() if ".part" in path.name] == []
    assert sum(type_counts(rows).values()) == len(rows)
    even = balanced(rows, seed=1)
    counts = Counter(row_type(row) for row in even)
    assert set(counts.values()) == {min(count for count in type_counts(rows).values() if count)}
    assert even == sorted(even, key=rows.index)
    with pytest.raises(ValueError, match="no rows"):
        save_rows([], tmp_path / "data")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="in the way"):
        save_rows(rows, tmp_path / "other")


@pytest.mark.parametrize(
    "wrong", [{"topic": " "}, {"kinds": ()}, {"kinds": ("odd",)}, {"rounds": 0}, {"enough": 0}, {"temperature": -1}]
)
def test_mistaken_settings(wrong):
    with pytest.raises(ValueError):
        SynthesisSettings(**{"topic": TOPIC, **wrong})
