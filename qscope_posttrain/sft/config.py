"""Settings of each auxiliary loss: validated, frozen dataclasses, and the SASFT paper's form as a choice of them.

SASFT's defaults are the form that reduced switching most at equal perplexity, of those that need an SAE and no list of
tokens (docs/results/sasft.md): per layer the sum of the target's decoder directions weighted by
monolinguality, in standard deviations, at the positions that predict response tokens. Give it some 32 features of the
last layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from types import MappingProxyType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qscope_posttrain.errors import UserTypeError, UserValueError, did_you_mean
from qscope_posttrain.features.layer_features import ReadoutKind
from qscope_posttrain.sft.loss import Normalization
from qscope_posttrain.sft.masks import Positions
from qscope_posttrain.text.scripts import SCRIPTS_OF_LANGUAGE, same_language, scripts_of_name

Threshold = Literal["language_mean", "zero"]
Scale = Literal["raw", "std"]
Combine = Literal["none", "monolinguality", "effect", "uniform"]
TokenNormalization = Literal["token_mean", "paper"]
LanguageOf = Callable[[Mapping[str, Any]], str]
Config = TypeVar("Config", bound="LossConfig")

PAPER: Mapping[str, Any] = MappingProxyType(
    {"weight": 1.6e-2, "readout": "encoder", "scale": "raw", "combine": "none", "positions": "response"}
)
"""The form of the SASFT paper and the Qwen-Scope report, as options: `SASFTCallback(features, "zh", **PAPER)`. There,
two features on each of the last two layers; its coefficient for Gemma is in effect 0.016, for Llama 0.032."""


@dataclass(frozen=True)
class LossConfig:
    """Settings that all auxiliary losses share: `loss = CE + weight * term`."""

    target: str | None
    weight: float
    normalization: Normalization
    language: str | LanguageOf = "language"
    """Column with a sample's language, 'script' to decide by its letters, or, in Python, a callable(example)."""
    ignore_languages: tuple[str, ...] = ()
    """Further languages that the data may hold, whose samples contribute nothing."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        for option, hint in get_type_hints(type(self)).items():
            value = getattr(self, option)
            if get_origin(hint) is Literal and value not in get_args(hint):
                listed = ", ".join(map(repr, get_args(hint)))
                raise UserValueError(f"{name}.{option} must be one of {listed}; got {value!r}.")
            if get_origin(hint) in (Union, UnionType) and value is None:
                continue
            if option.endswith("languages"):
                names = isinstance(value, Iterable) and not isinstance(value, str)
                if not names or not all(isinstance(language, str) for language in value):
                    raise UserTypeError(f"{name}.{option} must be names such as ('en', 'ko'); got {value!r}.")
                object.__setattr__(self, option, tuple(value))
            if hint is bool and not isinstance(value, bool):
                raise UserTypeError(f"{name}.{option} must be True or False; got {value!r}.")
            if hint is float:
                if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < float("inf"):
                    raise UserValueError(f"{name}.{option} must be a finite number of at least 0; got {value!r}.")
                object.__setattr__(self, option, float(value))  # a number of numpy is no JSON
        if self.target is not None and self.target in self.ignore_languages:
            raise UserValueError(f"The target language {self.target!r} cannot be in ignore_languages.")
        known: tuple[str, ...] | None = getattr(self, "languages", None)
        if self.target is not None and known is not None and self.target not in known:
            raise UserValueError(f"The target {self.target!r} is not among the languages {', '.join(known)}.")

    @classmethod
    def of(cls: type[Config], config: Config | None, **options: Any) -> Config:
        """`config`, or one made of `options`.

        Raises:
            TypeError: an unknown option, options beside a config, or a config of another kind.
        """
        known = cls.__dataclass_fields__
        for name in options:
            if name not in known:
                hint = did_you_mean(name, known)
                raise UserTypeError(f"{cls.__name__} has no option {name!r}; it has {', '.join(known)}.{hint}")
        if config is None:
            return cls(**options)
        if not isinstance(config, cls):
            raise UserTypeError(f"config must be a {cls.__name__}; got {type(config).__name__}.")
        given = [name for name, value in options.items() if value is not known[name].default]
        if given:
            raise UserTypeError(f"Give {', '.join(given)} in the config, or leave the config out; got both.")
        return config

    @property
    def anchor(self) -> float:
        """The weight of a KL anchor beside the term: `anchor_weight` of the settings that have one, or else 0."""
        return float(getattr(self, "anchor_weight", 0.0))

    @property
    def needs_logits(self) -> bool:
        """Whether the model's logits are computed."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a callable `language` by its qualified name."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        if callable(self.language):
            module = getattr(self.language, "__module__", "")
            values["language"] = f"{module}.{getattr(self.language, '__qualname__', type(self.language).__qualname__)}"
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class SASFTConfig(LossConfig):
    """Settings of the SASFT penalty: `loss = CE + weight * sum over layers of the penalty` (see `sft.loss`).

    Per layer, for a token whose sample is in language j, the excess of readout s is
    `ReLU((f_s(x) - alpha_js) / sigma_s)`: f is chosen by `readout`, alpha by `threshold`, sigma by `scale`.
    """

    target: str = "zh"
    """Language to keep out of responses in other languages; samples in it contribute nothing."""
    weight: float = 0.1
    """lambda, for readouts in standard deviations. 0 only measures: training is untouched."""
    layers: tuple[int, ...] | None = None
    """Decoder layers, counted from 0. None: all layers of the FeatureSet."""
    top: int | None = None
    """Features per layer, by score. None: all of the target language."""
    readout: ReadoutKind = "decoder"
    """encoder: f = h . W_enc + b_enc, as in the paper; decoder: f = h . W_dec."""
    threshold: Threshold = "language_mean"
    """language_mean: alpha_js = mean of f_s over language j; zero: alpha = 0."""
    scale: Scale = "std"
    """raw: sigma = 1; std: standard deviation of f_s over all non-target tokens."""
    combine: Combine = "monolinguality"
    """none: each feature has its own ReLU. Otherwise ONE readout per layer, f = sum_i w_i f_i with w_i >= 0 that sum to
    1: monolinguality: w ~ ReLU(nu_i); effect: w ~ ReLU(W_dec_i . g), g the gradient of log P(target); uniform: w = 1/F.
    A single feature is its own sum."""
    positions: Positions = "predicting"
    """predicting: positions that predict response tokens; response: their own."""
    anchor_weight: float = 0.0
    """b of the term b * sum_t KL(start_t || model_t) over non-target positions that predict a response token,
    normalized like the penalty; both distributions without target_token_ids where these are given."""
    normalization: Normalization = "token_mean"
    """token_mean: divide as TRL divides the cross-entropy; paper: by the number of positions that the loss acts on;
    official: as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # YAML and command lines give lists, and integers of numpy are no JSON.
        try:
            layers = None if self.layers is None else tuple(operator.index(layer) for layer in self.layers)
            top = None if self.top is None else operator.index(self.top)
        except TypeError as error:
            raise UserTypeError(
                "SASFTConfig.layers must be integers, e.g. [26, 27], and top an integer, or None; got "
                f"layers={self.layers!r}, top={self.top!r}."
            ) from error
        if top is not None and top < 1:
            raise UserValueError(f"SASFTConfig.top must be at least 1 or None; got {top}.")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "top", top)
        if self.normalization == "official" and (self.needs_logits or self.positions != "response"):
            raise UserValueError(
                'normalization="official" is the published code, which has no anchor and unshifted '
                'positions="response"; use "token_mean" or "paper" with them, or the options in sft.config.PAPER.'
            )

    @property
    def needs_logits(self) -> bool:
        return self.anchor_weight > 0


@dataclass(frozen=True)
class TokenPenaltyConfig(LossConfig):
    """Settings of the token penalty: `loss = CE + weight * sum_t -log(1 - P_t) / N`.

    P_t is the model's probability of a token of the target language after position t, over the positions that predict
    a response token of a sample in another language; N as in `loss.Normalizer`.
    """

    target: str = "zh"
    """Language to keep out of responses in other languages; samples in it contribute nothing."""
    weight: float = 20.0
    """In units of its own, not SASFT's: 20 to 25 did best alone, 40 with an anchor. 0 only measures."""
    anchor_weight: float = 0.0
    """b of the term b * sum_t KL(start_t || model_t) over the same positions, normalized like the penalty; both
    distributions without the target's tokens. 1.0 in our experiments."""
    normalization: TokenNormalization = "token_mean"
    """token_mean: divide as TRL divides the cross-entropy; paper: by the number of positions that the loss acts on."""
    skip_target_labels: bool = True
    """Leave out positions whose label is a target token (they stay in N). There the cross-entropy asks for what the
    penalty forbids, with an unbounded gradient: on data with responses that switch, this ruins the target language."""
    languages: tuple[str, ...] | None = None
    """Languages of the training data, the target among them. None: any known code."""


