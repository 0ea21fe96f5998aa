"""SASFT on a pretrained model: clean, switched and held-out rows, a trimmed vocabulary, tables from a toy result."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from benchmarks.real import texts
from benchmarks.real.fine_tuning import capability, parts, tables, trimmed
from benchmarks.real.fine_tuning.arms import ARMS, ARMS_OF, SETTINGS
from benchmarks.real.studies import sasft
from qscope_posttrain.cli.training.sft import parse_recipe
from qscope_posttrain.text.scripts import contains_language_script

with_data = pytest.mark.skipif(not texts.DATA.is_dir(), reason=f"real text is not at {texts.DATA}")


@with_data
@pytest.mark.parametrize("name", SETTINGS)
class TestRows:
    def test_the_switch_is_all_that_differs(self, name):
        dirty, clean = parts.training_rows(SETTINGS[name])
        assert len(dirty) == len(clean) == SETTINGS[name].rows * 6 // 5
        switched = [pair for pair in zip(dirty, clean, strict=True) if pair[0].switch is not None]
        assert len(switched) == SETTINGS[name].share * SETTINGS[name].rows
        for row, original in switched:
            assert row.language == original.language != SETTINGS[name].target
            assert row.prompt == original.prompt
            assert original.completion.startswith(row.completion[: row.switch].rstrip())
            assert row.completion[row.switch :].strip()
        rest = [pair for pair in zip(dirty, clean, strict=True) if pair[0].switch is None]
        assert all(row == original for row, original in rest)

    def test_scored_texts_are_not_learned_from(self, name):
        dirty, clean = parts.training_rows(SETTINGS[name])
        scored = parts.scored_rows(SETTINGS[name], 8, 4)
        learned = {row.prompt + row.completion for row in (*dirty, *clean)}
        held_out = [row.prompt + row.completion for part in scored.values() for row in part]
        assert len(held_out) == len(set(held_out))
        assert not learned & set(held_out)
        assert not {
            text for language in SETTINGS[name].sources for text in texts.paragraphs(language, held_out=False)
        } & set(held_out)


@with_data
def test_clean_rows_have_no_letter_of_the_target():
    _, clean = parts.training_rows(SETTINGS["zh"])
    scored = [row for part in parts.scored_rows(SETTINGS["zh"], 8, 4).values() for row in part]
    for row in (*clean, *(row for row in scored if row.switch is None)):
        text = row.prompt + row.completion
        assert contains_language_script(text, "zh") == (row.language == "zh")
    for row in (row for row in scored if row.switch is not None):
        assert not contains_language_script(row.prompt + row.completion[: row.switch], "zh")
        assert contains_language_script(row.completion[row.switch], "zh")


def test_a_trimmed_tokenizer_cuts_its_texts_as_before(tmp_path):
    vocabulary = {token: number for number, token in enumerate(["<unk>", "x", "a", "b", "c", "xa", "ab", "abc", "bc"])}
    merges = [("a", "b"), ("ab", "c"), ("b", "c"), ("x", "a")]
    Tokenizer(BPE(vocabulary, merges, unk_token="<unk>")).save(str(tmp_path / "old.json"))
    described = json.loads((tmp_path / "old.json").read_text())
    old = Tokenizer.from_str(json.dumps(described))
    used = set(old.encode("abcab").ids)
    kept = trimmed.kept_tokens(described, used)
    assert kept == {"a", "b", "c", "ab", "abc"}
    new = Tokenizer.from_str(json.dumps(trimmed.trimmed_tokenizer(described, kept)))
    assert new.get_vocab_size() == 5
    assert new.encode("abcab").tokens == old.encode("abcab").tokens == ["abc", "ab"]


class _Head(torch.nn.Module):
    """Word n is followed by word n + 1 with the same odds, whatever came before."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(6, 6)
        self.table.weight.data = 2.0 * torch.eye(6).roll(1, dims=1)

    @property
    def base_model(self):
        return self

    def forward(self, input_ids, use_cache):
        return type("Output", (), {"last_hidden_state": self.table(input_ids)})()

    def get_output_embeddings(self):
        return torch.nn.Identity()


class _Words:
    def __call__(self, text):
        return type("Output", (), {"input_ids": [ord(letter) - ord("a") for letter in text]})()


def test_scores_are_sums_over_the_completion():
    rows = [parts.Row("a", "bc", "en"), parts.Row("ab", "abcdef", "en", switch=2)]
    clean, switched = parts.score(_Head(), _Words(), rows, torch.tensor([5]))
    total = math.exp(2) + 5
    mass = 1 / total  # of word 5, after neither a nor b
    assert clean["tokens"] == 2
    assert clean["mass"] == pytest.approx(2 * mass)
    assert clean["kept"] == pytest.approx(2 * math.log1p(-mass))
    assert clean["loss"] == pytest.approx(-2 * math.log(math.exp(2) / total))
    assert (switched["switched"], switched["tokens"]) == (True, parts.ENTRY)


