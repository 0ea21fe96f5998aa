"""Change the residual stream of a running model along chosen directions, and put it back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qscope_posttrain.residual.capture import hidden_states
from qscope_posttrain.residual.layers import check_layers, decoder_layers, text_config

Mode = Literal["add", "project_out"]
Unit = Literal["raw", "norm"]


@dataclass(frozen=True, eq=False)
class Steering:
    """One direction, and what to do with it at the output of some decoder layers, at every token.

    With d the direction, s the strength and h the hidden state of a token:

        add, unit "raw"     h' = h + s d
        add, unit "norm"    h' = h + s d / ||d||
        project_out         h' = h - s (h . d / ||d||^2) d

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a value is out of range; the message says which.
    """

    direction: Tensor
    """Direction `[d_model]` in the residual stream, floating point, finite and not zero. Kept detached."""

    layers: tuple[int, ...]
    """Numbers of the decoder layers, from 0, whose output is changed."""

    strength: float = 1.0
    """How much: for `add` a multiple of `unit`, negative to subtract; for `project_out` the share of the component
    that is removed (1: all of it)."""

    mode: Mode = "add"
    """`add` shifts every hidden state by the same vector; `project_out` removes its component along the direction."""

    unit: Unit = "raw"
    """What strength 1 means for `add`: the direction as it is (`raw`), or a vector of length 1 along it (`norm`), so
    that strength is a length in the residual stream. `project_out` does not depend on the length of the direction."""

    def __post_init__(self) -> None:
        direction = self.direction
        if not isinstance(direction, Tensor) or not direction.is_floating_point():
            found = direction.dtype if isinstance(direction, Tensor) else type(direction).__name__
            raise TypeError(f"direction must be a floating-point tensor [d_model]; got {found}.")
        if direction.dim() != 1:
            raise ValueError(f"direction must have the shape [d_model]; got {list(direction.shape)}.")
        if not torch.isfinite(direction).all() or not direction.any():
            raise ValueError("direction must be finite and not zero.")
        if isinstance(self.strength, bool) or not isinstance(self.strength, (int, float)):
            raise TypeError(f"strength must be a number; got {self.strength!r}.")
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be finite; got {self.strength}.")
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}; got {self.mode!r}.")
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}; got {self.unit!r}.")
        try:
            layers = tuple(self.layers)
        except TypeError as error:
            raise TypeError(f"layers must be numbers of layers, e.g. (20,); got {self.layers!r}.") from error
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "direction", direction.detach())


@contextmanager
def steer(model: nn.Module, *steerings: Steering) -> Iterator[dict[int, int]]:
    """Apply `steerings` to every forward of `model` inside the `with` block.

    Hooks return a new tensor and keep its dtype: the direction is prepared in fp32 and then cast. Several steerings
    of one layer apply in the order given; nested blocks compose, the outer one first. The hooks are removed on exit,
    also after an exception. A backward that recomputes layers (gradient checkpointing) must run inside the block.
    A model under `torch.compile` must make its first forward inside the block; after it, it compiles again.

    Yields:
        Hook calls so far per layer; a compiled layer counts once.

    Raises:
        ValueError: no steering, a layer that the model does not have, or a direction of another size.
        RuntimeError: on exit without another exception, if a steered layer never ran.
    """
    if not steerings:
        raise ValueError("No steering given; pass at least one Steering.")
    width = text_config(model).hidden_size
    for steering in steerings:
        check_layers(model, steering.layers)
        if steering.direction.numel() != width:
            raise ValueError(
                f"direction has {steering.direction.numel()} entries, but the model's residual stream has {width}."
            )
    layers = decoder_layers(model)
    calls = {layer: 0 for steering in steerings for layer in steering.layers}
    handles = []
    try:
        for steering in steerings:
            for layer in steering.layers:
                handles.append(layers[layer].register_forward_hook(_hook(steering, layer, calls)))
        yield calls
    finally:
        for handle in handles:
            handle.remove()
    silent = [layer for layer, count in calls.items() if count == 0]
    if silent:
        raise RuntimeError(
            f"Steering had no effect: layer(s) {', '.join(map(str, silent))} never ran inside the block. Either no "
            "forward was made, or another copy of the model ran, or the model was compiled before the block (then call "
            "torch.compiler.reset() first)."
        )


def _hook(steering: Steering, layer: int, calls: dict[int, int]) -> Callable[[nn.Module, Any, Any], Any]:
    """Forward hook that steers one layer, for an output that is a tensor or a tuple."""
    # Cast once per device and dtype, not at every token of a generation.
    prepared: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_states(output)
        # A graph is compiled for the values of Python counters: one that grows would mean a new graph at every call.
        calls[layer] = 1 if torch.compiler.is_compiling() else calls[layer] + 1
        key = (hidden.device, hidden.dtype)
        if key not in prepared:
            prepared[key] = tuple(vector.to(*key) for vector in _vectors(steering))
        steered = _apply(hidden, *prepared[key])
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    return hook


def _vectors(steering: Steering) -> tuple[Tensor, ...]:
    """fp32 vectors `[d_model]`: `(shift,)` to add, or `(unit vector, strength * unit vector)` to project out."""
    direction = steering.direction.float()
    unit_vector = direction / direction.norm()
    if steering.mode == "project_out":
        return unit_vector, steering.strength * unit_vector
    return (steering.strength * (unit_vector if steering.unit == "norm" else direction),)


def _apply(hidden: Tensor, *vectors: Tensor) -> Tensor:
    """`hidden` `[..., d_model]` shifted by one vector, or with its component along the first removed by the second."""
    if len(vectors) == 1:
        return hidden + vectors[0]
    read, write = vectors
    return hidden - (hidden @ read).unsqueeze(-1) * write
