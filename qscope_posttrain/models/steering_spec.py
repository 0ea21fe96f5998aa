"""Specification and arithmetic of steering: direction, mode, strength, layers, positions and rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.kernels.steering import steer_add
from qscope_posttrain.models.positions import Positions, Window

Mode = Literal["add", "project_out", "ablate", "clamp"]
Unit = Literal["raw", "norm", "relative"]
NAMED_POSITIONS = ("all", "prompt", "generated")
READS_A_FEATURE = ("ablate", "clamp")


@dataclass(frozen=True, eq=False)
class Steering:
    """One direction, what to do with it at the output of some decoder layers, and for which tokens and rows.

    With d the direction, u = d / ||d||, s the strength, R the median residual norm of the layer and h the hidden state
    of a token:

        S = s d (unit "raw"), s u (unit "norm"), s R u (unit "relative")
        add            h' = h + S
        project_out    h' = h - s (h . u) u
        ablate         h' = h - s f(h) d      f(h) = relu(h . encoder + encoder_bias)
        clamp          h' = h + S - f(h) d

    `ablate` and `clamp` treat d as what an SAE feature writes and f as its activation (of a TopK or JumpReLU SAE the
    one that it has where it is selected): strength 1 takes the feature's contribution out, and `clamp` in raw units
    makes its activation s, in the other units its contribution a vector of that length.

    Example:
        >>> direction = features.select("zh", layers=3).layers[3].decoder[0]
        >>> steering = qp.Steering(direction, layers=(3,), strength=4.0, unit="norm", positions="generated")
    """

    direction: Tensor
    """Direction `[d_model]` in the residual stream, or one for every row of the batch, `[rows, d_model]`; floating
    point, finite and not zero. Kept detached."""
    layers: tuple[int, ...]  # Numbers of the decoder layers, from 0, whose output is changed
    strength: float = 1.0
    """For `add` and `clamp` a multiple of `unit`, negative for the opposite direction; for `project_out` and `ablate`
    the share that is removed (1: all of it)."""
    mode: Mode = "add"
    """`add` shifts hidden states by the same vector; `project_out` removes their component along the direction;
    `ablate` removes a feature's contribution; `clamp` replaces it by a fixed one."""
    unit: Unit = "raw"
    """Meaning of strength 1 for `add` and `clamp`: the direction as it is (`raw`), a vector of length 1 along it
    (`norm`), or one as long as the median hidden state of that layer (`relative`, with `residual_norms`)."""
    positions: Positions = "all"
    """Tokens that are steered where they are read: `all`, those of the prompt, the generated ones, or a `Window` of the
    generated ones. The first generated token is chosen at the last token of the prompt: only `all` and `prompt` can
    change it. Padding in front of a prompt counts as prompt."""
    rows: Tensor | None = None
    """Rows of the batch that are steered, bool `[rows]`, kept on the CPU; None steers all. The others stay
    bit-identical."""
    encoder: Tensor | None = None
    """`ablate` and `clamp`: the feature's encoder row, `[d_model]`, or `[rows, d_model]` with such a direction."""
    encoder_bias: float = 0.0  # `ablate` and `clamp`: the feature's encoder bias
    residual_norms: Mapping[int, float] | None = None
    """unit `relative`: median L2 norm of the hidden states by layer, for every one of `layers`."""

    def __post_init__(self) -> None:
        for name, words in (("mode", get_args(Mode)), ("unit", get_args(Unit))):
            if getattr(self, name) not in words:
                raise UserValueError(f"{name} must be one of {', '.join(words)}; got {getattr(self, name)!r}.")
        if not isinstance(self.positions, Window) and self.positions not in NAMED_POSITIONS:
            raise UserValueError(f"positions must be {', '.join(NAMED_POSITIONS)} or a Window; got {self.positions!r}.")
        _check_number("strength", self.strength)
        _check_number("encoder_bias", self.encoder_bias)
        try:
            layers = tuple(self.layers)
        except TypeError as error:
            raise UserTypeError(f"layers must be numbers of layers, e.g. (20,); got {self.layers!r}.") from error
        object.__setattr__(self, "layers", layers)
        _check_vectors("direction", self.direction)
        self._check_rows()
        steered = self.direction[self.rows] if self.rows is not None and self.direction.dim() == 2 else self.direction
        if not steered.any(dim=-1).all():
            raise UserValueError("direction must be finite and not zero.")
        object.__setattr__(self, "direction", self.direction.detach())
        self._check_encoder()
        self._check_residual_norms()

    @property
    def batch_rows(self) -> int | None:
        """Rows that the batch must have, or None if any number will do."""
        sizes = self._row_counts()
        return next(iter(sizes.values())) if sizes else None

    def change(self, layer: int) -> Change:
        """The arithmetic at one of `layers`, in fp32 on the direction's device."""
        direction = self.direction.float()
        along = unit(direction)
        norms = self.residual_norms if self.unit == "relative" else None
        length = self.strength * (norms[layer] if norms else 1.0)
        shift = spread(length * (direction if self.unit == "raw" else along))
        if self.mode == "add":
            return Change(shift)
        if self.mode == "project_out":
            return Change(None, along.unsqueeze(-1), spread(self.strength * along))
        if self.encoder is None:
            raise UserValueError(f"mode {self.mode!r} needs an encoder.")
        read = self.encoder.to(direction.device, torch.float32).unsqueeze(-1)
        if self.mode == "ablate":
            return Change(None, read, spread(self.strength * direction), self.encoder_bias, rectified=True)
        return Change(shift, read, spread(direction), self.encoder_bias, rectified=True)

    def _row_counts(self) -> dict[str, int]:
        """Rows of each field that has one entry per row."""
        start = self.positions.start if isinstance(self.positions, Window) else None
        direction = self.direction if self.direction.dim() == 2 else None
        fields = {"direction": direction, "rows": self.rows, "positions.start": start}
        return {name: len(value) for name, value in fields.items() if isinstance(value, Tensor)}

    def _check_rows(self) -> None:
        rows = self.rows
        if rows is not None:
            if not isinstance(rows, Tensor) or rows.dtype != torch.bool:
                found = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
                raise UserTypeError(f"rows must be a bool tensor [rows] or None; got {found}.")
            if rows.dim() != 1 or rows.numel() == 0:
                raise UserValueError(f"rows must have the shape [rows]; got {list(rows.shape)}.")
            # Compared on the host with where each row's tokens begin; moved to the model once a block.
            object.__setattr__(self, "rows", rows.detach().to("cpu"))
        counts = self._row_counts()
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise UserValueError(f"Everything that is given per row must have as many rows as the batch; {listed}.")

    def _check_encoder(self) -> None:
        if self.mode not in READS_A_FEATURE:
            if self.encoder is not None:
                raise UserValueError(
                    f"encoder is for the modes {' and '.join(READS_A_FEATURE)}; mode {self.mode!r} has no use for it."
                )
            return
        if self.encoder is None:
            raise UserValueError(
                f"mode {self.mode!r} needs encoder, what the feature reads [d_model], and its encoder_bias."
            )
        _check_vectors("encoder", self.encoder)
        shape = self.direction.shape
        if self.encoder.shape not in (shape, shape[-1:]):
            raise UserValueError(
                f"encoder must have the shape of direction {list(shape)} or {list(shape[-1:])}; "
                f"got {list(self.encoder.shape)}."
            )
        object.__setattr__(self, "encoder", self.encoder.detach())

    def _check_residual_norms(self) -> None:
        if self.unit != "relative":
            return
        norms = self.residual_norms or {}
        missing = ", ".join(str(layer) for layer in self.layers if layer not in norms)
        if missing:
            raise UserValueError(
                f"unit 'relative' needs residual_norms, the median length of the hidden states, of layer(s) {missing}."
            )
        for layer in self.layers:
            _check_number(f"residual_norms[{layer}]", norms[layer])
            if norms[layer] <= 0:
                raise UserValueError(f"residual_norms[{layer}] must be positive; got {norms[layer]}.")
        object.__setattr__(self, "residual_norms", dict(norms))


