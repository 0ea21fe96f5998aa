"""The arithmetic of steering: what each mode does to hidden states, in vectors prepared once per device and dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qscope_posttrain.kernels.steering import steer_add


@dataclass(frozen=True, eq=False)
class Change:
    """h' = h + shift - g(h) write, with g(h) = h . read, or relu(h . read + bias) if `rectified`.

    Vectors are `[d_model]`, or `[rows, 1, d_model]` for one per row. None leaves its part out.
    """

    shift: Tensor | None = None
    read: Tensor | None = None
    """`[d_model, 1]`, or `[rows, d_model, 1]`"""
    write: Tensor | None = None
    bias: float = 0.0
    rectified: bool = False

    def to(self, device: torch.device, dtype: torch.dtype) -> Change:
        """Ready for hidden states of `dtype`: the shift of a pure addition in that dtype, all else at least fp32."""
        wide = dtype if self.read is None else torch.promote_types(dtype, torch.float32)

        def moved(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector.to(device, wide)

        return Change(moved(self.shift), moved(self.read), moved(self.write), self.bias, self.rectified)

    def apply(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """`hidden` `[rows, tokens, d_model]` changed; a new tensor of the same dtype.

        With a bool mask that broadcasts to `[rows, tokens]`, only where it is True: the rest stays bit-identical.
        """
        if mask is None:
            return self._everywhere(hidden)
        if hidden.is_cuda and self.read is None and self.shift is not None and self.shift.dim() == 1:
            return self.added(hidden, mask)
        # Chosen, not shifted by zero: that would turn -0.0 to 0.0, and a readout of inf times zero into nan.
        return torch.where(mask.unsqueeze(-1), self._everywhere(hidden), hidden)

    def added(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The same for a pure shift `[d_model]`, by one operator: half the memory traffic on CUDA.

        For one token on a CPU its dispatch takes longer than the two small operations that it replaces.
        """
        if self.shift is None:
            return hidden
        return steer_add(hidden, self.shift.unsqueeze(0), mask.unsqueeze(-1).to(self.shift.dtype))

    def _everywhere(self, hidden: Tensor) -> Tensor:
        if self.read is None or self.write is None:
            return hidden if self.shift is None else hidden + self.shift
        with torch.autocast(hidden.device.type, enabled=False):  # it would round both factors
            readout = hidden.to(self.read.dtype) @ self.read
        if self.rectified:
            readout = (readout + self.bias).relu()
        change = -readout * self.write
        if self.shift is not None:
            change = change + self.shift
        return hidden + change.to(hidden.dtype)


def unit(vectors: Tensor) -> Tensor:
    """`vectors` `[..., d_model]` at length 1; a zero vector stays zero."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)


def spread(vectors: Tensor) -> Tensor:
    """`[d_model]` as it is, `[rows, d_model]` as `[rows, 1, d_model]`, to meet `[rows, tokens, d_model]`."""
    return vectors if vectors.dim() == 1 else vectors.unsqueeze(1)
