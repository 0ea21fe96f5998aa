"""The study of negatives on a chat model: its prompts, its answer checking, its measures and its tables."""

from __future__ import annotations

import json
import math

import pytest
import torch
from looping_model import CIRCLE, looping_model, looping_prompts, looping_tokenizer

from benchmarks.real import loop_measures, sums, texts
from benchmarks.real.studies import negatives
from qscope_posttrain.features.find.loops import collect_loops
from qscope_posttrain.intervals import wilson
from qscope_posttrain.models.generation import SamplingSettings
from qscope_posttrain.report.summary import write_rows
from qscope_posttrain.rl.rewards import reward_function

with_data = pytest.mark.skipif(not texts.DATA.is_dir(), reason=f"real text is not at {texts.DATA}")
SETTINGS = SamplingSettings(1, top_p=1.0, max_new_tokens=32, batch_size=64)


def test_sums_to_train_on_are_not_held_out():
    train, held_out = ([row["prompt"][-1]["content"] for row in sums.sums(part)] for part in (False, True))
    assert len(set(train)) == len(train) > 4 * len(held_out) - 5
    assert len(held_out) > 80
    assert not set(train) & set(held_out)


@pytest.mark.parametrize("part", [False, True])
def test_answers_are_those_of_the_sums(part):
    for row in sums.sums(part):
        first, word, second = row["prompt"][-1]["content"].removeprefix("What is ").removesuffix("?").split()
        assert row["answer"] == eval(f"{first} {sums.OPERATIONS[word]} {second}") >= 0
        assert sums.is_right(loop_measures.solution(row), row["answer"])


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("10 times 3 is 30.", True),
        ("30", True),
        ("It is 30, or 3 times 10.", False),
        ("It is 1,030.", False),
        ("A number.", False),
        ("", False),
        ("It is 30.0", True),
    ],
)
def test_the_last_number_is_the_answer(response, right):
    assert sums.is_right(response, 30) is right
    reward = reward_function("benchmarks.real.sums.RightNumber")
    assert reward(completions=[[{"role": "assistant", "content": response}], response], answer=[30, 30]) == [right] * 2


@with_data
def test_open_prompts_are_apart_from_each_other_and_from_the_texts_of_the_saes():
    found, measured = (set(sums.open_prompts(part, 24, 40)) for part in sums.PARTS)
    assert len(found) == len(measured) == 64
    assert not found & measured
    learned = "\n".join(texts.sae_texts("smollm2"))
    read = [prompt for prompt in found | measured if prompt.split(": ", 1)[-1] in learned]
    assert len(read) < 6  # some sentences of the documentation stand there twice


@pytest.fixture(scope="module")
def places():
    found = collect_loops(looping_model(), looping_tokenizer(), looping_prompts(), wanted=5, settings=SETTINGS)
    return [loop_measures.own_place(loop) for loop in found.loops]


