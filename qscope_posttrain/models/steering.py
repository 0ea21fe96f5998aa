"""Change the residual stream of a running model along chosen directions, and put it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.capture import residual_stream
from qscope_posttrain.models.layers import check_layers, decoder_layers, text_config
from qscope_posttrain.models.positions import ColumnTracker, Positions, Span, Window
from qscope_posttrain.models.steering_spec import Change, Mode, Steering, Unit

__all__ = ["Mode", "Positions", "Steering", "Unit", "Window", "steer"]


@contextmanager
def steer(
    model: nn.Module, *steerings: Steering, prompt_length: int | Tensor | None = None, require_generated: bool = True
) -> Iterator[dict[int, int]]:
    """Apply `steerings` to every forward of `model` inside the `with` block.

    Hooks return a new tensor and keep its dtype: vectors are prepared in fp32 and then cast. Several steerings of one
    layer apply in the order given; nested blocks compose, the outer one first. The hooks are removed on exit, also
    after an exception.

    Generated token t of a row is column `prompt_length + t` of the batch. Every forward counts its columns from the
    length of its cache, so that decoding token by token and one forward over the whole text steer the same states.
    Without `prompt_length` it is the width of the forward that starts with an empty cache: what `generate` does with
    prompts padded on the left. Another `generate` inside the block starts again.

    Limits with `torch.compile`, gradient checkpointing, threads and packed batches are in docs/steering.md.

    Args:
        model (nn.Module): Causal language model of transformers.
        steerings (Steering): One or several.
        prompt_length (int or Tensor, default None): Columns of the prompt, padding included; one number, or `[rows]`.
            Needed for a single forward over prompts and completions, a prompt read in pieces, and `use_cache=False`.
        require_generated (bool, default True): Whether it is an error if steerings wait for generated tokens and none
            was read. A rollout may end with its first token, which is chosen but never read.

    Yields the hook calls so far per layer; a compiled layer counts once.

    Raises:
        ValueError: no steering, a layer that the model does not have, or another width or number of rows than the
            model's or the batch's.
        RuntimeError: on exit without another exception, if a steered layer never ran, or no token was read that a
            steering waits for; in a forward, if the start of the generated tokens is unknown.

    Example:
        >>> prompt = tokenizer("The river", return_tensors="pt")
        >>> with qp.steer(model, qp.Steering(torch.randn(64), layers=(3,), strength=4.0)) as calls:
        ...     tokens = model.generate(**prompt, max_new_tokens=8)
        >>> 1 <= calls[3] <= 8
        True
    """
    if not steerings:
        raise UserValueError("No steering given; pass at least one Steering.")
    width = text_config(model).hidden_size
    for steering in steerings:
        check_layers(model, steering.layers)
        found = steering.direction.shape[-1]
        if found != width:
            raise UserValueError(f"direction has {found} entries, but the model's residual stream has {width}.")
    layers = decoder_layers(model)
    columns = ColumnTracker(prompt_length)
    calls = {layer: 0 for steering in steerings for layer in steering.layers}
    with ExitStack() as hooks:
        if any(steering.positions != "all" for steering in steerings):
            hooks.enter_context(columns.attach(model))
        for steering in steerings:
            for layer in steering.layers:
                hook = _hook(steering, layer, width, calls, columns)
                hooks.enter_context(layers[layer].register_forward_hook(hook))
        yield calls
    _check_effect(steerings, calls, columns, require_generated)


def _check_effect(
    steerings: tuple[Steering, ...], calls: dict[int, int], columns: ColumnTracker, require_generated: bool
) -> None:
    """RuntimeError for a block that certainly steered nothing."""
    silent = [layer for layer, count in calls.items() if count == 0]
    if silent:
        raise RuntimeError(
            f"Steering had no effect: layer(s) {', '.join(map(str, silent))} never ran inside the block. Either no "
            "forward was made, or another copy of the model ran, or the model was compiled before the block (then call "
            "torch.compiler.reset() first)."
        )
    for steering in steerings:
        if steering.positions == "prompt" and not columns.prompt_seen:
            raise RuntimeError("Steering had no effect: positions 'prompt', but no token of a prompt was read.")
        waits = steering.positions == "generated" or isinstance(steering.positions, Window)
        if waits and require_generated and not columns.generated_seen:
            raise RuntimeError(
                "Steering had no effect: it waits for generated tokens, but none was read inside the block. A forward "
                "without a cache reads prompts only, unless steer(..., prompt_length=...) says where they end; and the "
                "last token that `generate` returns is never read."
            )


def _hook(
    steering: Steering, layer: int, width: int, calls: dict[int, int], columns: ColumnTracker
) -> Callable[[nn.Module, Any, Any], Any]:
    """Forward hook that steers one layer."""
    # Cast and moved once per device and dtype, not at every token of a generation.
    prepared: dict[tuple[torch.device, torch.dtype], tuple[Change, Tensor | None]] = {}
    batch_rows = steering.batch_rows
    selection = None if steering.positions == "all" else _selection(steering, columns)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = residual_stream(output, width)
        # A graph is compiled for the values of Python counters: one that grows would mean a new graph at every call.
        calls[layer] = 1 if torch.compiler.is_compiling() else calls[layer] + 1
        if batch_rows is not None and hidden.shape[0] != batch_rows:
            raise UserValueError(other_rows("Steering is given", batch_rows, hidden.shape[0]))
        inside = True if selection is None else selection(hidden)
        if inside is False:
            return None
        key = (hidden.device, hidden.dtype)
        if key not in prepared:
            mask = None if steering.rows is None else steering.rows[:, None].to(hidden.device)
            prepared[key] = steering.change(layer).to(*key), mask
        change, rows = prepared[key]
        if inside is not True:
            rows = inside if rows is None else inside & rows
        steered = change.apply(hidden, rows)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    return hook if selection is None else torch.compiler.disable(hook)


def other_rows(what: str, expected: int, found: int) -> str:
    """The message for a forward over another number of rows than those that `what` is about."""
    return (
        f"{what} for {expected} rows, but the batch has {found}. Beams (num_beams), num_return_sequences and "
        "guidance_scale make several rows of the model of one row of the batch, and a batch may be split or its last "
        "one shorter: give as many rows as the model reads."
    )


def _selection(steering: Steering, columns: ColumnTracker) -> Callable[[Tensor], bool | Tensor]:
    """Function of hidden states that finds which columns of the current forward are steered; see `Span.mask`."""
    prompt_length: int | Tensor | None = None
    span = Span(0, 0)

    def selected(hidden: Tensor) -> bool | Tensor:
        nonlocal prompt_length, span
        if columns.prompt_length is None or hidden.shape[1] != columns.width:
            raise RuntimeError(
                f"A steered layer gave {hidden.shape[1]} columns, but the last forward of the model read "
                f"{columns.width}: the layer runs outside of a forward, e.g. recomputed in a backward after another "
                "forward. Only positions 'all' can be steered there."
            )
        if columns.prompt_length is not prompt_length:
            prompt_length = columns.prompt_length
            span = Span.of(steering.positions, prompt_length, steering.rows)
        return span.mask(columns.first, columns.width, hidden.device)

    return selected
