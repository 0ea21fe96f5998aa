"""The nonlinearities of sparse autoencoders: which pre-activations survive, with which value.

Each is a small frozen dataclass. `encode` goes from tokens `[tokens, d_model]` to `(values, indices)`, both
`[tokens, width]`, through the operators of `kernels`. A latent *fires* on a token when its value is above zero; entries
of value zero only fill the rectangle, and add nothing when decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.kernels import threshold_encode, topk_encode
from qscope_posttrain.kernels.encode import VARIANTS
from qscope_posttrain.sae.checks import as_number, check_finite, check_tensor

TOP_K_VARIANTS = VARIANTS


@dataclass(frozen=True)
class Activation:
    """Base of all activations."""

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """(values, int32 indices), both [tokens, width], of z = W_enc x + b_enc.

        Options are `precision`, `weights` (for the precision "certified", which TopK alone offers) and `tile_tokens` of
        `kernels.topk_encode`. Differentiable with respect to the three tensors; the choice of the survivors is not.
        """
        raise NotImplementedError

    def check(self, d_sae: int) -> None:
        """Raise ValueError if the activation cannot belong to an SAE of `d_sae` latents."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Activation:
        """The same activation with its tensors, if it has any, on another device or in another dtype."""
        return self


@dataclass(frozen=True)
class TopK(Activation):
    """The `k` largest pre-activations of a token (Gao et al. 2024, arXiv 2406.04093, equation 2).

    Published encoders differ in the position of the ReLU. With z = W_enc x + b_enc:

    - "relu_after": relu(topk(z)). A negative survivor becomes an entry of value zero.
    - "relu_before": topk(relu(z)). The same values as relu_after; entries of value zero may carry any index.
    - "signed": topk(z), no ReLU. A negative survivor keeps its value, and enters the reconstruction.

    All three agree on every token with at least `k` positive pre-activations.
    """

    k: int
    variant: str = "relu_after"

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int):
            raise UserTypeError(f"k must be an integer, got {self.k!r} ({type(self.k).__name__})")
        if self.k < 1:
            raise UserValueError(f"k must be at least 1, got {self.k}")
        if self.variant not in TOP_K_VARIANTS:
            raise UserValueError(f"unknown TopK variant {self.variant!r}; choose one of {', '.join(TOP_K_VARIANTS)}")

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return topk_encode(x, W_enc, b_enc, self.k, variant=self.variant, **options)

    def check(self, d_sae: int) -> None:
        if self.k > d_sae:
            raise UserValueError(f"TopK keeps k={self.k} latents, but the dictionary has only {d_sae}")


@dataclass(frozen=True)
class Thresholded(Activation):
    """Base of the activations that keep every positive pre-activation above a limit."""

    def limit(self) -> Tensor | float:
        """A pre-activation survives above this: one limit for all latents, or one each [d_sae]."""
        return 0.0

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        weights = options.pop("weights", None)
        if weights is not None or options.get("precision") == "certified":
            raise UserValueError("precision='certified' is for TopK; this activation has no certified encoding")
        return threshold_encode(x, W_enc, b_enc, self.limit(), **options)


@dataclass(frozen=True)
class ReLU(Thresholded):
    """All positive pre-activations. The width is that of the token with the most of them."""


@dataclass(frozen=True)
class BatchTopK(Thresholded):
    """Inference form of BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): relu(z) where it exceeds one `threshold`.
    The threshold replaces the k-th value of the training batches, so that a token does not depend on its batch."""

    threshold: float

    def __post_init__(self) -> None:
        as_number("the BatchTopK threshold", self.threshold)

    def limit(self) -> Tensor | float:
        return self.threshold


@dataclass(frozen=True, eq=False)
class JumpReLU(Thresholded):
    """relu(z) where it exceeds the latent's own threshold (Rajamanoharan et al. 2024, arXiv 2407.14435, equation 3).
    `threshold` [d_sae] is in units of the pre-activation."""

    threshold: Tensor

    def __post_init__(self) -> None:
        check_tensor("threshold", self.threshold, (None,))
        check_finite("threshold", self.threshold)

    def limit(self) -> Tensor | float:
        return self.threshold

    def check(self, d_sae: int) -> None:
        if self.threshold.shape[0] != d_sae:
            raise UserValueError(
                f"JumpReLU has {self.threshold.shape[0]} thresholds for a dictionary of {d_sae} latents"
            )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> JumpReLU:
        return JumpReLU(self.threshold.to(device=device, dtype=dtype))


_KINDS: tuple[type[Activation], ...] = (TopK, ReLU, BatchTopK, JumpReLU)
_BY_NAME = {kind.__name__.lower(): kind for kind in _KINDS}


def activation_to_spec(activation: Activation) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The activation as (JSON-able settings, tensors), to be stored; `activation_from_spec` reads it back."""
    fields = {"name": type(activation).__name__.lower(), **vars(activation)}
    settings = {key: value for key, value in fields.items() if not isinstance(value, Tensor)}
    return settings, {key: value for key, value in fields.items() if isinstance(value, Tensor)}


def activation_from_spec(settings: Any, tensors: dict[str, Tensor]) -> Activation:
    """The activation that `activation_to_spec` described. ValueError for anything it would not have written."""
    name = settings.get("name") if isinstance(settings, dict) else None
    if not isinstance(name, str) or name not in _BY_NAME:
        raise UserValueError(f"unknown activation {settings!r}; known are {', '.join(_BY_NAME)}")
    arguments = {key: value for key, value in settings.items() if key != "name"} | tensors
    try:
        return _BY_NAME[name](**arguments)
    except TypeError as error:
        raise UserValueError(f"invalid settings for activation {name}: {error}") from error
