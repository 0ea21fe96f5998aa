"""The part of a recipe that sets the loss: its method, the method's options by their keys, and the callback of them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import UserValueError, did_you_mean
from qscope_posttrain.recipe_file import read_yaml

if TYPE_CHECKING:
    from qscope_posttrain.features.feature_set import FeatureSet
    from qscope_posttrain.sft.attachment import AuxiliaryLossCallback
    from qscope_posttrain.sft.config import LossConfig

CONFIGS = "qscope_posttrain.sft.config"
METHODS = {
    "sasft": ("SASFTConfig", "sasft_"),
    "token_penalty": ("TokenPenaltyConfig", "token_penalty_"),
    "kl_anchor": ("KLAnchorConfig", "anchor_"),
}
"""Method -> the class of its settings in `sft.config`, and the prefix of their keys"""
ANCHOR_WEIGHT = "anchor_weight"
"""The key of every method with an anchor; `sasft_anchor_weight` and `token_penalty_anchor_weight` are the same"""


@dataclass(frozen=True)
class LossSettings:
    """Settings of the loss for a trainer of another framework."""

    method: str
    features: str | None  # FeatureSet file; None where the method needs none
    config: LossConfig

    @classmethod
    def load(cls, path: str | os.PathLike[str], language: str | None = None) -> LossSettings:
        """Read a YAML file of those keys; see `read`."""
        written = read_yaml(path, as_written=True)
        truths = {prefix + name for prefix, options in _options() for name in options if options[name].type == "bool"}

        def meant(key: str, value: Any, text: Any) -> Any:
            if isinstance(value, list) and isinstance(text, list) and len(value) == len(text):
                return [meant(key, *pair) for pair in zip(value, text, strict=True)]
            # The language no is a truth value to YAML.
            return text if isinstance(value, bool) and key not in truths else value

        return cls.read(
            {key: meant(key, value, written[key]) for key, value in read_yaml(path).items()}, str(path), language
        )

    @classmethod
    def read(cls, values: Mapping[str, Any], place: str, language: str | None = None) -> LossSettings:
        """Read the keys of a recipe of `qscope sft` that concern the loss, and no others.

        Args:
            values: `method`, `features`, and the method's options by their keys, such as sasft_weight.
            place: where they stand, for messages.
            language: the default of the method's option `language`; None is that of `LossConfig`.

        Raises:
            ValueError: an unknown key, a key of another method, a wrong value, or features missing or too many.
        """
        options = dict(values)
        method, features = options.pop("method", "sasft"), options.pop("features", None)
        if method not in METHODS:
            hint = " For training without a penalty, leave the callback out." if method == "sft" else ""
            raise UserValueError(f"{place}: method must be one of {', '.join(METHODS)}; got {method!r}.{hint}")
        if method == "sasft" and not isinstance(features, str):
            raise UserValueError(
                f"{place}: method sasft needs 'features', a file written by `qscope features find`; got {features!r}."
            )
        if method != "sasft" and features is not None:
            raise UserValueError(f"{place}: method {method} uses no features; leave 'features' out.")
        known = {prefix + name for prefix, names in _options() for name in names} | {ANCHOR_WEIGHT}
        if unknown := [str(key) for key in options if key not in known]:
            hint = did_you_mean(unknown[0], ["method", "features", *sorted(known)])
            raise UserValueError(
                f"{place}: unknown key {', '.join(map(repr, unknown))}.{hint} Known are method, features, and the "
                "options of a method (sasft_..., token_penalty_..., anchor_...); everything else about the training "
                "belongs to the framework's own settings."
            )
        if language is not None:
            options.setdefault(METHODS[method][1] + "language", language)
        try:
            return cls(method, features, method_config(method, options))
        except (ValueError, TypeError) as error:
            raise UserValueError(f"{place}: {error}") from error

    def callback(self) -> AuxiliaryLossCallback:
        """The callback with these settings; ValueError or FileNotFoundError for features that do not fit."""
        return make_callback(self.method, self.config, self.features)


def make_callback(method: str, config: Any, features: FeatureSet | str | None) -> AuxiliaryLossCallback:
    """The callback of a method.

    Raises:
        ValueError: features and options that do not fit, or method sasft without features.
    """
    from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
    from qscope_posttrain.sft.callback import SASFTCallback

    if method == "token_penalty":
        return TokenPenaltyCallback(config=config)
    if method == "kl_anchor":
        return KLAnchorCallback(config=config)
    if features is None:
        raise UserValueError("method sasft needs 'features'.")
    return SASFTCallback(features, config=config)


def config_class(method: str) -> type[LossConfig]:
    """The class of the settings of a method."""
    kind: type[LossConfig] = getattr(importlib.import_module(CONFIGS), METHODS[method][0])
    return kind


def method_config(method: str, given: Mapping[str, Any], said: Collection[str] = ()) -> LossConfig:
    """The settings of a method from the keys that were given; those in `said` are from the command line.

    Raises:
        ValueError: a key of another method, the same option by two keys, or a wrong value.
    """
    kind, prefix = config_class(method), METHODS[method][1]
    keys = {prefix + name: name for name in kind.__dataclass_fields__}
    if prefix + ANCHOR_WEIGHT in keys:
        keys[ANCHOR_WEIGHT] = ANCHOR_WEIGHT
    foreign = [key for key in given if key not in keys]
    if foreign:
        raise UserValueError(" ".join(_not_of(method, key, keys) for key in foreign))
    values: dict[str, Any] = {}
    by_key: dict[str, str] = {}
    for key in sorted(given, key=lambda key: key not in said):
        name, value = keys[key], given[key]
        other = by_key.setdefault(name, key)
        if other in said and key not in said:
            continue  # the command line goes before the file
        if other != key and values[name] != value:
            raise UserValueError(
                f"'{prefix}{name}' and '{name}' are the same option; got {values[name]!r} and {value!r}. Give one."
            )
        values[name] = value
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise UserValueError(f"{error} (In recipes these options begin with '{prefix}'.)") from error


def _options() -> list[tuple[str, Mapping[str, Field[Any]]]]:
    """(prefix, options) of every method"""
    return [(prefix, config_class(name).__dataclass_fields__) for name, (_, prefix) in METHODS.items()]


def _not_of(method: str, key: str, keys: dict[str, str]) -> str:
    """A sentence about a key that another method uses."""
    owner, prefix = next((name, prefix) for name, (_, prefix) in METHODS.items() if key.startswith(prefix))
    same = METHODS[method][1] + key.removeprefix(prefix)
    hint = f" Did you mean '{same}'?" if same in keys else did_you_mean(key, sorted(keys))
    return f"method {method} does not use '{key}', a key of method {owner}.{hint or ' Leave it out.'}"
