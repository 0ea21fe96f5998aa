"""Put other hidden states in place of a decoder layer's output, for the forwards inside a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.residual.capture import residual_stream
from qscope_posttrain.residual.layers import check_layers, decoder_layers, text_config


@contextmanager
def spliced(model: nn.Module, layer: int, states: Tensor) -> Iterator[None]:
    """The output of decoder layer `layer` is `states` [batch, tokens, d_model] inside the block, in its own dtype.

    The hook is removed at the end, also after an exception.

    Raises:
        ValueError: the layer does not exist, or its output has another shape than `states`.
        RuntimeError: no forward inside the block reached the layer.
    """
    (number,) = check_layers(model, [layer])
    width = text_config(model).hidden_size
    calls = 0

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        hidden = residual_stream(output, width)
        if hidden.shape != states.shape:
            raise UserValueError(
                f"Layer {number} returns {list(hidden.shape)}, the states to put there {list(states.shape)}."
            )
        inside = states.to(hidden.device, hidden.dtype)
        return (inside, *output[1:]) if isinstance(output, tuple) else inside

    handle = decoder_layers(model)[number].register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
    if calls == 0:
        raise RuntimeError(f"Layer {number} never ran inside the block, so nothing was put in its place.")