class TestMeasures:
    def test_an_own_loop_is_cut_after_its_first_copy(self, places):
        for place in places:
            assert set(place.block) == set(CIRCLE)
            assert place.prefix[-len(place.block) :] == place.block
            assert place.prompt_length == 3

    def test_probability_of_each_copy(self, places):
        model = looping_model()
        found = loop_measures.copy_probabilities(model, places, copies=3)
        place = places[0]
        ids = torch.tensor([[*place.prefix, *place.block * 3]])
        scores = model(input_ids=ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        expected = scores[len(place.prefix) - 1 :].view(3, -1).mean(dim=1)
        torch.testing.assert_close(torch.tensor(found[0]), expected)

    def test_seeded_text_of_a_looping_model_goes_on(self, places):
        endless = loop_measures.seeded_endless(looping_model(), looping_tokenizer(), places, SETTINGS)
        assert len(endless) == len(places)
        assert any(endless)

    def test_a_model_is_its_own_start(self):
        model = looping_model()
        found = loop_measures.clean_text(model, model, looping_tokenizer(), ["w1 w2 w3 c0", "w0 c1 c2"])
        assert found["kl"] == pytest.approx([0, 0], abs=1e-6)
        assert all(value > 0 for value in found["loss"])


def test_the_first_sentence_ends_at_a_mark():
    class Letters:
        def decode(self, tokens):
            return "".join(map(chr, tokens))

    sentence, endless = list(map(ord, "It is so. And on.")), list(map(ord, "a" * 80))
    assert loop_measures.first_sentence(Letters(), sentence) == len("It is so.")
    assert loop_measures.first_sentence(Letters(), endless) is None
    prompt = [7, 7]
    assert [
        (place.prefix, place.block)
        for place in loop_measures.clean_places(Letters(), [prompt] * 2, [sentence, endless])
    ] == [((7, 7, *map(ord, "It is so.")), tuple(map(ord, "It is so.")))]


class TestTables:
    @pytest.fixture
    def found(self):
        def arm(right, endless, going_on):
            return {
                "sums": {"right": right, "ended": [True] * 4, "length": [9, 9, 10, 12]},
                "greedy": {"endless": endless},
                "endless": {"open text, greedy": endless},
                "blocks": {kind: [9, 10, 11, 10] for kind in ("own loops", "open text", "sums")},
                "copies": {kind: [[math.log(going_on)] * 5] * 4 for kind in ("own loops", "open text", "sums")},
                "clean": {"kl": [0.1, 0.3], "loss": [3.0, 4.0 + going_on]},
            }

        return {
            "start": arm([True, False, False, False], [True] * 4, 0.9),
            "dapo": arm([True, True, True, False], [True, True, False, False], 0.8),
            "seeded": arm([True, True, True, False], [False] * 4, 0.5),
        }

    def test_rates_and_paired_differences(self, found):
        table = negatives.loops_table(found).to_dict()
        rows = {row[0]: dict(zip(table["columns"][1::2], row[1::2], strict=False)) for row in table["rows"]}
        low, high = wilson(3, 4)[1:]
        assert rows["DAPO"]["right, %"] == f"75 ({100 * low:.0f} .. {100 * high:.0f})"
        assert rows["seeded negative"]["greedy loops, %"].startswith("0 (")
        dapo, seeded = (next(row for row in table["rows"] if row[0] == name) for name in ("DAPO", "seeded negative"))
        assert dapo[2] == dapo[4] == "-"
        assert seeded[2] == "+0.0 (+0.0 .. +0.0)"
        assert seeded[4].startswith("-50.0 (-100.0 .. ")

    def test_the_start_model_by_itself(self, found):
        table = negatives.start_table(found["start"]).to_dict()
        rows = {row[0]: row[1:] for row in table["rows"]}
        assert rows["own loops"] == [4, "10", "90", "90", "90", "90", "-", "-"]
        assert rows["open text"][-2:] == ["100 (51 .. 100)", "-"]

    def test_a_study_that_is_not_finished_is_collected(self, found, tmp_path):
        curve = negatives.Table(
            "", ["stage", "layer", "direction", "strength", "n", "looped", "p < 0.001"], []
        ).to_dict()
        features = {"steering_curve": curve, "ranking": {}, "steering": None, "loops": {}}
        files = {"loops/summary.json": {"results": {"ratio": 0.2}}, "features/summary.json": {"results": features}}
        for arm, own in found.items():
            greedy = own.pop("greedy")["endless"]
            rows = [{"endless": endless, "ended": not endless, "tokens": 9} for endless in greedy]
            (tmp_path / f"{arm}_greedy").mkdir()
            write_rows(tmp_path / f"{arm}_greedy" / "examples.jsonl", rows)
            files[f"{arm}.json"] = own
            log = [{"loss": 0.1, "ordinary/reward": 0.5, "step_time": 3.0}, {"train_loss": 0.1}]
            files[f"{arm}/summary.json"] = {"results": {"log": log}}
            files[f"steps/{arm}.json"] = dict.fromkeys(negatives.COSTS, 1)
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(json.dumps(content))
        result = negatives.collect(tmp_path, list(found))
        assert [row[0] for row in result["tables"]["loops"]["rows"]] == ["before training", "DAPO", "seeded negative"]
        assert result["training"] == {arm: [{"ordinary/reward": 0.5}] for arm in ("dapo", "seeded")}
        assert result["measured"]["start"]["greedy"]["endless"] == [True] * 4
        assert set(result["steps"]) == set(found)

    def test_probability_of_a_copy(self, found):
        table = negatives.copies_table(found).to_dict()
        dapo, seeded = (next(row for row in table["rows"] if row[0] == name) for name in ("DAPO", "seeded negative"))
        assert dapo[1:3] == ["80.0", "-"]
        assert seeded[1:3] == ["50.0", "-30.0 (-30.0 .. -30.0)"]
        assert dapo[-2:] == ["0.2000", "-0.0500 (-0.1000 .. +0.0000)"]

    def test_negatives_against_each_other(self, found):
        (row,) = negatives.pairs_table({**found, "feature": found["dapo"]}).rows
        assert row[0] == "seeded negative against steered by features"
        assert row[1].startswith("+0.0 (")
        assert row[4:] == ("-30.0 (-30.0 .. -30.0)",) * 3

    def test_steering_shows_the_best_direction_beside_its_controls(self):
        columns = ["stage", "layer", "direction", "strength", "window", "n", "looped", "p < 0.001"]
        rows = [
            ["scan", None, "unsteered", None, None, 10, 0.1, 0.0],
            ["scan", 8, "#1", 1.0, 16, 10, 0.3, 0.2],
            ["scan", 8, "#2", 1.0, 16, 10, 0.5, 0.4],
            ["scan", 8, "random (8 directions)", 1.0, 16, 10, 0.2, 0.3],
            ["scan", 8, "difference of means", 1.0, 16, 10, 0.0, 0.1],
        ]
        (row,) = negatives.steering_table({"columns": columns, "rows": rows}).rows
        assert row[:5] == ("scan", 8, 1.0, 10, "#2")
        assert [cell.split()[0] for cell in row[5:]] == ["50", "20", "0", "40"]

    def test_training_is_shown_by_its_first_and_last_updates(self):
        log = [
            {"ordinary/reward": float(number), "ordinary/repeat_ratio": 0.0, "ordinary/length": 10.0}
            for number in range(6)
        ]
        kept = {"negative/rows": 2.0, "negative/kept": 0.5, "negative/looped": 0.5, "negative/gradient_share": 0.2}
        seeded = [{**entry, **kept} for entry in log]
        plain, other = negatives.training_table({"dapo": log, "seeded": seeded}, part=2).rows
        assert plain == ("DAPO", 0.5, 4.5, 0.0, 10.0, None, None, "-", None)
        assert other[5:8] == (0.5, 0.5, "6 of 12")
