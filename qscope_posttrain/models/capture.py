"""Read the residual stream: keep references to chosen layers' outputs, with their graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.models.layers import check_layers, decoder_layers, text_config, unwrapped

ForwardHook = Callable[[nn.Module, Any, Any], None]


def hidden_states(output: Any) -> Tensor:
    """The hidden states `[..., d_model]` in a module's output: the output itself, or the first entry of a tuple."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, Tensor):
        raise UserTypeError(
            f"Expected a layer to return a tensor, or a tuple that starts with one; got {type(output).__name__}."
        )
    return hidden


def residual_stream(output: Any, width: int) -> Tensor:
    """The hidden states `[batch, tokens, d_model]` in a decoder layer's output, for a model of `hidden_size` `width`.

    Raises:
        TypeError: no tensor in the output.
        ValueError: another shape: a model with several residual streams, which a hook cannot take for one.
    """
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

    The hooks only look: they return nothing and change nothing. The *first* output is the one to keep under gradient
    checkpointing. transformers before 5.23 runs hooks inside the checkpoint, so that they fire again when backward
    recomputes the layer; and under reentrant checkpointing the first output is made without grad mode and receives
    its `grad_fn` afterwards, in place. That is why nothing here looks at `torch.is_grad_enabled()`.

    A captured tensor keeps its whole graph alive: call `clear()` as soon as it has been used. Other hooks that
    replace a layer's output are seen if they were registered before this one.

    Under `torch.compile`, attach before the model's first forward, because a graph that exists never learns of a new
    hook, and `clear()` before each forward, because a graph is compiled for the counts it starts from.

    Usable as a context manager, or with `attach()` and `remove()`:

        with LayerCapture(model, layers=[20, 21]) as capture:
            model(**inputs)
            tensors = capture.require()     # {20: [batch, tokens, d_model], 21: ...}
    """

    active: bool
    """Whether outputs are kept and counted; switch it off for forwards that are of no interest."""

    tensors: dict[int, Tensor]
    """First output of each layer since `clear()`: `[batch, tokens, d_model]`, with its graph."""

    named: dict[str, Tensor]
    """First output of each module in `modules`, by its name there."""

    calls: dict[int | str, int]
    """How often each layer (and named module) fired since `clear()`, recomputation included."""

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[SupportsIndex],
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """
        Args:
            model: a causal language model of transformers, plain or wrapped.
            layers: numbers of decoder layers, from 0.
            modules: further modules to read under names of one's own, e.g. `{"final_norm": final_norm(model)}`.
        """
        self.layers = check_layers(model, layers)
        blocks = decoder_layers(model)
        self._blocks = {layer: blocks[layer] for layer in self.layers}
        self._width = text_config(model).hidden_size
        self._modules = dict(modules or {})
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
        for layer, block in self._blocks.items():
            self._handles.append(block.register_forward_hook(self._layer_hook(layer)))
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._module_hook(name)))
        return self

    def remove(self) -> None:
        """Take the hooks away; what was captured stays until `clear()`. Does nothing if not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forget all outputs and counts, releasing the graphs they hold."""
        self.tensors = {}
        self.named = {}
        self.calls = dict.fromkeys((*self.layers, *self._modules), 0)

    def require(self) -> dict[int, Tensor]:
        """`tensors`, complete.

        Raises:
            RuntimeError: a layer or named module has not fired since `clear()`; the message says which and why that
                can be.
        """
        missing = [str(layer) for layer in self.layers if layer not in self.tensors]
        missing += [name for name in self._modules if name not in self.named]
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _layer_hook(self, layer: int) -> ForwardHook:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.active:
                self.calls[layer] += 1
                if layer not in self.tensors:
                    self.tensors[layer] = residual_stream(output, self._width)

        return hook

    def _module_hook(self, name: str) -> ForwardHook:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.active:
                self.calls[name] += 1
                if name not in self.named:
                    self.named[name] = hidden_states(output)

        return hook


class _DeepestLayerReached(BaseException):
    """Ends a forward. Not an `Exception`, so that no `except Exception` in a model's code can swallow it."""


@torch.no_grad()
def forward_to_layer(model: nn.Module, layers: Iterable[SupportsIndex], **inputs: Any) -> dict[int, Tensor]:
    """Run `model(**inputs)` without gradient up to the deepest of `layers` and return their outputs.

    Layers behind the deepest one, the final norm and the LM head never run. Train or eval mode is the caller's
    choice. A DDP or `torch.compile` wrapper is stepped around: the first would wait for the other processes, the
    second would compile a graph for a forward that never ends.

    Args:
        model: a causal language model of transformers, plain or wrapped.
        layers: numbers of decoder layers, from 0.
        inputs: what the model's forward takes (`input_ids [batch, tokens]`, `attention_mask`, ...). `use_cache`
            is False unless given.

    Returns:
        `{layer: [batch, tokens, d_model]}` in the order of `layers`.
    """
    capture = LayerCapture(model, layers)

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise _DeepestLayerReached

    with capture:
        # Registered after the capture's own hook, hence run after it.
        handle = decoder_layers(model)[max(capture.layers)].register_forward_hook(stop)
        try:
            unwrapped(model)(**{"use_cache": False, **inputs})
        except _DeepestLayerReached:
            pass
        finally:
            handle.remove()
        return {layer: capture.require()[layer] for layer in capture.layers}


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
