"""Read the residual stream (with its graph) at chosen layers, or replace it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.models.layers import check_layers, decoder_layers, text_config, unwrapped


def hidden_states(output: Any) -> Tensor:
    """The hidden states `[..., d_model]` in a module's output: itself, or the first entry of a tuple."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, Tensor):
        raise UserTypeError(
            f"Expected a layer to return a tensor, or a tuple that starts with one; got {type(output).__name__}."
        )
    return hidden


def residual_stream(output: Any, width: int) -> Tensor:
    """The hidden states `[batch, tokens, width]` in a decoder layer's output, for a model of that `hidden_size`."""
    hidden = hidden_states(output)
    if hidden.dim() != 3 or hidden.shape[-1] != width:
        raise UserValueError(
            f"A decoder layer returned {list(hidden.shape)}, where [batch, tokens, {width}] was expected: either the "
            "model has several residual streams, or its layers put their dimensions in another order. Only models with "
            "one residual stream can be read and steered."
        )
    return hidden


class LayerCapture:
    """Forward hooks that keep the first output of chosen decoder layers since the last `clear()`.

        with LayerCapture(model, layers=[20, 21]) as capture:  # or attach() and remove()
            model(**inputs)
            tensors = capture.require()  # {20: [batch, tokens, d_model], 21: ...}

    The *first* output is the one to keep under gradient checkpointing. transformers before 5.23 runs hooks inside the
    checkpoint, so that they fire again when backward recomputes the layer; and under reentrant checkpointing the first
    output is made without grad mode and receives its `grad_fn` afterwards, in place. That is why nothing here asks
    `torch.is_grad_enabled()`.

    A captured tensor keeps its whole graph alive: call `clear()` as soon as it has been used. Outputs that other hooks
    replace are captured if those were registered before this one. Under `torch.compile`, attach before the model's
    first forward, because a graph that exists never learns of a new hook, and `clear()` before each forward, because a
    graph is compiled for the counts it starts from.

    `modules` are further modules to read under names of one's own, e.g. `{"final_norm": final_norm(model)}`.
    """

    active: bool  # Whether outputs are kept and counted; switch it off for forwards that are of no interest
    tensors: dict[int, Tensor]  # First output of each layer since `clear()`: `[batch, tokens, d_model]`, with its graph
    named: dict[str, Tensor]  # First output of each module in `modules`, by its name there
    calls: dict[int | str, int]  # How often each layer (and named module) fired since `clear()`, recomputation included

    def __init__(
        self, model: nn.Module, layers: Iterable[SupportsIndex], modules: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.layers = check_layers(model, layers)
        blocks = decoder_layers(model)
        self._modules: dict[int | str, nn.Module] = {layer: blocks[layer] for layer in self.layers}
        self._modules.update((modules or {}).items())
        self._width = text_config(model).hidden_size
        self._handles: list[RemovableHandle] = []
        self.active = True
        self.clear()

    @property
    def attached(self) -> bool:
        """Whether the hooks are registered."""
        return bool(self._handles)

    def attach(self) -> LayerCapture:
        """Register the hooks. RuntimeError if they already are."""
        if self.attached:
            raise RuntimeError("This LayerCapture is already attached; remove() it first.")
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(partial(self._look, name)))
        return self

    def remove(self) -> None:
        """Take the hooks away; what was captured stays until `clear()`. Does nothing if not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forget all outputs and counts, releasing the graphs they hold."""
        self.tensors, self.named = {}, {}
        self.calls = dict.fromkeys(self._modules, 0)

    def require(self) -> dict[int, Tensor]:
        """Return `tensors`. RuntimeError if a layer or named module has not fired since `clear()`, with a reason."""
        missing = [str(name) for name in self._modules if name not in self.tensors and name not in self.named]
        if not missing:
            return self.tensors
        if not self.attached:
            reason = "The hooks are not attached: call attach(), or use it in a `with` block."
        elif not self.active:
            reason = "`active` is False, so that outputs are ignored."
        else:
            reason = (
                "The hooks are attached but never ran. Either no forward was made, or another copy of the model "
                "ran, or the model was compiled or its forward replaced (CUDA graphs, patched kernels) before attach()."
            )
        raise RuntimeError(f"No output captured from layer(s) {', '.join(missing)}. {reason}")

    def __enter__(self) -> LayerCapture:
        return self.attach()

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _look(self, name: int | str, module: nn.Module, args: Any, output: Any) -> None:
        if not self.active:
            return
        self.calls[name] += 1
        if isinstance(name, str):
            if name not in self.named:
                self.named[name] = hidden_states(output)
        elif name not in self.tensors:
            self.tensors[name] = residual_stream(output, self._width)


class _DeepestLayerReached(BaseException):
    """Ends a forward. Not an `Exception`, so that no `except Exception` in a model's code can swallow it."""


@torch.no_grad()
def forward_to_layer(model: nn.Module, layers: Iterable[SupportsIndex], **inputs: Any) -> dict[int, Tensor]:
    """Run `model(**inputs)` without gradient up to the deepest of `layers` and return their outputs.

    Train or eval mode is the caller's choice; `use_cache` is False unless given. A DDP or `torch.compile` wrapper is
    bypassed: the first would wait for the other processes, the second would compile a graph for a forward that never
    ends. Returns `{layer: [batch, tokens, d_model]}` in the order of `layers`.
    """
    capture = LayerCapture(model, layers)

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _DeepestLayerReached

    with capture:
        # Registered after the capture's own hook, hence run after it.
        with decoder_layers(model)[max(capture.layers)].register_forward_hook(stop), suppress(_DeepestLayerReached):
            unwrapped(model)(**{"use_cache": False, **inputs})
        return {layer: capture.require()[layer] for layer in capture.layers}


@contextmanager
def spliced(model: nn.Module, layer: int, states: Tensor) -> Iterator[None]:
    """Replace the output of decoder layer `layer` by `states` [batch, tokens, d_model], in its own dtype.
    ValueError for a missing layer or another shape; RuntimeError if no forward inside the block reached it."""
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

    with decoder_layers(model)[number].register_forward_hook(replace):
        yield
    if calls == 0:
        raise RuntimeError(f"Layer {number} never ran inside the block, so nothing was put in its place.")
