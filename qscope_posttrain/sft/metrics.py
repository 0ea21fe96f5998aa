"""Metrics of a logging window: summed on the device, read once when the trainer logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError

if TYPE_CHECKING:
    from accelerate import Accelerator


class MetricWindow:
    """Running sums of named vectors, without a synchronisation with the host until `totals()`.

    `names` fixes what is summed and in what order, so that all ranks hold the same vector, also a rank that has seen
    no token of interest.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums: Tensor | None = None

    def add(self, values: Sequence[Tensor]) -> None:
        """Add one micro-batch: scalars and vectors on one device that, in this order, cover `names`."""
        flat = torch.cat([value.detach().reshape(-1).float() for value in values])
        if flat.numel() != len(self.names):
            raise UserValueError(f"Expected {len(self.names)} values for {', '.join(self.names)}; got {flat.numel()}.")
        # Token counts of a long window pass 2**24, where fp32 stops counting.
        flat = flat.to(_sum_dtype(flat.device))
        self._sums = flat if self._sums is None else self._sums + flat

    def totals(self, accelerator: Accelerator) -> dict[str, float]:
        """Sums over the window and over all ranks, by name; then empty. Every rank must call this."""
        sums = self._sums
        if sums is None:
            sums = torch.zeros(len(self.names), dtype=_sum_dtype(accelerator.device), device=accelerator.device)
        self._sums = None
        gathered: Tensor = accelerator.reduce(sums, reduction="sum")
        return dict(zip(self.names, gathered.tolist(), strict=True))


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
