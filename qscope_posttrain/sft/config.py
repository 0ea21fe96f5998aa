"""All settings of SASFT in one validated, frozen dataclass, and the paper's form as one choice of them.

The defaults are the form that, of those that need an SAE and no list of tokens, switched least at equal perplexity in
`recipes/experiments/sasft_real_text.yaml` (see the README's table "at 1 % masked perplexity"): one readout per layer,
the sum of the target's decoder directions weighted by monolinguality, in standard deviations, at the positions that
predict response tokens. Give it some 32 features of the last layer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.features.layer_features import ReadoutKind
from qscope_posttrain.sft.loss import Normalization
from qscope_posttrain.sft.masks import Positions

Threshold = Literal["language_mean", "zero"]
Scale = Literal["raw", "std"]
Combine = Literal["none", "monolinguality", "effect", "uniform"]
PositionWeight = Literal["uniform", "risk"]
LanguageOf = Callable[[Mapping[str, Any]], str]

PAPER: Mapping[str, Any] = MappingProxyType(
    {"weight": 1.6e-2, "readout": "encoder", "scale": "raw", "combine": "none", "positions": "response"}
)
"""The form of the SASFT paper and the Qwen-Scope report, as options: `SASFTCallback(features, "zh", **PAPER)`. There,
two features on each of the last two layers; its coefficient for Gemma is in effect 0.016, for Llama 0.032."""


@dataclass(frozen=True)
class SASFTConfig:
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
    language: str | LanguageOf = "language"
    """Name of the column with a sample's language, "script" to decide by its letters, or any callable(example)"""
    ignore_languages: tuple[str, ...] = ()
    """Languages of samples that are neither target nor in the FeatureSet: they contribute nothing"""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                listed = ", ".join(map(repr, choices))
                raise UserValueError(f"SASFTConfig.{name} must be one of {listed}; got {getattr(self, name)!r}.")
        for name in ("weight", "anchor_weight"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise UserValueError(f"SASFTConfig.{name} must be a finite number of at least 0; got {value!r}.")
        self._check_numbers()
        if self.normalization == "official" and (self.needs_logits or self.positions != "response"):
            raise UserValueError(
                'normalization="official" is the published code, which has no risk weights, no anchor and unshifted '
                'positions="response"; use "token_mean" or "paper" with them, or the options in sft.config.PAPER.'
            )
        object.__setattr__(self, "ignore_languages", tuple(self.ignore_languages))
        if self.target in self.ignore_languages:
            raise UserValueError(f"The target language {self.target!r} cannot be in ignore_languages.")

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

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a callable `language` by its qualified name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if callable(self.language):
            module = getattr(self.language, "__module__", "")
            values["language"] = f"{module}.{getattr(self.language, '__qualname__', type(self.language).__qualname__)}"
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


_CHOICES: dict[str, tuple[Any, ...]] = {
    "readout": get_args(ReadoutKind),
    "threshold": get_args(Threshold),
    "scale": get_args(Scale),
    "combine": get_args(Combine),
    "positions": get_args(Positions),
    "position_weight": get_args(PositionWeight),
    "normalization": get_args(Normalization),
}