@dataclass(frozen=True)
class KLAnchorConfig(LossConfig):
    """Settings of the KL anchor alone: `loss = CE + weight * sum_t KL(start_t || model_t) / N`.

    Over the positions that predict a response token; N as in `loss.Normalizer`.
    """

    target: str | None = None
    """Language that is not held: its samples contribute nothing, and its tokens are left out of both distributions.
    None holds responses in every language, and no sample's language is read."""
    weight: float = 1.0
    """b; 1.0 in our experiments. 0 only measures."""
    normalization: TokenNormalization = "token_mean"
    """token_mean: divide as TRL divides the cross-entropy; paper: by the number of positions that the loss acts on."""
    languages: tuple[str, ...] | None = None
    """With a target: Languages of the training data, the target among them. None: any known code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is None and (self.languages is not None or self.ignore_languages):
            raise UserValueError(
                "KLAnchorConfig without a target reads no sample's language, so languages and ignore_languages "
                "would do nothing; give a target, or leave them out."
            )


def known_languages(config: TokenPenaltyConfig | KLAnchorConfig) -> tuple[str, ...]:
    """The languages that training data may be in, the target first where `config` lists none.

    Without a list any known code is another language than the target. By script alone the languages that share one
    cannot be distinguished, so that one stands for each script, and the target for its own.
    """
    if config.target is None or config.languages is not None:
        return config.languages or ()
    named = (config.target, *config.ignore_languages)
    codes = {*named, *(same_language(name, SCRIPTS_OF_LANGUAGE) for name in named)}
    others = list(SCRIPTS_OF_LANGUAGE)
    if config.language == "script":
        seen = {script for name in named for script in scripts_of_name(name)}
        others = ["zh", "ja"]  # they share a script, and kana distinguish them
        for code in ("en", "ru", "ar", "hi", *SCRIPTS_OF_LANGUAGE):
            scripts = SCRIPTS_OF_LANGUAGE[code]
            if len(scripts) == 1 and scripts[0] not in {*seen, "Han"}:
                others.append(code)
                seen.update(scripts)
    return (config.target, *(code for code in others if code not in codes))
