"""Chosen feature rows of one layer, with the statistics behind the mean and variance of any linear readout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError

ReadoutKind = Literal["encoder", "decoder"]

FREE_DIRECTION = -1  # Feature id of a row that is no feature of an SAE: a probe, a sum of features

PER_ROW = ("feature_ids", "encoder", "encoder_bias", "decoder", "scores", "effects")
PER_LANGUAGE_AND_ROW = ("mean_activation", "firing_rate", "encoder_mean", "decoder_mean")
COVARIANCES = ("encoder_covariance", "decoder_covariance")
TENSOR_FIELDS = (*PER_ROW, *PER_LANGUAGE_AND_ROW, *COVARIANCES, "tokens", "mean_residual")

MAY_BE_UNMEASURED = frozenset(
    {"scores", "effects", "mean_activation", "firing_rate", "encoder_covariance", "decoder_covariance"}
)  # Fields in which NaN means "not measured". Everywhere else NaN is an error, and infinity is one everywhere.


class Readout(NamedTuple):
    """F affine functions of the residual stream, `h @ rows.T + bias`, and their first two moments per language."""

    rows: Tensor  # [F, d_model]
    bias: Tensor  # [F]
    mean: Tensor  # [L, F] mean over the tokens of each language
    covariance: Tensor  # [L, F, F] covariance over the tokens of each language (divided by the number of tokens)


@dataclass(frozen=True, eq=False)
class LayerFeatures:
    """F rows of one layer: SAE features, or free directions that stand in for them.

    Shapes use F rows, L languages (in the order of the FeatureSet's `languages`) and d = d_model. Tensors live on
    the CPU in fp32, ids and token counts in int64. Residual units are raw: layer n is the output of decoder layer n.
    """

    feature_ids: Tensor  # [F] int64: index in the SAE, or -1 for a free direction
    labels: tuple[str, ...]  # The language that each row stands for
    names: tuple[str, ...]  # Name of each row in a table, for example `zh #416` or `zh difference of means`
    encoder: Tensor  # [F, d]: rows of W_enc; of a free direction the direction itself
    encoder_bias: Tensor  # [F]; 0 for a free direction
    decoder: Tensor  # [F, d]: rows of W_dec; of a free direction the direction itself
    scores: Tensor  # [F] monolinguality nu for the row's label (see `build.monolinguality`)
    effects: Tensor  # [F] decoder . g with g the mean gradient of log P(label) (`causal.effect_gradients`)
    mean_activation: Tensor  # [L, F] mean post-activation over tokens; NaN for a free direction
    firing_rate: Tensor  # [L, F] share of tokens with a non-zero post-activation; NaN for a free direction
    tokens: Tensor  # [L] int64: tokens behind the statistics, without first tokens and norm outliers
    mean_residual: Tensor  # [L, d]
    residual_median_norm: float  # Median L2 norm of the calibration sample's residual vectors: the unit of strengths
    encoder_mean: Tensor  # [L, F] mean of h . encoder + encoder_bias: SASFT's alpha
    encoder_covariance: Tensor  # [L, F, F] covariance of that readout
    decoder_mean: Tensor  # [L, F] mean of h . decoder
    decoder_covariance: Tensor  # [L, F, F] covariance of that readout

    def __post_init__(self) -> None:
        if self.encoder.dim() != 2 or self.mean_activation.dim() != 2:
            raise UserValueError(
                "LayerFeatures expects encoder [F, d_model] and mean_activation [L, F], "
                f"got {list(self.encoder.shape)} and {list(self.mean_activation.shape)}."
            )
        if len(self) == 0:
            raise UserValueError("LayerFeatures needs at least one row.")
        for name, shape in self.expected_shapes(len(self), len(self.mean_activation), self.d_model).items():
            _check_tensor(name, getattr(self, name), shape)
        if len(self.labels) != len(self) or len(self.names) != len(self):
            raise UserValueError(
                f"{len(self)} rows need as many labels and names, got {len(self.labels)} and {len(self.names)}."
            )
        if int(self.feature_ids.min()) < FREE_DIRECTION:
            raise UserValueError(
                f"Feature ids start at 0 (or -1 for a free direction), got {self.feature_ids.tolist()}."
            )
        if int(self.tokens.min()) < 0:
            raise UserValueError(f"Token counts cannot be negative, got {self.tokens.tolist()}.")
        if math.isinf(self.residual_median_norm) or self.residual_median_norm <= 0:
            raise UserValueError(f"residual_median_norm must be a positive number, got {self.residual_median_norm}.")

    def __len__(self) -> int:
        return len(self.encoder)

    @property
    def d_model(self) -> int:
        return self.encoder.shape[1]

    @staticmethod
    def expected_shapes(rows: int, languages: int, d_model: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor field."""
        return {
            **dict.fromkeys(PER_ROW, (rows,)),
            **dict.fromkeys(PER_LANGUAGE_AND_ROW, (languages, rows)),
            **dict.fromkeys(COVARIANCES, (languages, rows, rows)),
            "encoder": (rows, d_model),
            "decoder": (rows, d_model),
            "tokens": (languages,),
            "mean_residual": (languages, d_model),
        }

    def readout(self, kind: ReadoutKind) -> Readout:
        """The rows as affine functions of the residual stream.

        "encoder": f = h . W_enc + b_enc, the pre-activation that the SASFT paper penalizes.
        "decoder": f = h . W_dec, the projection on the direction that the feature writes; it has no bias.
        """
        if kind == "encoder":
            return Readout(self.encoder, self.encoder_bias, self.encoder_mean, self.encoder_covariance)
        if kind == "decoder":
            no_bias = torch.zeros_like(self.encoder_bias)
            return Readout(self.decoder, no_bias, self.decoder_mean, self.decoder_covariance)
        raise UserValueError(f'A readout is "encoder" or "decoder", got {kind!r}.')

    def pooled_std(self, kind: ReadoutKind, languages: Sequence[int], weights: Tensor | None = None) -> Tensor:
        """Standard deviation of a readout over all tokens of the given languages (indices), token weighted.

        Total variance, within and between languages: `sum_l p_l (w' C_l w + (w' m_l - w' m)^2)` with p_l the share
        of tokens, m_l and C_l mean and covariance in language l. Returns [F], or with `weights` [F] the scalar
        standard deviation of `sum_i weights_i f_i`, exact because it includes the covariances. fp64.
        """
        readout = self.readout(kind)
        index = torch.as_tensor(list(languages), dtype=torch.long)
        tokens = self.tokens[index].double()
        if index.numel() == 0 or float(tokens.sum()) == 0:
            raise UserValueError(f"No tokens to pool over: languages {list(languages)} of {len(self.tokens)}.")
        mean, covariance = readout.mean[index].double(), readout.covariance[index].double()
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        if weights is not None:
            weights = _check_weights(weights, len(self))
            mean, variance = mean @ weights, torch.einsum("lij,i,j->l", covariance, weights, weights)
        if bool(variance.isnan().any()):
            raise UserValueError(
                "These features hold no covariances, so standard deviations are unknown. "
                'Find them again with second_moments=True, or use scale="raw".'
            )
        share = tokens / tokens.sum()
        between = (mean - share @ mean).square()
        return (share @ (variance + between)).clamp_min(0).sqrt()

    def take(self, rows: Sequence[int] | Tensor) -> LayerFeatures:
        """The given rows (positions, not feature ids), in the given order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        picked = index.tolist()
        changes: dict[str, Any] = {name: getattr(self, name)[index] for name in PER_ROW}
        changes |= {name: getattr(self, name)[:, index] for name in PER_LANGUAGE_AND_ROW}
        changes |= {name: getattr(self, name)[:, index][:, :, index] for name in COVARIANCES}
        labels = tuple(self.labels[i] for i in picked)
        return replace(self, labels=labels, names=tuple(self.names[i] for i in picked), **changes)

    def combine(self, weights: Tensor, name: str, label: str | None = None) -> LayerFeatures:
        """ONE row whose encoder, bias and decoder are the weighted sums of these rows.

        Means, covariances, scores and effects follow exactly by linearity; `mean_activation` is the mean of the
        weighted sum of activations. The firing rate of a sum is not determined by these statistics: NaN.
        `weights` [F]; `label` defaults to the common label of the rows.
        """
        weights = _check_weights(weights, len(self))
        if label is None:
            if len(set(self.labels)) > 1:
                raise UserValueError(
                    f"Rows of several languages ({', '.join(sorted(set(self.labels)))}) need a label for their sum: "
                    "pass label=, or select(language=...) first."
                )
            label = self.labels[0]

        def summed(value: Tensor, dim: int) -> Tensor:
            return torch.tensordot(value.double(), weights, dims=([dim], [0])).unsqueeze(dim).float()

        def squared(covariance: Tensor) -> Tensor:
            return torch.einsum("lij,i,j->l", covariance.double(), weights, weights)[:, None, None].float()

        changes: dict[str, Any] = {field: summed(getattr(self, field), 0) for field in PER_ROW}
        changes |= {field: summed(getattr(self, field), 1) for field in PER_LANGUAGE_AND_ROW}
        changes |= {field: squared(getattr(self, field)) for field in COVARIANCES}
        changes["feature_ids"] = torch.tensor([FREE_DIRECTION])
        changes["firing_rate"] = torch.full_like(changes["mean_activation"], math.nan)
        return replace(self, labels=(label,), names=(name,), **changes)


def _check_tensor(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    dtype = torch.int64 if name in ("feature_ids", "tokens") else torch.float32
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UserValueError(f"LayerFeatures.{name} must be {dtype} {list(shape)}, got {found}.")
    if value.device.type != "cpu":
        raise UserValueError(f"LayerFeatures.{name} must be on the CPU, got {value.device}.")
    if dtype == torch.float32:
        bad = value.isinf() if name in MAY_BE_UNMEASURED else ~value.isfinite()
        if bool(bad.any()):
            raise UserValueError(f"LayerFeatures.{name} holds {int(bad.sum())} values that are not finite numbers.")


def _check_weights(weights: Tensor, rows: int) -> Tensor:
    weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if tuple(weights.shape) != (rows,) or not bool(weights.isfinite().all()):
        raise UserValueError(f"Expected {rows} finite weights, one per row, got {weights.tolist()}.")
    return weights
