"""Steering of single requests inside vLLM: what a request may ask for, and the buffers that every step reads.

Nothing here imports vLLM; `vllm_plugin` connects it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError, did_you_mean
from qscope_posttrain.kernels.steering import EDITS, steer_planned_

DIRECTIONS = 256
"""Directions that an engine holds at once."""

_REQUEST_KEYS = {"row", "edits"}
_EDIT_KEYS = {"direction", "layer", "strength", "start", "length", "mode"}
_FOREVER = 2**31 - 1


@dataclass(frozen=True)
class Edit:
    """One direction, added at one layer to the tokens `first <= position < end`, counted from the request's start."""

    direction: str
    layer: int
    strength: float
    first: int
    end: int


def parse_request(raw: Any, layers: int, prompt_length: int, directions: Iterable[str]) -> tuple[str, tuple[Edit, ...]]:
    """Read and check the row name and the edits of a request.

    Args:
        raw (dict or str): What the request carries under `vllm_plugin.KEY`, or the same as JSON.
        layers (int): Decoder layers of the model.
        prompt_length (int): Tokens of the prompt.
        directions (iterable of str): Names of the directions that the engine holds.

    Raises:
        UserValueError: anything unknown, missing, of the wrong type, or more edits at a layer than `EDITS`.
    """
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except ValueError as error:
            raise UserValueError(f"the steering of a request must be a dict or JSON; got {raw[:80]!r}.") from error
    _check_keys("the steering of a request", raw, _REQUEST_KEYS, _REQUEST_KEYS)
    row, listed = raw["row"], raw["edits"]
    if not isinstance(row, str):
        raise UserValueError(f"row must be a string; got {row!r}.")
    if not isinstance(listed, (list, tuple)) or not listed:
        raise UserValueError(f"edits must be a list with at least one edit; got {listed!r}.")
    known = set(directions)
    edits = tuple(_parse_edit(edit, layers, prompt_length, known) for edit in listed)
    for layer in {edit.layer for edit in edits}:
        count = sum(edit.layer == layer for edit in edits)
        if count > EDITS:
            raise UserValueError(f"a request can have {EDITS} edits at a layer; got {count} at layer {layer}.")
    return row, edits


def _parse_edit(raw: Any, layers: int, prompt_length: int, directions: set[str]) -> Edit:
    _check_keys("an edit", raw, _EDIT_KEYS, _EDIT_KEYS - {"mode"})
    if raw.get("mode", "add") != "add":
        raise UserValueError(f"vLLM can steer by mode 'add' only; got {raw['mode']!r}.")
    name, strength = raw["direction"], raw["strength"]
    if name not in directions:
        held = ", ".join(sorted(directions)[:8]) or "none; send them by qscope_put_directions first"
        raise UserValueError(f"unknown direction {name!r}; held: {held}.{did_you_mean(str(name), directions)}")
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise UserValueError(f"strength must be a finite number; got {strength!r}.")
    layer, start = _whole("layer", raw["layer"]), _whole("start", raw["start"])
    if layer >= layers:
        raise UserValueError(f"layer must be one of 0 to {layers - 1}; got {layer}.")
    length = _FOREVER if raw["length"] is None else _whole("length", raw["length"])
    first = prompt_length + start
    return Edit(name, layer, float(strength), first, min(first + length, _FOREVER))


def _check_keys(what: str, raw: Any, known: set[str], needed: set[str]) -> None:
    if not isinstance(raw, Mapping):
        raise UserValueError(f"{what} must be a dict; got {raw!r}.")
    unknown, missing = sorted(set(map(str, raw)) - known), sorted(needed - set(raw))
    if unknown or missing:
        raise UserValueError(
            f"{what} has the keys {', '.join(sorted(known))}; unknown: {', '.join(unknown) or 'none'}, "
            f"missing: {', '.join(missing) or 'none'}."
        )


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserValueError(f"{name} must be a whole number from 0; got {value!r}.")
    return value


@dataclass
class _Request:
    """A steered request: edits per layer as (first, end, table row, bits of the strength), and what was steered."""

    prompt_length: int
    layers: dict[int, list[tuple[int, int, int, int]]]
    reached: int = 0  # Positions below were read before
    seen: bool = False  # Whether a token was read since the counts were last taken
    spans: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # Steered positions per layer


