"""The grid of switching runs in miniature: which rows come out, and that a second run makes nothing again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.experiments.arms import SWITCHING_ARMS as ARMS
from benchmarks.experiments.recipe import SwitchingCell, WeightedArm
from benchmarks.experiments.switching_grid import count_switches, fit_identifier, run_switching_cell
from benchmarks.testbed.cache import open_cache
from benchmarks.testbed.switching.config import SwitchingConfig
from benchmarks.testbed.switching.grammar import write_paragraphs
from benchmarks.testbed.switching.language_model import distinctive_tokens, make_language_model
from qscope_posttrain.models.generation import Sample


@pytest.fixture(scope="module")
def cell(small_config: SwitchingConfig) -> SwitchingCell:
    arms = (WeightedArm(ARMS["token_penalty"], (10.0, 40.0)), WeightedArm(ARMS["random_features"], (0.2,)))
    return SwitchingCell("zh", "Chinese", replace(small_config, model_seed=9), (0,), (11, 12), arms)


def test_rows_hold_every_run_and_repeat_themselves(cell: SwitchingCell, monkeypatch: pytest.MonkeyPatch) -> None:
    ((rows, world),) = run_switching_cell(cell)
    names = ["base", "sft", "token_penalty", "token_penalty", "random_features"]
    assert [(row["seed"], row["arm"]) for row in rows] == [(seed, name) for seed in (11, 12) for name in names]
    assert world["explained_variance"].keys() == {0, 1}
    for row in rows:
        assert row["base"] == 0  # the cell's, not the settings'
        assert row["metrics"].keys() == {"val", "test"}
        assert row["sampled"]["prompts"] == cell.settings.sampled_prompts
        assert row["sampled"]["target"] <= row["sampled"]["any"] <= row["sampled"]["prompts"]
    first = {(row["arm"], row["weight"]): row["metrics"]["test"] for row in rows[:5]}
    assert first["token_penalty", 40.0]["hz"] < first["token_penalty", 10.0]["hz"] < first["sft", 0.0]["hz"]
    assert first["token_penalty", 40.0]["entry"] < first["sft", 0.0]["entry"]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was run again")

    monkeypatch.setattr("benchmarks.testbed.switching.experiment.fine_tune", refuse)
    assert next(iter(run_switching_cell(cell)))[0] == rows


def test_switches_are_counted_by_language() -> None:
    def sample(language: str, response: str, tokens: tuple[int, ...] = ()) -> Sample:
        return Sample(language, 0, 0, "", response, ended=False, tokens=tokens)

    samples = [
        sample("en", "plain text"),
        sample("en", "some 汉字", (1, 2, 3) * 20),
        sample("ru", "text 한국"),
        sample("ru", "text"),
    ]
    counts = count_switches(samples, lambda text, _: "汉" in text, lambda text, _: "汉" in text or "한" in text)
    assert counts == {
        "prompts": 4, "target": 1, "any": 2, "endless": 1,
        "languages": {"en": {"prompts": 2, "target": 1, "any": 1}, "ru": {"prompts": 2, "target": 0, "any": 1}},
    }  # fmt: skip


def test_a_target_without_a_script_is_seen_by_its_words(tmp_path: Path) -> None:
    for name, language, size in (("prose", "en", 60_000), ("autre", "fr", 60_000)):
        (tmp_path / f"{name}.txt").write_text("\n".join(write_paragraphs(language, size, 3)), encoding="utf-8")
    config = SwitchingConfig(
        texts=[f"prose={tmp_path / 'prose.txt'}", f"autre={tmp_path / 'autre.txt'}"], target="autre", identify="words",
        vocabulary=700, window=48, prompt=12, hidden_size=32, model_layers=2, heads=2, pretraining_steps=1,
        sampled_tokens=35, workers=1, cache=str(tmp_path / "cache"),
    )  # fmt: skip
    language_model = make_language_model(config, open_cache(config))
    tokens = {name: text.tokens for name, text in language_model.maker.encoded["pre"].items()}
    assert language_model.target_tokens.tolist() == distinctive_tokens(tokens, "autre").tolist()
    identifier = fit_identifier(config, language_model)
    held_out = language_model.maker.dialogue("test", 60, 1, languages=["autre"])
    french = [language_model.tokenizer.decode(row[13:]) for row in held_out.input_ids]
    assert sum(identifier.switched(text, "prose") for text in french) > 50
