"""Follow the tokens that a running model reads: columns of prompt and generated tokens over a generation's forwards."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.models.layers import text_backbone, virtual_tokens

ENDLESS = torch.iinfo(torch.int64).max // 4
"""Stands for a column behind every sequence; far from the end of int64, so that sums with it do not wrap."""
_CACHE = "past_key_values"
_STATES = ("cache_params", "state", "mems")
"""Arguments that models without such a cache receive from their last forward"""


@dataclass(frozen=True, eq=False)
class Window:
    """Generated tokens `start <= t < start + length` of each row, counted from 0.

    Example:
        >>> window = qp.Window(start=4, length=16)  # generated tokens 4 to 19
        >>> steering = qp.Steering(torch.randn(64), layers=(3,), positions=window)
    """

    start: int | Tensor = 0  # First token of the window, or one for every row: integers `[rows]`
    length: int | None = None  # Number of tokens in the window; None reaches to the end

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", whole_numbers("Window.start", self.start))
        if isinstance(self.length, bool) or not isinstance(self.length, int | None):
            raise UserTypeError(f"Window.length must be a whole number or None; got {self.length!r}.")
        if self.length is not None and self.length < 1:
            raise UserValueError(f"Window.length must be at least 1, or None for no end; got {self.length}.")


Positions = Literal["all", "prompt", "generated"] | Window


def whole_numbers(name: str, value: int | Tensor) -> int | Tensor:
    """Check an int >= 0, or a tensor `[rows]` of them, which comes back on the CPU: they are compared on the host."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise UserTypeError(f"{name} must hold integers; got a tensor of {value.dtype}.")
        if value.dim() != 1 or value.numel() == 0:
            raise UserValueError(f"{name} must be a whole number or have the shape [rows]; got {list(value.shape)}.")
        value = value.detach().to("cpu", torch.int64)
        lowest = int(value.min())
    elif isinstance(value, bool) or not isinstance(value, int):
        raise UserTypeError(f"{name} must be a whole number, or a tensor of them; got {value!r}.")
    else:
        lowest = value
    if lowest < 0:
        raise UserValueError(f"{name} cannot be negative; got {lowest}.")
    return value


class Span:
    """Columns `start <= column < stop` of each row, and which of them lie in a forward.

    Where the whole batch agrees, host integers decide; only a forward that some rows are inside of, and others not,
    needs a mask. `start` and `stop` are one number, or one for each row; `rows` (bool `[rows]`) says which rows matter:
    the answer for the others is arbitrary.
    """

    def __init__(self, start: int | Tensor, stop: int | Tensor, rows: Tensor | None = None) -> None:
        self._start, self._stop = torch.as_tensor(start).view(-1), torch.as_tensor(stop).view(-1)
        starts, stops = torch.broadcast_tensors(self._start, self._stop)
        if rows is not None and starts.numel() > 1:
            starts, stops = starts[rows], stops[rows]
        self._empty = starts.numel() == 0
        if not self._empty:
            self._bounds = int(starts.min()), int(starts.max()), int(stops.min()), int(stops.max())
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, positions: Positions, prompt_length: int | Tensor, rows: Tensor | None = None) -> Span:
        """The columns of `positions` when generated token t is column `prompt_length + t`."""
        if positions == "all":
            return cls(0, ENDLESS, rows)
        if positions == "prompt":
            return cls(0, prompt_length, rows)
        window = positions if isinstance(positions, Window) else Window()
        start = prompt_length + window.start
        return cls(start, ENDLESS if window.length is None else start + window.length, rows)

    def mask(self, first: int, width: int, device: torch.device) -> bool | Tensor:
        """Find which of the columns `first` to `first + width - 1` lie inside: True or False for all of them in every
        row that matters, else bool `[rows or 1, width]` on `device`."""
        if self._empty:
            return False
        first_start, last_start, first_stop, last_stop = self._bounds
        if first + width <= first_start or first >= last_stop:
            return False
        if first >= last_start and first + width <= first_stop:
            return True
        if device not in self._on_device:
            self._on_device[device] = self._start[:, None].to(device), self._stop[:, None].to(device)
        start, stop = self._on_device[device]
        column = torch.arange(first, first + width, device=device)
        return (column >= start) & (column < stop)