class SteeringBuffers:
    """Directions and plan of one worker: tensors that keep their place in memory, filled before each step.

    Args:
        layers (int): Decoder layers of the model.
        width (int): Entries of its residual stream.
        tokens (int): Most tokens of one step.
        device (torch.device): Where the model runs.
    """

    def __init__(self, layers: int, width: int, tokens: int, device: torch.device) -> None:
        self.table = torch.zeros(DIRECTIONS + 1, width, dtype=torch.float32, device=device)
        self.plan = torch.zeros(layers, tokens, 2 * EDITS, dtype=torch.int32, device=device)
        self.steered = torch.zeros(layers, dtype=torch.int64, device=device)
        """Tokens that the operator changed, counted on the device"""
        self._planned = np.zeros(layers, dtype=np.int64)
        self._rows: dict[str, int] = {}
        self._requests: dict[str, _Request] = {}
        self._counted: dict[str, list[_Request]] = {}
        self._filled: dict[int, int] = {}  # Tokens of the last step by layer

    def put(self, directions: Mapping[str, list[float]]) -> None:
        """Replace the directions by others, and count from here on; requests that run keep their directions.

        What was planned and counted before may belong to a batch that was interrupted.
        """
        width = self.table.shape[1]
        if not isinstance(directions, Mapping) or not all(isinstance(name, str) for name in directions):
            raise UserValueError("directions must be a dict from names to lists of numbers.")
        used = {row for request in self._requests.values() for edits in request.layers.values() for *_, row, _ in edits}
        free = [row for row in range(1, DIRECTIONS + 1) if row not in used]
        if len(directions) > len(free):
            raise UserValueError(f"got {len(directions)} directions; {len(free)} of {DIRECTIONS} places are free.")
        vectors = {name: torch.tensor(values, dtype=torch.float32) for name, values in directions.items()}
        for name, vector in vectors.items():
            if vector.shape != (width,) or not vector.isfinite().all() or not vector.any():
                raise UserValueError(
                    f"direction {name!r} must have {width} finite entries, not all 0; it has {list(vector.shape)}."
                )
        self._rows = dict(zip(vectors, free, strict=False))
        for name, row in self._rows.items():
            self.table[row] = vectors[name].to(self.table.device)
        self._planned = np.array(self._changed(), dtype=np.int64)
        self._count_again()

    def add(self, request_id: str, raw: Any, prompt_length: int) -> None:
        """Take up a steered request; one that comes back after it was preempted goes on as it is."""
        if request_id in self._requests:
            return
        row, edits = parse_request(raw, len(self.plan), prompt_length, self._rows)
        request = _Request(prompt_length, {})
        for edit in edits:
            bits = int(np.float32(edit.strength).view(np.int32))
            entry = edit.first, edit.end, self._rows[edit.direction], bits
            request.layers.setdefault(edit.layer, []).append(entry)
        self._requests[request_id] = request
        self._counted.setdefault(row, []).append(request)

    def remove(self, request_ids: Iterable[str]) -> None:
        """Forget finished requests, but not their counts."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    @property
    def running(self) -> set[str]:
        """Ids of the steered requests that were not removed."""
        return set(self._requests)

    def fill(self, places: Mapping[str, int], firsts: np.ndarray, counts: np.ndarray) -> None:
        """Write the plan of one step.

        Args:
            places: Row of the batch by request id.
            firsts: `[rows]`, the position of each row's first token of this step.
            counts: `[rows]`, its tokens of this step; the rows lie one after another in the flat batch.
        """
        total = int(counts.sum()) if self._requests or self._filled else 0
        entries: dict[int, np.ndarray] = {}
        offsets = np.cumsum(counts) - counts if self._requests else counts
        for request_id, request in self._requests.items():
            if (place := places.get(request_id)) is not None:
                _enter(request, entries, total, int(offsets[place]), int(firsts[place]), int(counts[place]))
        for layer in self._filled.keys() - entries.keys():
            self.plan[layer, : self._filled[layer]].zero_()
        for layer, rows in entries.items():
            if (before := self._filled.get(layer, 0)) > total:
                self.plan[layer, total:before].zero_()
            self.plan[layer, :total].copy_(self._sendable(rows), non_blocking=True)
            self._planned[layer] += np.count_nonzero(rows[:, :EDITS].any(1))
        self._filled = dict.fromkeys(entries, total)

    def _sendable(self, rows: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(rows)
        # A fresh pinned block each time: the allocator does not hand it out again before the copy is done.
        return tensor.pin_memory() if self.plan.is_cuda else tensor

    def take_counts(self, read: Mapping[str, int] | None = None) -> dict[str, int]:
        """Return the steered tokens of each row that was read since the last call, also 0, and start again.

        A position of a request counts once per layer, however often it was computed.

        Args:
            read (dict, default None): Generated tokens by row that the completion's other tokens depend on, one less
                than it has. An engine that schedules ahead reads a final token too; such positions then do not count.

        Raises:
            RuntimeError: the operator changed another number of tokens than the plans said.
        """
        if (done := self._changed()) != self._planned.tolist():
            raise RuntimeError(
                f"Steering did not happen as planned: tokens planned by layer {self._planned.tolist()}, tokens that "
                f"the operator changed {done}. The model may have run without it, from a graph of before the plug-in."
            )
        limits = read or {}
        result = {
            row: sum(_tokens(request, limits.get(row)) for request in requests)
            for row, requests in self._counted.items()
            if any(request.seen for request in requests)
        }
        self._count_again()
        return result

    def _changed(self) -> list[int]:
        """Tokens that the operator has changed so far, by layer."""
        if self.steered.is_cuda:
            torch.cuda.synchronize(self.steered.device)
        changed: list[int] = self.steered.tolist()
        return changed

    def _count_again(self) -> None:
        """Forget the counts, and the requests that do not run any more."""
        running = {id(request) for request in self._requests.values()}
        kept = {row: [r for r in requests if id(r) in running] for row, requests in self._counted.items()}
        self._counted = {row: requests for row, requests in kept.items() if requests}
        for request in self._requests.values():
            request.spans.clear()
            request.seen = False


def _enter(request: _Request, entries: dict[int, np.ndarray], total: int, offset: int, first: int, count: int) -> None:
    """Enter a request's tokens of this step into the plans of its layers, and what of them is new into its spans."""
    end = first + count
    for layer, edits in request.layers.items():
        new = []
        for number, (lower, upper, row, bits) in enumerate(edits):
            start, stop = max(first, lower), min(end, upper)
            if start >= stop:
                continue
            if layer not in entries:
                entries[layer] = np.zeros((total, 2 * EDITS), dtype=np.int32)
            span = entries[layer][offset + start - first : offset + stop - first]
            span[:, number] = row
            span[:, EDITS + number] = bits
            new.append((max(start, request.reached), stop))
        spans = request.spans.setdefault(layer, []) if new else []
        for start, stop in sorted(new):
            if spans and start <= spans[-1][1]:
                spans[-1] = spans[-1][0], max(stop, spans[-1][1])
            elif start < stop:
                spans.append((start, stop))
    request.reached, request.seen = max(request.reached, end), True


