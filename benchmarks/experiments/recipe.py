"""An experiment as a YAML file: which cells, pretrained models, arms, coefficients and seeds are compared.

kind: switching                     # or repetition
title: SASFT on real text
question: What the experiment is to find out.
settings: {corpus: ../shared/data/react_docs}      # fields of SwitchingConfig or RepetitionConfig
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
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from benchmarks.experiments.arms import REPETITION_ARMS, SWITCHING_ARMS
from benchmarks.experiments.probes import ProbedConfig
from benchmarks.testbed.switching.config import Arm, SwitchingConfig
from qscope_posttrain.errors import UserError, UserValueError, did_you_mean
from qscope_posttrain.recipe_file import read_yaml

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
    settings: SwitchingConfig
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
    settings: ProbedConfig
    bases: tuple[int, ...]
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    """Beside plain DAPO, which always runs."""


@dataclass(frozen=True)
class ExperimentRecipe:
    """The content of a recipe file, checked."""

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
    except UserError as error:
        raise UserValueError(f"{path}: {error}") from error


def build_recipe(
    content: Mapping[str, Any], variant: str | None = None, settings: Mapping[str, Any] | None = None
) -> ExperimentRecipe:
    """A recipe from what its file holds; see `load_recipe`."""
    _check_keys(content, _KEYS, "the recipe")
    variants = _mapping(content.get("variants"), "variants")
    if variant is not None and variant not in variants:
        known = [str(name) for name in variants]
        raise UserValueError(
            f"no variant named {variant!r}; there are {', '.join(known) or 'none'}.{did_you_mean(variant, known)}"
        )
    merged = {key: value for key, value in content.items() if key != "variants"}
    if variant is not None:
        _check_keys(variants[variant], _KEYS[1:-1], f"variant {variant!r}")
        merged = _merge(merged, variants[variant])
    kind = merged.get("kind")
    if kind not in (SWITCHING, REPETITION):
        raise UserValueError(f'kind must be "{SWITCHING}" or "{REPETITION}", got {kind!r}')
    cells = _mapping(merged.get("cells"), "cells") or {"all": {}}
    build = _switching_cell if kind == SWITCHING else _repetition_cell
    built = tuple(
        build(str(name), _cell_values(merged, name, cell or {}, settings or {})) for name, cell in cells.items()
    )
    return ExperimentRecipe(kind, str(merged.get("title", "")), str(merged.get("question", "")).strip(), built, merged)


def _cell_values(
    content: Mapping[str, Any], name: str, cell: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge the recipe's values with those of one cell; arms of a cell replace the recipe's, settings are merged."""
    _check_keys(cell, _CELL_KEYS, f"cell {name!r}")
    values = {"title": str(name), **{key: content[key] for key in _CELL_KEYS[1:] if key in content}, **cell}
    own, place = cell.get("settings"), f"settings of cell {name!r}"
    values["settings"] = {**_mapping(content.get("settings"), "settings"), **_mapping(own, place), **settings}
    for key in ("bases", "seeds"):
        numbers = values.get(key)
        if not numbers or not _fits(numbers, list[int]) or len(set(numbers)) != len(numbers):
            raise UserValueError(f"cell {name!r}: {key} must be a list of different whole numbers, got {numbers!r}")
    misplaced = sorted(set(values["settings"]) & set(_GIVEN_BY_THE_RECIPE))
    if misplaced:
        raise UserValueError(f"cell {name!r}: {', '.join(misplaced)} are no settings; use bases, seeds and arms")
    return values


def _switching_cell(name: str, values: Mapping[str, Any]) -> SwitchingCell:
    arms = values.get("arms") or {}
    arms = dict.fromkeys(arms) if _fits(arms, list[str]) else _mapping(arms, f"arms of cell {name!r}")
    weighted = tuple(_weighted_arm(str(key), spec) for key, spec in arms.items() if key != "sft")
    settings = _settings(SwitchingConfig, values["settings"], name)
    return SwitchingCell(name, values["title"], settings, tuple(values["bases"]), tuple(values["seeds"]), weighted)


