"""Recipes of experiments: what they ask for, and what they are refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.experiments.arms import SWITCHING_ARMS as ARMS
from benchmarks.experiments.recipe import RepetitionCell, SwitchingCell, build_recipe, load_recipe
from benchmarks.experiments.switching_grid import SPLITS, cell_jobs

RECIPES = sorted((Path(__file__).parents[3] / "recipes" / "experiments").glob("*.yaml"))
SWITCHING: dict[str, Any] = {
    "kind": "switching",
    "settings": {"corpus": "texts", "window": 80},
    "bases": [0, 1],
    "seeds": [5],
    "arms": {"token_penalty": [3, 10], "one": {"like": "sasft_decoder", "top": 1, "weights": 0.2}},
    "cells": {"clean": {}, "dirty": {"settings": {"sft_switch": 0.2}, "seeds": [7, 8], "arms": ["random_features"]}},
    "variants": {"small": {"bases": [4], "settings": {"window": 60}, "cells": {"dirty": None}}},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("variant", [None, "small", "gpu"])
def test_the_recipes_of_the_repository_load(path: Path, variant: str | None) -> None:
    recipe = load_recipe(path, variant)
    assert recipe.title
    assert recipe.question
    assert all(cell.bases and cell.seeds and cell.arms for cell in recipe.cells)
    if variant == "gpu":
        assert all(cell.settings.device == "cuda" for cell in recipe.cells)


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {
        "sasft_real_text", "sasft_contaminated", "steered_dapo_rare", "steered_dapo_frequent",
    }  # fmt: skip


def test_cells_override_the_recipe() -> None:
    clean, dirty = build_recipe(SWITCHING).cells
    assert isinstance(clean, SwitchingCell)
    assert isinstance(dirty, SwitchingCell)
    assert (clean.settings.window, clean.settings.sft_switch, clean.seeds) == (80, 0.0, (5,))
    assert (dirty.settings.window, dirty.settings.sft_switch, dirty.seeds) == (80, 0.2, (7, 8))
    assert [(entry.arm.name, entry.weights) for entry in clean.arms] == [
        ("token_penalty", (3.0, 10.0)),
        ("one", (0.2,)),
    ]
    one = clean.arms[1].arm
    assert (one.title, one.top, one.options) == ("one", 1, ARMS["sasft_decoder"].options)
    assert [entry.weights for entry in dirty.arms] == [(ARMS["random_features"].weight,)]


def test_a_variant_and_given_settings_override_everything() -> None:
    (cell,) = build_recipe(SWITCHING, "small", {"workers": 3}).cells
    assert (cell.name, cell.bases, cell.settings.window, cell.settings.workers) == ("clean", (4,), 60, 3)


def test_every_arm_weight_and_seed_is_a_job_beside_sft_and_base() -> None:
    clean, dirty = build_recipe(SWITCHING).cells
    assert isinstance(clean, SwitchingCell)
    assert isinstance(dirty, SwitchingCell)
    assert [(job.method, job.weight) for job in cell_jobs(clean)] == [
        ("base", 0.0), ("sft", 0.0), ("token_penalty", 3.0), ("token_penalty", 10.0), ("one", 0.2),
    ]  # fmt: skip
    assert {job.splits for job in cell_jobs(clean)} == {SPLITS}
    assert len(cell_jobs(dirty)) == 2 * 3


def test_a_repetition_recipe() -> None:
    content = {"kind": "repetition", "settings": {"start": "frequent"}, "bases": [0], "seeds": [1], "arms": ["seeded"]}
    (cell,) = build_recipe(content).cells
    assert isinstance(cell, RepetitionCell)
    assert (cell.name, cell.settings.start, cell.arms) == ("all", "frequent", ("seeded",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "both"}, "kind must be"),
        ({"arm": {}}, "unknown key arm in the recipe"),
        ({"settings": {"corpora": "x"}}, "no setting corpora"),
        ({"settings": {"model_seed": 3}}, "use bases, seeds and arms"),
        ({"settings": {"window": 0}}, "window must be at least 1"),
        ({"bases": [1, 1]}, "bases must be a list of different"),
        ({"seeds": None}, "seeds must be a list of different"),
        ({"arms": {"tokens": [1]}}, "unknown arm 'tokens'"),
        ({"arms": {"mine": {"like": "sft", "weight": 1}}}, "no field weight"),
        ({"arms": {"token_penalty": [-1]}}, "weights must be numbers of at least 0"),
        ({"arms": {"token_penalty": []}}, "weights must be numbers of at least 0"),
        ({"cells": {"a": {"variant": 1}}}, "unknown key variant in cell 'a'"),
        ({"cells": ["a"]}, "cells must map names to values"),
        ({"cells": {"a": {"settings": [1]}}}, "settings of cell 'a' must map names to values"),
        ({"variants": ["a"]}, "variants must map names to values"),
        ({"settings": "x"}, "settings must map names to values"),
        ({"settings": {"window": "80"}}, "window must be int, got '80'"),
        ({"settings": {"window": True}}, "window must be int, got True"),
        ({"settings": {"switch": "1e-1x"}}, "switch must be float"),
        ({"settings": {"no_cache": "no"}}, "no_cache must be bool"),
        ({"settings": {"languages": "zh"}}, "languages must be list.str. . None"),
        ({"settings": {"windwo": 1}}, "Did you mean 'window'"),
        ({"settings": {1: 1}}, "no setting 1"),
        ({"bases": [True]}, "bases must be a list of different"),
        ({"seeds": [[1]]}, "seeds must be a list of different"),
        ({"arms": "token_penalty"}, "arms of cell 'clean' must map names to values"),
        ({"arms": [["token_penalty"]]}, "arms of cell 'clean' must map names to values"),
        ({"arms": {"token_penalty": [True]}}, "weights must be numbers of at least 0"),
        ({"arms": {"token_penalty": "3"}}, "weights must be numbers of at least 0"),
        ({"arms": {"mine": {"like": "sft", "top": "x"}}}, "arm 'mine': top must be int"),
        ({"arms": {"mine": {"like": "sft", "options": [1]}}}, "arm 'mine': options must be"),
        ({"sedes": [1], 1: 2}, "unknown key 1, sedes in the recipe.*"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_recipe({**SWITCHING, **changes})


def test_unknown_variants_cells_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no variant named 'large'; there are small"):
        build_recipe(SWITCHING, "large")
    with pytest.raises(ValueError, match="no cell named clear"):
        build_recipe(SWITCHING).only(["clear"])
    assert [cell.name for cell in build_recipe(SWITCHING).only(["dirty"]).cells] == ["dirty"]
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("kind: [", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "tag.yaml").write_text("kind: !!python/object/apply:os.system ['true']", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(tmp_path / "tag.yaml")
    (tmp_path / "list.yaml").write_text("- kind", encoding="utf-8")
    with pytest.raises(ValueError, match="must map keys to values"):
        load_recipe(tmp_path / "list.yaml")
