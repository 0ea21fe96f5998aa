"""Norms of the residual stream on a fixed sample of the texts, from which the limit of outliers is derived."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qscope_posttrain.distributed import communication_device, process_rank
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.batches import TokenBatch, TokenSequence, input_device
from qscope_posttrain.models.capture import forward_to_layer

CALIBRATION_TOKENS = 1024
"""Tokens behind the median norm, which is then known to about 1 %; the outlier limit is 10 times away. Their residual
vectors are held in all layers: 0.3 GiB in bf16 for 36 layers of width 4096."""


class LanguageRows(NamedTuple):
    """Neighboring rows of one batch that belong to one language."""

    language: int
    start: int
    stop: int


def layer_rows(
    model: nn.Module, layers: Sequence[int], batch: TokenBatch
) -> Iterator[tuple[int, Tensor, list[LanguageRows]]]:
    """Yield for each layer the residual vectors [tokens, d_model] of the tokens that count, and their languages."""
    hidden = forward_to_layer(model, layers, input_ids=batch.input_ids.to(input_device(model)))
    positions = batch.positions()
    groups = language_rows(batch)
    for layer in layers:
        states = hidden.pop(layer)
        yield layer, states.flatten(0, 1).index_select(0, positions.to(states.device)), groups


def language_rows(batch: TokenBatch) -> list[LanguageRows]:
    """Where the rows of each language lie among the tokens of a batch that count."""
    groups: list[LanguageRows] = []
    stop = 0
    for language, sequences in groupby(batch.sequences, key=attrgetter("language")):
        start, stop = stop, stop + sum(sequence.counted for sequence in sequences)
        groups.append(LanguageRows(language, start, stop))
    return groups


@dataclass(frozen=True, eq=False)
class Calibration:
    """A fixed sample of the texts, read ahead of the rest to find the limit of outliers."""

    medians: dict[int, float]  # Median residual norm of each layer
    devices: dict[int, torch.device]  # Device of each layer
    rows: list[tuple[int, Tensor, list[LanguageRows]]]  # `layer_rows` of the sample, which need not be read again


def calibration_sample(sequences: Sequence[TokenSequence]) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """(sample, rest). The sample is the sequences with the smallest content hashes: order and process do not matter."""
    ordered = sorted(sequences, key=TokenSequence.content_hash)
    taken = tokens = 0
    while taken < len(ordered) and tokens < CALIBRATION_TOKENS:
        tokens += ordered[taken].counted
        taken += 1
    return ordered[:taken], ordered[taken:]


def calibrate(model: nn.Module, layers: Sequence[int], batches: Sequence[TokenBatch]) -> Calibration:
    """Read the batches of the sample."""
    rows = [found for batch in batches for found in layer_rows(model, layers, batch)]
    devices = {layer: found.device for layer, found, _ in rows}
    norms = [[torch.linalg.vector_norm(r.float(), dim=1) for at, r, _ in rows if at == layer] for layer in layers]
    medians = torch.tensor([float(torch.cat(of_layer).median()) for of_layer in norms], dtype=torch.float64)
    if process_rank()[1] > 1:
        # Processes may round differently; all must leave out the same tokens.
        shared = medians.to(communication_device(devices[layers[0]]))
        dist.broadcast(shared, src=0)
        medians = shared.cpu()
    by_layer: dict[int, float] = dict(zip(layers, medians.tolist(), strict=True))
    for layer, median in by_layer.items():
        if not math.isfinite(median) or median == 0:
            raise UserValueError(f"The residual stream of layer {layer} has median norm {median}: the model is broken.")
    return Calibration(by_layer, devices, rows)