def _tokens(request: _Request, read: int | None) -> int:
    limit = _FOREVER if read is None else request.prompt_length + read
    return sum(max(0, min(stop, limit) - start) for spans in request.spans.values() for start, stop in spans)


def make_steerable(model: nn.Module, layers: int, width: int, tokens: int, device: torch.device) -> SteeringBuffers:
    """Pass the output of each decoder layer through the steering operator, for good.

    Args:
        model (Module): Model of vLLM.
        layers (int): Decoder layers that it should have.
        width (int): Entries of its residual stream.
        tokens (int): Most tokens of one step.
        device (torch.device): Where it runs.

    Raises:
        UserValueError: there is not exactly one list of as many layers; in the first forward, a layer returned
            something else than a residual stream.
    """
    names = ("layers", "h", "blocks")
    modules = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in names}
    lists = {name: each for name, each in modules.items() if isinstance(each, nn.ModuleList) and len(each) == layers}
    if len(lists) != 1:
        raise UserValueError(
            f"expected one list of {layers} decoder layers in {type(model).__name__}; found "
            f"{', '.join(lists) or 'none'}. This model cannot be steered in vLLM."
        )
    steering = SteeringBuffers(layers, width, tokens, device)
    for number, layer in enumerate(next(iter(lists.values()))):
        _wrap(layer, number, width, steering)
    return steering


def _wrap(layer: nn.Module, number: int, width: int, steering: SteeringBuffers) -> None:
    original = layer.forward
    # The tensors themselves, not their owner: a captured graph reads them where they are.
    table, plan, steered = steering.table, steering.plan[number], steering.steered[number : number + 1]

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        steer_planned_(*_stream(output, width), table, plan, steered)
        return output

    layer.forward = forward  # type: ignore[method-assign]


def _stream(output: Any, width: int) -> tuple[Tensor, Tensor | None]:
    """Take the residual stream from a layer's output: one tensor, or two whose sum it is."""
    parts = output if isinstance(output, tuple) else (output, None)
    fits = [isinstance(part, Tensor) and part.dim() == 2 and part.shape[1] == width for part in parts]
    if len(parts) == 2 and fits[0] and (fits[1] or parts[1] is None):
        return parts[0], parts[1]
    raise UserValueError(
        f"a decoder layer must return [tokens, {width}], or two of them that add up; got "
        f"{[getattr(part, 'shape', type(part).__name__) for part in parts]}. This model cannot be steered in vLLM."
    )
