"""The settings of each auxiliary loss in a validated, frozen dataclass, and the SASFT paper's form as a choice of them.

SASFT's defaults are the form that, of those that need an SAE and no list of tokens, switched least at equal perplexity
in `recipes/experiments/sasft_real_text.yaml` (see docs/results/sasft.md): one readout per
layer, the sum of the target's decoder directions weighted by monolinguality, in standard deviations, at the positions
that predict response tokens. Give it some 32 features of the last layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from types import MappingProxyType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.features.layer_features import ReadoutKind
from qscope_posttrain.sft.loss import Normalization
from qscope_posttrain.sft.masks import Positions
from qscope_posttrain.text.language_labels import same_language
from qscope_posttrain.text.scripts import SCRIPTS_OF_LANGUAGE, scripts_of_name

Threshold = Literal["language_mean", "zero"]
Scale = Literal["raw", "std"]
Combine = Literal["none", "monolinguality", "effect", "uniform"]
PositionWeight = Literal["uniform", "risk"]
TokenNormalization = Literal["token_mean", "paper"]
LanguageOf = Callable[[Mapping[str, Any]], str]

PAPER: Mapping[str, Any] = MappingProxyType(
    {"weight": 1.6e-2, "readout": "encoder", "scale": "raw", "combine": "none", "positions": "response"}
)
"""The form of the SASFT paper and the Qwen-Scope report, as options: `SASFTCallback(features, "zh", **PAPER)`. There,
two features on each of the last two layers; its coefficient for Gemma is in effect 0.016, for Llama 0.032."""


@dataclass(frozen=True)
class LossConfig:
    """What the settings of all auxiliary losses have in common: `loss = CE + weight * term`."""

    target: str | None
    """The target language; samples in it contribute nothing"""
    weight: float
    """Factor of the term. With 0 it is measured and logged, and training is untouched bit for bit"""
    normalization: Normalization
    """See `normalisation.Normaliser`"""
    language: str | LanguageOf = "language"
    """Name of the column with a sample's language, "script" to decide by its letters, or any callable(example)"""
    ignore_languages: tuple[str, ...] = ()
    """Further languages, whose samples contribute nothing"""

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
                object.__setattr__(self, option, self._names(option, value))
            if hint is bool and not isinstance(value, bool):
                raise UserTypeError(f"{name}.{option} must be True or False; got {value!r}.")
            if hint is float:
                if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) < float("inf"):
                    raise UserValueError(f"{name}.{option} must be a finite number of at least 0; got {value!r}.")
                object.__setattr__(self, option, float(value))  # a number of numpy is no JSON
        if self.target is not None and self.target in self.ignore_languages:
            raise UserValueError(f"The target language {self.target!r} cannot be in ignore_languages.")

    def _names(self, option: str, value: Any) -> tuple[str, ...]:
        names = isinstance(value, Iterable) and not isinstance(value, str)
        if not names or not all(isinstance(language, str) for language in value):
            raise UserTypeError(f"{type(self).__name__}.{option} must be names such as ('en', 'ko'); got {value!r}.")
        return tuple(value)

    @property
    def anchor(self) -> float:
        """The weight of a KL anchor beside the term: `anchor_weight` of the settings that have one, or else 0."""
        return float(getattr(self, "anchor_weight", 0.0))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a callable `language` by its qualified name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
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
    """Language to keep out of responses in other languages; samples of this language contribute nothing"""
    weight: float = 0.1
    """lambda, for readouts in standard deviations. Of the paper's form: the published 5e-4 (Gemma) and 1e-3 (Llama)
    were multiplied by 32 accumulation steps, in effect 0.016 and 0.032"""
    layers: tuple[int, ...] | None = None
    """Decoder layers, counted from 0; None takes all layers of the FeatureSet"""
    top: int | None = None
    """Rows per layer, by score; None takes all rows of the target language"""
    readout: ReadoutKind = "decoder"
    """encoder: f = h . W_enc + b_enc, the paper's pre-activation; decoder: f = h . W_dec. Equal for free directions"""
    threshold: Threshold = "language_mean"
    """language_mean: alpha_js = mean of f_s over language j (SASFT); zero: alpha = 0 (SASFT_zero)"""
    scale: Scale = "std"
    """raw: sigma = 1; std: sigma_s = standard deviation of f_s over the tokens of all non-target languages"""
    combine: Combine = "monolinguality"
    """none: each row has its own ReLU. Otherwise ONE readout per layer, f = sum_i w_i f_i with w_i >= 0 that sum to 1:
    monolinguality: w ~ ReLU(nu_i); effect: w ~ ReLU(W_dec_i . g), g the gradient of log P(target); uniform: w = 1/F.
    A single row is its own sum"""
    positions: Positions = "predicting"
    """predicting: the positions that predict response tokens; response: those of the response tokens (published)"""
    position_weight: PositionWeight = "uniform"
    """uniform: w_t = 1; risk: w_t = P_t / mean P over the penalised positions of the micro-batch, where P_t is the
    model's probability of a target token after position t; no gradient. Needs target_token_ids. Not for data whose
    responses switch themselves: there it spoils the target language (recipes/experiments/sasft_contaminated.yaml)"""
    anchor_weight: float = 0.0
    """b of the term b * sum_t KL(start_t || model_t) over non-target positions that predict a response token,
    normalised like the penalty; both distributions without target_token_ids where these are given"""
    normalization: Normalization = "token_mean"
    """token_mean: like TRL's cross-entropy; paper: mean over penalised tokens; official: as published"""
    ignore_languages: tuple[str, ...] = ()
    """Languages of samples that are neither target nor in the FeatureSet: they contribute nothing"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers()
        if self.normalization == "official" and (self.needs_logits or self.positions != "response"):
            raise UserValueError(
                'normalization="official" is the published code, which has no risk weights, no anchor and unshifted '
                'positions="response"; use "token_mean" or "paper" with them, or the options in sft.config.PAPER.'
            )

    def _check_numbers(self) -> None:
        """Layers and top as Python integers: YAML and command lines give lists, and numpy integers are no JSON."""
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

    @property
    def needs_logits(self) -> bool:
        return self.position_weight == "risk" or self.anchor_weight > 0


@dataclass(frozen=True)
class TokenPenaltyConfig(LossConfig):
    """Settings of the token penalty: `loss = CE + weight * sum_t -log(1 - P_t) / N`.

    P_t is the model's probability of a token of the target language after position t, over the positions that predict
    a response token of a sample in another language; N as in `normalisation.Normaliser`.
    """

    target: str = "zh"
    """Language to keep out of responses in other languages; samples of this language contribute nothing"""
    weight: float = 20.0
    """In units of its own, not SASFT's: 20 to 25 did best alone, 40 with an anchor (docs/results/sasft.md)"""
    anchor_weight: float = 0.0
    """b of the term b * sum_t KL(start_t || model_t) over the same positions, normalised like the penalty; both
    distributions without the target's tokens. 1.0 in our experiments"""
    normalization: TokenNormalization = "token_mean"
    """token_mean: like TRL's cross-entropy; paper: mean over penalised tokens"""
    skip_target_labels: bool = True
    """Leave out positions whose label is a target token (they stay in N). There the cross-entropy asks for what the
    penalty forbids, with an unbounded gradient: on data with responses that switch, this ruins the target language"""
    languages: tuple[str, ...] | None = None
    """Languages of the training data, the target among them; None: any known code"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_target(self.target, self.languages)


@dataclass(frozen=True)
class KLAnchorConfig(LossConfig):
    """Settings of the KL anchor alone: `loss = CE + weight * sum_t KL(start_t || model_t) / N`.

    Over the positions that predict a response token; N as in `normalisation.Normaliser`.
    """

    target: str | None = None
    """Language that is not held: its samples contribute nothing, and its tokens are left out of both distributions.
    None holds responses in every language, and no sample's language is looked at"""
    weight: float = 1.0
    """b; 1.0 in our experiments"""
    normalization: TokenNormalization = "token_mean"
    """token_mean: like TRL's cross-entropy; paper: mean over the positions that are held"""
    languages: tuple[str, ...] | None = None
    """With a target: languages of the training data, the target among them; None: any known code"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is None and (self.languages is not None or self.ignore_languages):
            raise UserValueError(
                "KLAnchorConfig without a target looks at no sample's language, so languages and ignore_languages "
                "would do nothing; give a target, or leave them out."
            )
        if self.target is not None:
            _check_target(self.target, self.languages)


def known_languages(config: TokenPenaltyConfig | KLAnchorConfig) -> tuple[str, ...]:
    """The languages that training data may be in, the target first where `config` lists none.

    Without a list any known code is another language than the target. By script alone the languages that share one
    cannot be told apart, so that one stands for each script, and the target for its own.
    """
    if config.target is None or config.languages is not None:
        return config.languages or ()
    named = (config.target, *config.ignore_languages)
    codes = {*named, *(same_language(name, SCRIPTS_OF_LANGUAGE) for name in named)}
    others = list(SCRIPTS_OF_LANGUAGE)
    if config.language == "script":
        seen = {script for name in named for script in scripts_of_name(name)}
        others = ["zh", "ja"]  # they share a script, and kana tell them apart
        for code in ("en", "ru", "ar", "hi", *SCRIPTS_OF_LANGUAGE):
            scripts = SCRIPTS_OF_LANGUAGE[code]
            if len(scripts) == 1 and scripts[0] not in {*seen, "Han"}:
                others.append(code)
                seen.update(scripts)
    return (config.target, *(code for code in others if code not in codes))


def _check_target(target: str, languages: tuple[str, ...] | None) -> None:
    if languages is not None and target not in languages:
        raise UserValueError(f"The target {target!r} is not among the languages {', '.join(languages)}.")
