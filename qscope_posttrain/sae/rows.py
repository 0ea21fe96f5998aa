"""The few rows of a dictionary that training and steering need, read without the dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.sae.checks import check_finite, check_tensor
from qscope_posttrain.sae.source import SAESource


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """Encoder and decoder rows of F features, in raw residual-stream units. Checked on construction."""

    feature_ids: Tensor
    """int64 [F], on the CPU."""
    encoder: Tensor
    """[F, d_model]"""
    encoder_bias: Tensor
    """[F]"""
    decoder: Tensor
    """Directions, [F, d_model]."""
    source: SAESource
    layer: int | None = None

    def __post_init__(self) -> None:
        count = self.feature_ids.shape[0]
        check_tensor("encoder", self.encoder, (count, None))
        check_tensor("encoder_bias", self.encoder_bias, (count,))
        check_tensor("decoder", self.decoder, (count, self.encoder.shape[1]))
        for name in ("encoder", "encoder_bias", "decoder"):
            check_finite(f"{name} of features {self.feature_ids.tolist()}", getattr(self, name))

    def __len__(self) -> int:
        return self.feature_ids.shape[0]


def feature_id_tensor(feature_ids: Sequence[int] | Tensor, d_sae: int) -> Tensor:
    """`feature_ids` as int64 [F] on the CPU. TypeError if they are not integers, ValueError if out of range or none."""
    ids = torch.as_tensor(feature_ids)
    if ids.ndim != 1 or ids.numel() == 0:
        raise UserValueError(f"feature_ids must be a non-empty list of integers, got {feature_ids!r}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UserTypeError(f"feature_ids must be integers, got {ids.dtype}")
    ids = ids.to(device="cpu", dtype=torch.int64)
    if int(ids.min()) < 0 or int(ids.max()) >= d_sae:
        bad = [number for number in ids.tolist() if not 0 <= number < d_sae]
        raise UserValueError(f"feature ids {bad} are out of range: the dictionary has features 0..{d_sae - 1}")
    return ids
