"""Activations of many layers from one forward stream, in blocks that are shuffled in memory and never stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.distributed import default_reduce, process_rank
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.batches import input_device
from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.models.layers import check_layers, evaluation_mode, text_config
from qscope_posttrain.sae.training.config import ISOLATED, StreamConfig
from qscope_posttrain.sae.training.text_stream import PackedSequence, StreamPosition, TextSource, packed_sequences


@dataclass(frozen=True, eq=False)
class Batch:
    """The activations of one layer for one update."""

    rows: Tensor  # [own tokens, d_model] of this process, on the device of the layer
    tokens: int  # Number of tokens of all processes


class ActivationStream:
    """Fill a block with the activations of the next text, and return them in permuted order.

    The tokens of a block, of all processes, are permuted by a generator seeded with the number of the block, and split
    into its updates. Sequence i of a block belongs to process i modulo their number, which computes its activations and
    contributes those of its tokens that are in a batch. So a batch does not depend on the number of processes.

    The first token of a piece, padding, and norm outliers are left out; outliers are counted. The limit of the norm
    differs by layer, so that batches of one update hold slightly different tokens in different layers.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        source: TextSource,
        layers: Sequence[int],
        config: StreamConfig,
        batch_tokens: int,
        seed: int = 0,
        first_document: int = 0,
    ) -> None:
        """ValueError if a block does not fit the memory, the batch, the model's positions or the processes."""
        self.model, self.tokenizer, self.source, self.config = model, tokenizer, source, config
        self.layers = check_layers(model, layers)
        self.seed, self.first_document = seed, first_document
        self.rank, self.processes = process_rank()
        self.d_model = text_config(model).hidden_size
        self.updates_per_block = config.block_sequences * config.context_length // batch_tokens
        positions = getattr(text_config(model), "max_position_embeddings", None)
        if positions and config.context_length > positions:
            raise UserValueError(
                f"context_length={config.context_length}, but the model has only {positions} positions"
            )
        if self.updates_per_block < 1:
            raise UserValueError(
                f"a block of {config.block_tokens} tokens holds no batch of {batch_tokens}: raise block_tokens"
            )
        if config.block_sequences < self.processes:
            raise UserValueError(
                f"a block of {config.block_sequences} sequences leaves some of {self.processes} processes without one: "
                "raise block_tokens"
            )
        needed = config.buffer_bytes(len(self.layers), self.d_model, self.processes) / 1024**3
        if needed > config.max_buffer_gib:
            raise UserValueError(
                f"a block of {config.block_tokens} tokens of {len(self.layers)} layers of width {self.d_model} takes "
                f"{needed:.1f} GiB in {config.buffer_dtype} on each of {self.processes} process(es), more than "
                f"max_buffer_gib={config.max_buffer_gib:g}: lower block_tokens, take fewer layers at a time, choose "
                "buffer_dtype bfloat16, or raise max_buffer_gib"
            )
        self.medians: dict[int, float] = {}  # Median norm of each layer, computed on the first block
        self.left_out = dict.fromkeys(self.layers, 0)  # Number of norm outliers of each layer so far, of all processes
        self.left_out_before = dict(self.left_out)  # The same, without the block in memory
        self.start = self.end = StreamPosition()  # Start and end of the block in memory
        self.block = -1  # Number of the block in memory
        self._dtype: torch.dtype = getattr(torch, config.buffer_dtype)
        self._rows: dict[int, Tensor] = {}
        self._norms: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}
        self._batches: dict[int, list[tuple[Tensor, int]]] = {}
        self._devices: dict[int, torch.device] = {}
        self._checked = config.packing != ISOLATED

    def go_to(self, block: int, start: StreamPosition) -> None:
        """Make `block`, which begins at `start`, the next one to be filled."""
        self.block, self.end = block - 1, start

    def fill(self) -> None:
        """Read the next block into memory. ValueError: NaN or infinite activations, or documents that attend to each
        other where they must not."""
        config = self.config
        self.block, self.start, self.left_out_before = self.block + 1, self.end, dict(self.left_out)
        stream = packed_sequences(
            self.source, self.tokenizer, config.context_length, self.start, config.packing, self.first_document
        )
        sequences = list(islice(stream, config.block_sequences))
        self.end = sequences[-1].end
        if not self._checked:
            check_isolation(self.model, self.layers, sequences[0].ids)
            self._checked = True
        self._read(sequences[self.rank :: self.processes])
        counts = torch.tensor([sequence.counted() for sequence in sequences]).flatten()
        if not self.medians:
            self.medians = {layer: self._median(layer, counts) for layer in self.layers}
        self._batches = {layer: self._split(layer, counts) for layer in self.layers}

    def batch(self, layer: int, update: int) -> Batch:
        """The batch of update `update` of this block (0 to updates_per_block - 1)."""
        rows, tokens = self._batches[layer][update]
        own = self._rows[layer].index_select(0, rows.to(self._rows[layer].device, torch.int64))
        return Batch(own.to(self._devices[layer]), tokens)

    def calibration_rows(self, layer: int) -> Tensor:
        """Activations of this process in the calibration sample (the first sequences): [tokens, d_model]."""
        config = self.config
        sample = min(config.block_sequences, math.ceil(config.calibration_tokens / config.context_length))
        own = len(range(self.rank, sample, self.processes)) * config.context_length
        kept = self._kept[layer][:own]
        return self._rows[layer][:own][kept.to(self._rows[layer].device)].to(self._devices[layer])

    def _read(self, sequences: list[PackedSequence]) -> None:
        config, length = self.config, self.config.context_length
        at_once = max(1, config.forward_tokens // length)
        device = input_device(self.model)
        with evaluation_mode(self.model):
            for first in range(0, len(sequences), at_once):
                part = sequences[first : first + at_once]
                inputs = {"input_ids": torch.tensor([sequence.ids for sequence in part], device=device)}
                if config.packing == ISOLATED:
                    inputs["position_ids"] = torch.tensor([sequence.positions() for sequence in part], device=device)
                for layer, hidden in forward_to_layer(self.model, self.layers, **inputs).items():
                    self._store(layer, hidden.flatten(0, 1), first * length, len(sequences) * length)

    def _store(self, layer: int, hidden: Tensor, first: int, total: int) -> None:
        if layer not in self._rows or len(self._rows[layer]) != total:
            place = "cpu" if self.config.buffer_device == "cpu" else hidden.device
            self._rows[layer] = torch.empty(total, self.d_model, dtype=self._dtype, device=place)
            self._norms[layer] = torch.empty(total, dtype=torch.float32)
            self._devices[layer] = hidden.device
        self._rows[layer][first : first + len(hidden)] = hidden.to(self._rows[layer].device)
        self._norms[layer][first : first + len(hidden)] = torch.linalg.vector_norm(hidden.float(), dim=1).cpu()

    def _shared_norms(self, layer: int) -> Tensor:
        """Norms of the whole block, [sequences * length], the same on all processes."""
        whole = torch.zeros(self.config.block_sequences, self.config.context_length)
        whole[self.rank :: self.processes] = self._norms[layer].view(-1, self.config.context_length)
        return default_reduce()(whole).flatten()

    def _median(self, layer: int, counts: Tensor) -> float:
        sample = math.ceil(self.config.calibration_tokens / self.config.context_length) * self.config.context_length
        norms = self._shared_norms(layer)
        chosen = norms[:sample][counts[:sample]]
        if chosen.numel() == 0:
            raise UserValueError("the text has no document of two tokens: the first token of a document never counts")
        median = float(chosen.median())
        if not (math.isfinite(median) and median > 0):
            raise UserValueError(f"the residual stream of layer {layer} has median norm {median}: the model is broken")
        return median

    def _split(self, layer: int, counts: Tensor) -> list[tuple[Tensor, int]]:
        """For each update the rows that this process contributes, and the number of tokens of all processes."""
        length, norms = self.config.context_length, self._shared_norms(layer)
        broken = int((~norms[counts].isfinite()).sum())
        if broken:
            raise UserValueError(
                f"layer {layer}: {broken} of {int(counts.sum())} residual vectors hold NaN or infinite values. The "
                "model is broken, or its dtype overflows: load it in bfloat16 or float32."
            )
        limit = self.config.outlier_factor * self.medians[layer]
        if limit > torch.finfo(self._dtype).max:
            raise UserValueError(
                f"layer {layer}: norms up to {limit:g} overflow {self.config.buffer_dtype}: choose bfloat16"
            )
        kept = counts & (norms <= limit)
        self.left_out[layer] += int((counts & ~kept).sum())
        self._kept[layer] = kept.view(-1, length)[self.rank :: self.processes].flatten()
        order = kept.nonzero().squeeze(1)
        generator = torch.Generator().manual_seed((self.seed << 32) + self.block)
        order = order[torch.randperm(len(order), generator=generator)]
        sequence, place = order // length, order % length
        row = (sequence // self.processes * length + place).to(torch.int32)
        own = sequence % self.processes == self.rank
        parts = zip(row.tensor_split(self.updates_per_block), own.tensor_split(self.updates_per_block), strict=True)
        return [(rows[mine].clone(), len(rows)) for rows, mine in parts]


@torch.no_grad()
def check_isolation(model: nn.Module, layers: Sequence[int], ids: Sequence[int]) -> None:
    """ValueError if restarting the positions does not isolate two pieces of one sequence.

    The second half of `ids` is read alone, after the first half with restarted positions, and after it as one text.
    The second reading must be at least ten times closer to the first than the third is.
    """
    half = len(ids) // 2
    device, deepest = input_device(model), [max(layers)]
    whole = torch.tensor([list(ids[: 2 * half])], device=device)
    positions = torch.arange(half, device=device).repeat(2)[None]
    with evaluation_mode(model):
        alone = forward_to_layer(model, deepest, input_ids=whole[:, half:])[deepest[0]].float()
        packed = forward_to_layer(model, deepest, input_ids=whole, position_ids=positions)[deepest[0]][:, half:].float()
        joined = forward_to_layer(model, deepest, input_ids=whole)[deepest[0]][:, half:].float()
    if float((packed - alone).norm()) > 0.1 * float((joined - alone).norm()):
        raise UserValueError(
            f"{type(model).__name__} lets documents that are packed into one sequence see each other, whatever their "
            "positions are: choose packing: separate (one document per sequence), or joined to accept that."
        )
