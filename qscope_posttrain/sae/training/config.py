"""Settings of the training of sparse autoencoders."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qscope_posttrain.errors import UserValueError

ARCHITECTURES = ("topk", "batch_topk", "jumprelu")


@dataclass(frozen=True)
class SAETrainingConfig:
    """What is trained and how; the same for every layer. The defaults suit a d_model of 64 to 256 and some 100,000
    tokens.

    Quantities of an activation are in the units of training: activations are centred at their geometric median and
    divided by the root mean square of an element, so that settings carry over between layers and models.

    Example:
        >>> config = qp.SAETrainingConfig(expansion=16, k=32, steps=2000)
        >>> config.latents(d_model=1024)
        16384
    """

    architecture: Literal["topk", "batch_topk", "jumprelu"] = "topk"
    """Which latents fire: topk: the k largest of a token; batch_topk: the k x tokens largest of the whole batch, and
    after training those above one threshold; jumprelu: those above a learnt threshold of their own."""
    expansion: int = 8
    """Latents per dimension of the residual stream; ignored where width is given."""
    width: int | None = None
    """Number of latents."""
    k: int = 32
    """Latents that fire on a token: for topk at most, for batch_topk and jumprelu on average."""
    k_start: int | None = None
    """k of the first update, from which it falls (or rises) linearly to k; by default k throughout."""
    k_anneal_steps: int = 0
    """Updates over which k goes from k_start to k."""
    steps: int = 300
    """Updates."""
    batch_tokens: int = 1024
    """Tokens per update, of all processes together."""
    learning_rate: float = 3e-3
    """Peak rate of Adam."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    beta2: float = 0.999
    """Adam's decay of the mean squared gradient."""
    warmup_steps: int = 30
    """Updates of linear warm-up."""
    decay_start: float = 0.7
    """Share of the steps after which the rate falls linearly."""
    final_rate: float = 0.02
    """Rate at the end, as a share of the peak."""
    auxk_weight: float = 1 / 32
    """Weight of the AuxK loss, averaged over steps; 0 switches it off."""
    auxk_every: int = 4
    """AuxK is computed on every n-th step, with n times its weight."""
    auxk_k: int | None = None
    """Dead latents that may fire on a token in AuxK; by default half of d_model."""
    dead_after: int = 100
    """Updates without firing after which a latent counts as dead."""
    bandwidth: float = 0.3
    """jumprelu: width of the window around a threshold in which its gradient is estimated, in units of a
    pre-activation."""
    l0_weight: float = 1.0
    """jumprelu: weight of (L0 / k - 1)^2 beside the share of variance left unexplained."""
    threshold_decay: float = 0.9
    """batch_topk: share that the running threshold keeps at each update."""
    seed: int = 0
    """Fixes initialisation and order of the tokens; the same for every layer."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise UserValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")
        for name in ("expansion", "k", "steps", "batch_tokens", "auxk_every", "dead_after"):
            self._require(_whole(getattr(self, name), 1), name, "an integer from 1")
        for name in ("width", "k_start", "auxk_k"):
            value = getattr(self, name)
            self._require(value is None or _whole(value, 1), name, "an integer from 1, or None")
        for name in ("warmup_steps", "k_anneal_steps", "seed"):
            self._require(_whole(getattr(self, name), 0), name, "0 or more, an integer")
        for name in ("learning_rate", "bandwidth"):
            self._require(_finite(getattr(self, name)) and getattr(self, name) > 0, name, "above 0")
        for name in ("auxk_weight", "l0_weight"):
            self._require(_finite(getattr(self, name)) and getattr(self, name) >= 0, name, "0 or more")
        for name in ("decay_start", "final_rate"):
            self._require(0 <= getattr(self, name) <= 1, name, "a share from 0 to 1")
        for name in ("beta1", "beta2", "threshold_decay"):
            self._require(0 <= getattr(self, name) < 1, name, "from 0 to below 1")
        if (self.k_start is None) != (self.k_anneal_steps == 0):
            raise UserValueError(
                f"k_start={self.k_start} and k_anneal_steps={self.k_anneal_steps}: give both to anneal k, or neither"
            )
        if self.k_anneal_steps >= self.steps:
            raise UserValueError(
                f"k_anneal_steps={self.k_anneal_steps} must be below steps={self.steps}: k would never be reached"
            )

    def latents(self, d_model: int) -> int:
        """Number of latents for a residual stream of width `d_model`. ValueError if fewer than are to fire."""
        width = self.expansion * d_model if self.width is None else self.width
        most = max(self.k, self.k_start or 0)
        if most > width:
            raise UserValueError(f"k={most} latents are to fire, but the dictionary would have only {width}")
        return width

    def rate(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0: warm-up, flat, then linear decay to `final_rate`."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        start = self.decay_start * self.steps
        left = (self.steps - step) / (self.steps - start) if step > start else 1.0
        return self.learning_rate * warm * (self.final_rate + (1 - self.final_rate) * left)

    def k_at(self, step: int) -> int:
        """k of update `step`, counted from 0: linear from `k_start` to `k`, rounded to the nearest."""
        if self.k_start is None or step >= self.k_anneal_steps:
            return self.k
        return round(self.k_start + (self.k - self.k_start) * step / self.k_anneal_steps)

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise UserValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _finite(value: float) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