def _scores(mass: float, loss: float) -> tables.Scores:
    def row(language, switched, scale):
        return {"language": language, "switched": switched, "mass": 10 * mass * scale, "kept": 10 * math.log1p(-mass),
                "loss": loss * 10, "tokens": 10.0}  # fmt: skip

    rows = [row(language, False, 1 + number) for language in ("en", "fr", "ko", "ru") for number in range(4)]
    rows += [row("zh", False, 1.0) for _ in range(3)] + [row("en", True, 1.0) for _ in range(3)]
    return {"validation": rows, "test": rows}


class TestTables:
    found = {  # noqa: RUF012 - read only
        ("zh", "base", 0.0, 0): _scores(0.001, 3.1),
        ("zh", "sft", 0.0, 0): _scores(0.01, 3.0),
        ("zh", "sasft", 0.1, 0): _scores(0.008, 3.0),
        ("zh", "sasft", 0.3, 0): _scores(0.005, 3.001),
        ("zh", "sasft", 1.0, 0): _scores(0.001, 3.5),
    }

    def test_the_chosen_weight_is_the_best_that_is_cheap(self):
        assert tables.chosen(self.found, "zh", "sasft") == 0.3

    def test_changes_are_against_plain_training(self):
        change = tables.changes([self.found["zh", "sasft", 0.3, 0]], [self.found["zh", "sft", 0.0, 0]], "zh", "test")
        assert change["hazard"].estimate == pytest.approx(-50)
        assert change["hazard"].low == pytest.approx(-50) == change["hazard"].high
        cost = 100 * math.expm1(0.001 + math.log1p(-0.005) - math.log1p(-0.01))
        assert change["cost"].estimate == pytest.approx(cost)

    def test_all_tables_are_made(self):
        log = [{"sasft/penalty": 0.5}, {"sasft/penalty": 0.02}, {"train_loss": 4.0}]
        drawn = {"micro": {"estimate": 0.5, "low": 0.25, "high": 0.75}, "languages": {"en": {"samples": 6}}}
        result = tables.summary(self.found, {"train": {"seconds": 1, "processor_seconds": 1, "peak_mib": 1, "key": ""}},
                                {("zh", "sft", 0.0, 0): drawn}, {("zh", "sasft", 0.1, 0): log})  # fmt: skip
        assert set(result["tables"]) == {"zh_levels", "zh_methods", "zh_weights", "zh_sampled"}
        assert result["tables"]["zh_sampled"]["rows"] == [["SFT", None, 6, "50.0 (25.0 .. 75.0)"]]
        methods = result["tables"]["zh_methods"]["rows"]
        assert [row[:2] for row in methods] == [["before SFT", None], ["SASFT, default", "0.3"]]
        levels = result["tables"]["zh_levels"]["rows"]
        assert [row[:2] for row in levels] == [["before SFT", "2.50"], ["SFT", "25.00"], ["SASFT, default", "12.50"]]
        dear = {**self.found, ("zh", "sasft", 0.3, 0): _scores(0.005, 3.1)}
        del dear["zh", "sasft", 0.1, 0], dear["zh", "sasft", 1.0, 0]
        assert tables.methods(dear, "zh").rows[-1][1] == "0.3 (!)"
        assert [row[-2] for row in result["tables"]["zh_weights"]["rows"]] == ["0.5, 0.02", None, None]
        assert [row[-1] for row in result["tables"]["zh_weights"]["rows"]] == [None, "chosen", None]


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_command_of_the_product(name, tmp_path):
    arm = ARMS[name]
    words = sasft.arm_words(arm, "zh", arm.weights[0], tmp_path / "features.safetensors" if arm.features else None)
    recipe = parse_recipe(["--config", str(sasft.ROOT / sasft.RECIPE), *map(str, words)])
    assert recipe.run.method == arm.words[1]
    assert (recipe.penalty is None) == (arm.words[1] == "sft")
    assert recipe.penalty is None or recipe.penalty.weight == arm.weights[0]
    assert any(name in arms for arms in ARMS_OF.values())


@with_data
def test_the_table_of_questions_counts_right_answers():
    """Before SFT every item is answered rightly; after it each group gets one answer four times, as by chance."""
    sets = capability.read_sets()
    assert {name.partition("_")[0] for name in sets} == {"mmlu", "mgsm"}

    def scores(best):
        kept = {name: [[float(n == best(item)) for n in range(4)] for item in found] for name, found in sets.items()}
        return {name: {"with": rows, "without": [[0.0] * 4] * len(rows)} for name, rows in kept.items()}

    found = {"base": scores(lambda item: item.right), "sft": scores(lambda item: 0)}
    before, after = map(list, capability.capability_table(found, "zh").rows)
    assert before == ["before SFT", "100.0 (100.0 .. 100.0)", "100.0 (100.0 .. 100.0)", None, None]
    assert after[:3] == ["SFT", "25.0 (25.0 .. 25.0)", "25.0 (25.0 .. 25.0)"]
    fell = 75 * (1 - math.e) / (math.e + 3)  # softmax of one 1 and three 0
    assert after[3].startswith(f"{fell:+.1f} (")
    assert after[4] == after[3]