def _repetition_cell(name: str, values: Mapping[str, Any]) -> RepetitionCell:
    arms = values.get("arms") or []
    if not _fits(arms, list[str]):
        raise UserValueError(f"cell {name!r}: arms must be a list of names, got {arms!r}")
    unknown = sorted(set(arms) - set(REPETITION_ARMS))
    if unknown:
        raise UserValueError(
            f"cell {name!r}: unknown arms {', '.join(unknown)}; there are {', '.join(REPETITION_ARMS)}"
        )
    settings = _settings(ProbedConfig, values["settings"], name)
    return RepetitionCell(name, values["title"], settings, tuple(values["bases"]), tuple(values["seeds"]), tuple(arms))


def _weighted_arm(name: str, spec: Any) -> WeightedArm:
    """Read an arm as the recipe writes it: nothing, coefficients, or changes to a known arm."""
    changes = dict(spec) if isinstance(spec, dict) else {}
    like, weights = str(changes.pop("like", name)), changes.pop("weights", None)
    if not isinstance(spec, dict):
        weights = spec
    if like not in SWITCHING_ARMS:
        raise UserValueError(f"unknown arm {like!r}; there are {', '.join(SWITCHING_ARMS)}")
    hints = get_type_hints(Arm)
    known = {field.name for field in fields(Arm)} - {"name", "weight", "grid"}
    unknown = sorted(set(changes) - known, key=str)
    if unknown:
        fields_of_arm = ", ".join(["like", "weights", *sorted(known)])
        raise UserValueError(f"arm {name!r}: no field {', '.join(map(str, unknown))}; there are {fields_of_arm}")
    _check_types(changes, hints, f"arm {name!r}")
    base = SWITCHING_ARMS[like]
    if changes and "title" not in changes:
        changes["title"] = name
    if "options" in changes:
        changes["options"] = {**base.options, **changes["options"]}
    arm = replace(base, name=name, **changes)
    chosen = [arm.weight] if weights is None else weights if isinstance(weights, list) else [weights]
    if not chosen or not _fits(chosen, list[float]) or not all(weight >= 0 for weight in chosen):
        raise UserValueError(f"arm {name!r}: weights must be numbers of at least 0, got {weights!r}")
    return WeightedArm(arm, tuple(float(weight) for weight in chosen))


def _settings(kind: type[Any], values: Mapping[str, Any], cell: str) -> Any:
    known = [field.name for field in fields(kind)]
    unknown = sorted(map(str, set(values) - set(known)))
    if unknown:
        hint = did_you_mean(unknown[0], known)
        raise UserValueError(f"cell {cell!r}: no setting {', '.join(unknown)}; there are {', '.join(known)}.{hint}")
    _check_types(values, get_type_hints(kind), f"cell {cell!r}")
    return kind(**values)


def _check_types(values: Mapping[str, Any], hints: Mapping[str, Any], place: str) -> None:
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise UserValueError(
                f"{place}: {name} must be {getattr(hints[name], '__name__', hints[name])}, got {value!r}"
            )


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value from a file has a declared type: a whole number is a number, a truth value is none."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, inner[0]) for entry in value)
    if (origin is not None and not isinstance(origin, type)) or origin is UnionType:
        return any(_fits(value, kind) for kind in inner)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else origin or hint)


def _mapping(value: Any, place: str) -> Mapping[Any, Any]:
    """Return a part of the recipe that maps names to values; null is an empty one."""
    if value is not None and not isinstance(value, Mapping):
        raise UserValueError(f"{place} must map names to values, got {value!r}")
    return value or {}


def _check_keys(values: Any, known: Sequence[str], place: str) -> None:
    if not isinstance(values, Mapping):
        raise UserValueError(f"{place} must map keys to values, got {values!r}")
    unknown = sorted(map(str, set(values) - set(known)))
    if unknown:
        hint = did_you_mean(unknown[0], known)
        raise UserValueError(f"unknown key {', '.join(unknown)} in {place}; there are {', '.join(known)}.{hint}")


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings and cells key by key and replace everything else; a cell that is null is removed."""
    merged = dict(values)
    for key, change in changes.items():
        if key == "settings":
            merged[key] = {**_mapping(values.get(key), key), **_mapping(change, key)}
        elif key == "cells":
            cells = {**_mapping(values.get(key), key), **_mapping(change, key)}
            merged[key] = {name: cell for name, cell in cells.items() if cell is not None}
        else:
            merged[key] = change
    return merged