def _check_vectors(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise UserTypeError(f"{name} must be a floating-point tensor [d_model]; got {found}.")
    if value.dim() not in (1, 2) or value.numel() == 0:
        raise UserValueError(f"{name} must have the shape [d_model], or [rows, d_model]; got {list(value.shape)}.")
    if not torch.isfinite(value).all():
        raise UserValueError(f"{name} must be finite.")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserTypeError(f"{name} must be a number; got {value!r}.")
    if not math.isfinite(value):
        raise UserValueError(f"{name} must be finite; got {value}.")


@dataclass(frozen=True, eq=False)
class Change:
    """h' = h + shift - g(h) write, with g(h) = h . read, or relu(h . read + bias) if `rectified`. Vectors are
    `[d_model]`, or `[rows, 1, d_model]` for one per row; None leaves its part out."""

    shift: Tensor | None = None
    read: Tensor | None = None  # `[d_model, 1]`, or `[rows, d_model, 1]`
    write: Tensor | None = None
    bias: float = 0.0
    rectified: bool = False

    def to(self, device: torch.device, dtype: torch.dtype) -> Change:
        """Prepare for hidden states of `dtype`: the shift of a pure addition in that dtype, all else at least fp32."""
        wide = dtype if self.read is None else torch.promote_types(dtype, torch.float32)
        shift, read, write = (v if v is None else v.to(device, wide) for v in (self.shift, self.read, self.write))
        return Change(shift, read, write, self.bias, self.rectified)

    def apply(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Change `hidden` `[rows, tokens, d_model]` into a new tensor of the same dtype; the rest of it stays
        bit-identical where a bool mask, which broadcasts to `[rows, tokens]`, is False."""
        if mask is None:
            return self._everywhere(hidden)
        if hidden.is_cuda and self.read is None and self.shift is not None and self.shift.dim() == 1:
            return self.added(hidden, mask)
        # Chosen, not shifted by zero: that would turn -0.0 to 0.0, and an activation of inf times zero into nan.
        return torch.where(mask.unsqueeze(-1), self._everywhere(hidden), hidden)

    def added(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Do the same for a pure shift `[d_model]` by one operator: half the memory traffic on CUDA, but slower for one
        token on a CPU, where its dispatch takes longer than the two small operations that it replaces."""
        if self.shift is None:
            return hidden
        return steer_add(hidden, self.shift.unsqueeze(0), mask.unsqueeze(-1).to(self.shift.dtype))

    def _everywhere(self, hidden: Tensor) -> Tensor:
        if self.read is None or self.write is None:
            return hidden if self.shift is None else hidden + self.shift
        with torch.autocast(hidden.device.type, enabled=False):  # it would round both factors
            activation = hidden.to(self.read.dtype) @ self.read
        if self.rectified:
            activation = (activation + self.bias).relu()
        change = -activation * self.write
        if self.shift is not None:
            change = change + self.shift
        return hidden + change.to(hidden.dtype)


def unit(vectors: Tensor) -> Tensor:
    """`vectors` `[..., d_model]` at length 1; a zero vector stays zero."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)


def spread(vectors: Tensor) -> Tensor:
    """`[d_model]` as it is, `[rows, d_model]` as `[rows, 1, d_model]`, to meet `[rows, tokens, d_model]`."""
    return vectors if vectors.dim() == 1 else vectors.unsqueeze(1)
