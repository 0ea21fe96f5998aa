"""An experiment as a YAML file: which cells, pretrained models, arms, coefficients and seeds are compared.

kind: switching                     # or repetition
title: SASFT on real text
question: What the experiment is to find out.
settings: {corpus: ../shared/data/react_docs}      # fields of TestbedConfig or ArithmeticConfig
bases: [0, 1, 2]                    # seeds of pretrained models
seeds: [101, 102, 103]              # seeds of fine-tuning, each on every base
arms:                               # name -> coefficients; a name alone takes its recorded one
  token_penalty: [5, 10, 20]
  top_one: {like: sasft_decoder, top: 1, weights: [0.1, 0.3]}
cells:                              # each overrides any of the above
  clean: {}
  contaminated: {settings: {sft_switch: 0.15}, seeds: [101]}
variants:                           # overrides of the whole file, chosen by name
  small: {bases: [0], seeds: [101]}
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.recipe_file import read_yaml
from qscope_posttrain.testbed.arithmetic.arms import ARMS as REPETITION_ARMS
from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.arms import ARMS as SWITCHING_ARMS
from qscope_posttrain.testbed.arms import Arm
from qscope_posttrain.testbed.config import TestbedConfig

SWITCHING, REPETITION = "switching", "repetition"
_KEYS = ("kind", "title", "question", "settings", "bases", "seeds", "arms", "cells", "variants")
_CELL_KEYS = ("title", "settings", "bases", "seeds", "arms")
_GIVEN_BY_THE_RECIPE = ("model_seed", "seeds", "arms", "tune")


@dataclass(frozen=True)
class WeightedArm:
    """An arm of a switching experiment and the coefficients at which it runs."""

    arm: Arm
    weights: tuple[float, ...]


@dataclass(frozen=True)
class SwitchingCell:
    """One regime of a switching experiment."""

    name: str
    title: str
    settings: TestbedConfig
    """Without `model_seed` and `seeds`, which are the cell's."""
    bases: tuple[int, ...]
    seeds: tuple[int, ...]
    arms: tuple[WeightedArm, ...]
    """Beside plain SFT, which always runs."""


@dataclass(frozen=True)
class RepetitionCell:
    """One regime of a repetition experiment."""

    name: str
    title: str
    settings: ArithmeticConfig
    bases: tuple[int, ...]
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    """Beside plain DAPO, which always runs."""


@dataclass(frozen=True)
class ExperimentRecipe:
    """What a file asks for, checked."""

    kind: str
    title: str
    question: str
    cells: tuple[SwitchingCell | RepetitionCell, ...]
    """All of the recipe's kind."""
    content: Mapping[str, Any]
    """The file's content with the variant's overrides, for the record."""

    def only(self, names: Sequence[str]) -> ExperimentRecipe:
        """The recipe with some of its cells.

        Raises:
            ValueError: no cell of that name.
        """
        known = [cell.name for cell in self.cells]
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise UserValueError(f"no cell named {', '.join(unknown)}; the recipe has {', '.join(known)}")
        return replace(self, cells=tuple(cell for cell in self.cells if cell.name in names))


def load_recipe(
    path: str | os.PathLike[str], variant: str | None = None, settings: Mapping[str, Any] | None = None
) -> ExperimentRecipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        variant: name of one of its variants.
        settings: fields that override those of every cell, for example where the cache is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key, variant, arm or setting, or values that cannot work.
    """
    content = read_yaml(path)
    try:
        return build_recipe(content, variant, settings)
    except (ValueError, TypeError) as error:
        raise UserValueError(f"{path}: {error}") from error


def build_recipe(
    content: Mapping[str, Any], variant: str | None = None, settings: Mapping[str, Any] | None = None
) -> ExperimentRecipe:
    """A recipe from what its file holds; see `load_recipe`."""
    _check_keys(content, _KEYS, "the recipe")
    variants = content.get("variants") or {}
    if variant is not None and variant not in variants:
        raise UserValueError(f"no variant named {variant!r}; there are {', '.join(variants) or 'none'}")
    merged = {key: value for key, value in content.items() if key != "variants"}
    if variant is not None:
        _check_keys(variants[variant], _KEYS[1:-1], f"variant {variant!r}")
        merged = _merge(merged, variants[variant])
    kind = merged.get("kind")
    if kind not in (SWITCHING, REPETITION):
        raise UserValueError(f'kind must be "{SWITCHING}" or "{REPETITION}", got {kind!r}')
    cells = merged.get("cells") or {"all": {}}
    build = _switching_cell if kind == SWITCHING else _repetition_cell
    built = tuple(
        build(str(name), _cell_values(merged, name, cell or {}, settings or {})) for name, cell in cells.items()
    )
    return ExperimentRecipe(
        kind,
        str(merged.get("title", "")),
        str(merged.get("question", "")).strip(),
        built,
        merged,
    )


def _cell_values(
    content: Mapping[str, Any], name: str, cell: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The recipe's values with those of one cell; arms of a cell replace the recipe's, settings are merged."""
    _check_keys(cell, _CELL_KEYS, f"cell {name!r}")
    values = {"title": str(name), **{key: content[key] for key in _CELL_KEYS[1:] if key in content}, **cell}
    values["settings"] = {**(content.get("settings") or {}), **(cell.get("settings") or {}), **settings}
    for key in ("bases", "seeds"):
        numbers = values.get(key)
        if not isinstance(numbers, list) or not numbers or len(set(numbers)) != len(numbers):
            raise UserValueError(f"cell {name!r}: {key} must be a list of different whole numbers, got {numbers!r}")
    misplaced = sorted(set(values["settings"]) & set(_GIVEN_BY_THE_RECIPE))
    if misplaced:
        raise UserValueError(f"cell {name!r}: {', '.join(misplaced)} are no settings; use bases, seeds and arms")
    return values


