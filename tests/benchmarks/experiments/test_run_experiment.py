"""A whole experiment in miniature, through the command: folder, summary, report, pages, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.experiments.rows import read_rows
from benchmarks.testbed.switching.config import SwitchingConfig
from qscope_posttrain.cli.main import main

SETTINGS = (
    "vocabulary", "window", "prompt", "hidden_size", "model_layers", "heads", "pretraining_steps",
    "pretraining_learning_rate", "switch", "sae_layers", "sae_expansion", "sae_k", "sae_steps", "sae_windows",
    "feature_windows", "top", "sft_windows", "sft_learning_rate", "evaluation_windows", "sampled_prompts",
    "sampled_tokens", "workers",
)  # fmt: skip

SHORT = {"sft_windows": 64, "evaluation_windows": 24, "sampled_prompts": 9}
"""Little of what is done in each run: the results are not looked at."""


@pytest.fixture
def recipe(small_config: SwitchingConfig, tmp_path: Path) -> Path:
    content = {
        "kind": "switching",
        "title": "A small experiment",
        "question": "Does anything come out?",
        "settings": {name: getattr(small_config, name) for name in SETTINGS} | SHORT,
        "bases": [0],
        "seeds": [11, 12],
        "arms": {"token_penalty": [10, 40], "sasft_decoder": [0.2], "random_features": [0.2]},
        "cells": {"zh": {"title": "Chinese"}, "extra": {}},
        "variants": {"quick": {"seeds": [11]}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_the_command_writes_everything_and_goes_on_from_its_cache(
    recipe: Path, small_config: SwitchingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    output = tmp_path / "out"
    arguments = ["experiment", "--config", str(recipe), "--cells", "zh", "--output", str(output)]
    arguments += ["--corpus", str(small_config.corpus), "--cache", str(small_config.cache)]
    assert main(arguments) == 0
    rows = read_rows(output)
    assert len(rows) == 2 * (2 + 4)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary["command"] == "experiment"
    assert summary["seeds"] == [11, 12]
    assert {"verdicts", "zh/chosen"} <= set(summary["results"]["tables"])
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "A small experiment" in page
    assert "token penalty" in page
    assert list((output / "completions").glob("*.html"))
    assert (output / "figures" / "1.svg").read_text(encoding="utf-8").startswith("<svg")
    assert "token penalty" in capsys.readouterr().out

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was run again")

    monkeypatch.setattr("benchmarks.testbed.switching.experiment.fine_tune", refuse)
    assert main(arguments) == 0
    assert read_rows(output) == rows


def test_a_dry_run_shows_the_grid_only(recipe: Path, small_config: SwitchingConfig, tmp_path: Path, capsys) -> None:
    arguments = ["experiment", "--config", str(recipe), "--dry-run", "--corpus", str(small_config.corpus)]
    assert main([*arguments, "--variant", "quick"]) == 0
    shown = capsys.readouterr().out
    assert "Grid of 2 cells" in shown
    assert "sasft_decoder" in shown
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "huge"], "no variant named 'huge'"),
        (["--cells", "fr"], "no cell named fr"),
        (["--celles", "zh"], "unknown option '--celles'"),
    ],
)
def test_mistakes_are_one_line(recipe: Path, arguments: list[str], message: str, capsys) -> None:
    assert main(["experiment", "--config", str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_corpus_is_named_before_anything_runs(recipe: Path, tmp_path: Path, capsys) -> None:
    arguments = ["experiment", "--config", str(recipe), "--corpus", str(tmp_path / "none")]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err