class ColumnTracker:
    """Follow a model's forwards: the columns that the current one reads, and where generated tokens begin.

    A hook on the text backbone reads, before each forward, the width of the input and the length of the cache.
    Without `prompt_length`, a forward that starts with an empty cache reads the prompt, and one-token forwards on a
    cache read generated tokens. The virtual tokens of a prompt-learning adapter are columns in front of the prompt.
    """

    prompt_length: int | Tensor | None
    """Columns of the prompt, or one number for each row (on the CPU); None before the first forward."""
    first: int  # Column of the first token of the current forward
    width: int  # Columns of the current forward; 0 before the first one
    prompt_seen: bool  # Whether a forward has read a token of a prompt
    generated_seen: bool  # Whether a forward has read a generated token

    def __init__(self, prompt_length: int | Tensor | None = None) -> None:
        self._given = None if prompt_length is None else whole_numbers("prompt_length", prompt_length)
        self.prompt_length = None
        self.first = self.width = 0
        self.prompt_seen = self.generated_seen = False
        self._bounds = (0, 0)
        self._virtual = 0
        self._counted = True

    def attach(self, model: nn.Module) -> RemovableHandle:
        """Look before every forward of `model` until the handle is removed. ValueError: see `check_counted`."""
        backbone, _ = text_backbone(model)
        names = list(inspect.signature(backbone.forward).parameters)
        self._virtual = virtual_tokens(model)
        self._counted = _CACHE in names
        if self._given is None:
            check_counted(model)
        else:
            self.prompt_length = self._given + self._virtual
            lengths = torch.as_tensor(self.prompt_length)
            self._bounds = int(lengths.min()), int(lengths.max())

        # A compiled graph would hold on to the numbers of one forward.
        @torch.compiler.disable
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._look(module, {**dict(zip(names, args, strict=False)), **kwargs})

        return backbone.register_forward_pre_hook(look, with_kwargs=True)

    def _look(self, module: nn.Module, inputs: dict[str, Any]) -> None:
        tokens = inputs.get("input_ids")
        if tokens is None:
            tokens = inputs["inputs_embeds"]
        batch, width = tokens.shape[:2]
        cache = inputs.get(_CACHE)
        if not self._counted and any(inputs.get(name) is not None for name in _STATES):
            raise _uncounted(module)
        # An int; of a StaticCache a tensor, whose reading waits for the device.
        first = 0 if cache is None else int(cache.get_seq_length())
        if self._given is None:
            self._infer(first, width)
        elif isinstance(self._given, Tensor) and self._given.numel() != batch:
            raise UserValueError(f"prompt_length has {self._given.numel()} rows, but the batch has {batch}.")
        self.first, self.width = first, width
        self.prompt_seen |= first < self._bounds[1]
        self.generated_seen |= first + width > self._bounds[0]

    def _infer(self, first: int, width: int) -> None:
        if first in (0, self._virtual):  # prefix tuning puts its virtual tokens into the cache
            self.prompt_length, self._bounds = first + width, (first + width, first + width)
        elif self.prompt_length is None:
            raise RuntimeError(
                f"The first forward inside the block starts with a cache of {first} tokens, so that where generated "
                "tokens begin is unknown; pass steer(..., prompt_length=...)."
            )
        elif width > 1:
            raise RuntimeError(
                f"A forward reads {width} tokens after a cache of {first}: a prompt in pieces (chunked prefill, a "
                "further turn) or speculative decoding. The start of the generated tokens is unknown then; pass "
                "steer(..., prompt_length=...)."
            )


def check_counted(model: nn.Module) -> None:
    """ValueError for a model whose forwards do not say how many tokens they have read before (Mamba, RWKV)."""
    backbone, _ = text_backbone(model)
    if _CACHE not in inspect.signature(backbone.forward).parameters:
        raise _uncounted(backbone)


def _uncounted(backbone: nn.Module) -> UserValueError:
    return UserValueError(
        f"{type(backbone).__name__} has no cache of keys and values, which would tell how many tokens it has read; a "
        "state, such as Mamba's, does not count them. So prompt and generated tokens cannot be distinguished: steer "
        "positions 'all', or run one forward over the whole text with steer(..., prompt_length=...)."
    )