def _switching_cell(name: str, values: Mapping[str, Any]) -> SwitchingCell:
    arms = values.get("arms") or {}
    if isinstance(arms, list):
        arms = dict.fromkeys(arms)
    weighted = tuple(_weighted_arm(str(key), spec) for key, spec in arms.items() if key != "sft")
    settings = _settings(TestbedConfig, values["settings"], name)
    return SwitchingCell(name, values["title"], settings, tuple(values["bases"]), tuple(values["seeds"]), weighted)


def _repetition_cell(name: str, values: Mapping[str, Any]) -> RepetitionCell:
    arms = list(values.get("arms") or [])
    unknown = sorted(set(arms) - set(REPETITION_ARMS))
    if unknown:
        raise UserValueError(
            f"cell {name!r}: unknown arms {', '.join(unknown)}; there are {', '.join(REPETITION_ARMS)}"
        )
    settings = _settings(ArithmeticConfig, values["settings"], name)
    return RepetitionCell(name, values["title"], settings, tuple(values["bases"]), tuple(values["seeds"]), tuple(arms))


def _weighted_arm(name: str, spec: Any) -> WeightedArm:
    """An arm as the recipe writes it: nothing, coefficients, or changes to a known arm."""
    changes = dict(spec) if isinstance(spec, dict) else {}
    like, weights = str(changes.pop("like", name)), changes.pop("weights", None)
    if not isinstance(spec, dict):
        weights = spec
    if like not in SWITCHING_ARMS:
        raise UserValueError(f"unknown arm {like!r}; there are {', '.join(SWITCHING_ARMS)}")
    known = {field.name for field in fields(Arm)} - {"name", "weight", "grid"}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise UserValueError(
            f"arm {name!r}: no field {', '.join(unknown)}; there are like, weights, {', '.join(sorted(known))}"
        )
    base = SWITCHING_ARMS[like]
    if changes and "title" not in changes:
        changes["title"] = name
    if "options" in changes:
        changes["options"] = {**base.options, **changes["options"]}
    arm = replace(base, name=name, **changes)
    chosen = [arm.weight] if weights is None else weights if isinstance(weights, list) else [weights]
    if not chosen or not all(isinstance(weight, int | float) and weight >= 0 for weight in chosen):
        raise UserValueError(f"arm {name!r}: weights must be numbers of at least 0, got {weights!r}")
    return WeightedArm(arm, tuple(float(weight) for weight in chosen))


def _settings(kind: type[Any], values: Mapping[str, Any], cell: str) -> Any:
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserValueError(f"cell {cell!r}: no setting {', '.join(unknown)}; there are {', '.join(known)}")
    return kind(**values)


def _check_keys(values: Any, known: Sequence[str], place: str) -> None:
    if not isinstance(values, Mapping):
        raise UserValueError(f"{place} must map keys to values, got {values!r}")
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserValueError(f"unknown key {', '.join(map(str, unknown))} in {place}; there are {', '.join(known)}")


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings and cells are merged key by key, everything else is replaced; a cell that is null goes."""
    merged = dict(values)
    for key, change in changes.items():
        if key == "settings":
            merged[key] = {**(values.get(key) or {}), **change}
        elif key == "cells":
            cells = {**(values.get(key) or {}), **change}
            merged[key] = {name: cell for name, cell in cells.items() if cell is not None}
        else:
            merged[key] = change
    return merged
