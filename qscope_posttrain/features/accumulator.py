"""Sums of one layer: what a batch adds, what processes add up to, and what the norm outliers are measured against."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.kernels.statistics import feature_statistics_
from qscope_posttrain.models.batches import TokenBatch, TokenSequence, input_device
from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

CALIBRATION_TOKENS = 1024
"""Tokens behind the median norm. The median of so many is known to about 1 %, the outlier limit is 10 times away. Their
residual vectors are held in all layers: 0.3 GiB in bf16 for 36 layers of width 4096."""

CODE_ENTRIES = 1 << 24
"""Entries of sparse codes held at a time: at most 128 MiB, 512 tokens of a ReLU dictionary of 32768 latents."""


@dataclass(frozen=True)
class LanguageRows:
    """Neighbouring rows of one batch that belong to one language."""

    language: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class LayerSums:
    """Running sums of one layer, on the device where they are added up; see `statistics.LayerStatistics`."""

    tokens: Tensor
    outliers: Tensor
    residual_sum: Tensor
    residual_second_moment: Tensor | None
    activation_sum: Tensor | None
    firing_count: Tensor | None

    @classmethod
    def zeros(
        cls, languages: int, d_model: int, sae: SparseAutoencoder | None, second_moments: bool, device: torch.device
    ) -> LayerSums:
        if device.type == "mps":  # has no fp64
            device = torch.device("cpu")

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            tokens=zeros(languages, dtype=torch.int64),
            outliers=zeros(languages, dtype=torch.int64),
            residual_sum=zeros(languages, d_model),
            residual_second_moment=zeros(languages, d_model, d_model) if second_moments else None,
            activation_sum=zeros(languages, sae.d_sae) if sae is not None else None,
            firing_count=zeros(languages, sae.d_sae, dtype=torch.int64) if sae is not None else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The sums that are kept, by name."""
        return {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}

    @torch.no_grad()
    def add(
        self, rows: Tensor, groups: Sequence[LanguageRows], norm_limit: float, sae: SparseAutoencoder | None
    ) -> None:
        """Add the residual vectors `rows` [tokens, d_model] of one batch.

        Outliers are replaced by zeros instead of being taken out, so that no shape depends on the data and a GPU
        never has to wait for the host.
        """
        rows = rows.float()
        kept = torch.linalg.vector_norm(rows, dim=1) <= norm_limit
        rows = torch.where(kept[:, None], rows, 0.0)
        device = self.residual_sum.device
        exact, counted = rows.to(device, torch.float64), kept.to(device)
        for group in groups:
            part, share = exact[group.start : group.stop], counted[group.start : group.stop]
            self.tokens[group.language] += share.sum()
            self.outliers[group.language] += (~share).sum()
            self.residual_sum[group.language] += part.sum(dim=0)
            if self.residual_second_moment is not None:
                self.residual_second_moment[group.language].addmm_(part.T, part)
        if sae is not None and self.activation_sum is not None and self.firing_count is not None:
            owners = torch.repeat_interleave(
                torch.tensor([group.language for group in groups], dtype=torch.long),
                torch.tensor([group.stop - group.start for group in groups], dtype=torch.long),
            )
            # A negative owner is left out.
            owners = torch.where(counted, owners.to(device), -1)
            step = tokens_at_a_time(sae)
            for part, mine in zip(rows.to(sae.device, sae.dtype).split(step), owners.split(step), strict=True):
                values, indices = (tensor.to(device) for tensor in sae.encode(part))
                feature_statistics_(
                    values, indices, mine, activation_sum=self.activation_sum, firing_count=self.firing_count
                )


def tokens_at_a_time(sae: SparseAutoencoder) -> int:
    """Tokens to encode in one go, so that their code has at most `CODE_ENTRIES` entries, however many latents fire."""
    width = sae.activation.k if isinstance(sae.activation, TopK) else sae.d_sae
    return max(1, CODE_ENTRIES // width)


def layer_rows(
    model: nn.Module, layers: Sequence[int], batch: TokenBatch
) -> Iterator[tuple[int, Tensor, list[LanguageRows]]]:
    """For each layer the residual vectors [tokens, d_model] of the tokens that count, and whose they are."""
    hidden = forward_to_layer(model, layers, input_ids=batch.input_ids.to(input_device(model)))
    positions = batch.positions()
    groups = language_rows(batch)
    for layer in layers:
        states = hidden.pop(layer)
        yield layer, states.flatten(0, 1).index_select(0, positions.to(states.device)), groups


def language_rows(batch: TokenBatch) -> list[LanguageRows]:
    """Where the rows of each language lie among the tokens of a batch that count."""
    groups: list[LanguageRows] = []
    start = 0
    for sequence in batch.sequences:
        stop = start + sequence.counted
        if groups and groups[-1].language == sequence.language:
            groups[-1] = LanguageRows(sequence.language, groups[-1].start, stop)
        else:
            groups.append(LanguageRows(sequence.language, start, stop))
        start = stop
    return groups


@dataclass(frozen=True, eq=False)
class Calibration:
    """A fixed sample of the texts, read ahead of the rest to learn what an outlier is."""

    medians: dict[int, float]
    """Median residual norm of each layer"""
    devices: dict[int, torch.device]
    """Where each layer is"""
    rows: list[tuple[int, Tensor, list[LanguageRows]]]
    """What `layer_rows` gave for the sample, kept so that it need not be read again"""


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
    norms = {
        layer: [torch.linalg.vector_norm(r.float(), dim=1) for at, r, _ in rows if at == layer] for layer in layers
    }
    devices = {layer: found.device for layer, found, _ in rows}
    medians = torch.tensor([float(torch.cat(norms[layer]).median()) for layer in layers], dtype=torch.float64)
    if process_rank()[1] > 1:
        # Processes may round differently; all must leave out the same tokens.
        shared = medians.to(_communication_device(devices[layers[0]]))
        dist.broadcast(shared, src=0)
        medians = shared.cpu()
    for layer, median in zip(layers, medians.tolist(), strict=True):
        if not math.isfinite(median) or median == 0:
            raise UserValueError(f"The residual stream of layer {layer} has median norm {median}: the model is broken.")
    return Calibration(dict(zip(layers, medians.tolist(), strict=True)), devices, rows)


def check_sums_fit(
    languages: int, d_model: int, widths: Mapping[int, int], second_moments: bool, max_sums_gib: float
) -> None:
    """Raise a ValueError with advice when the sums of all layers would exceed the budget."""
    gib = 1024**3
    squares = len(widths) * languages * d_model**2 * 8 / gib if second_moments else 0.0
    total = squares + languages * sum(d_model + 2 * width for width in widths.values()) * 8 / gib
    if total > max_sums_gib:
        raise UserValueError(
            f"The sums of {len(widths)} layers x {languages} languages need {total:.1f} GiB ({squares:.1f} GiB of it "
            f"second moments), more than max_sums_gib={max_sums_gib:g}. Take fewer layers at a time, set "
            "second_moments=False (no standard deviations, no directions with covariances), or raise max_sums_gib."
        )


def process_rank() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) when nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def reduce_over_processes(sums: Mapping[int, LayerSums]) -> None:
    """Add up the sums of all processes, in place."""
    if process_rank()[1] == 1:
        return
    for layer in sorted(sums):
        for value in sums[layer].tensors().values():
            shared = value.to(_communication_device(value.device))
            dist.all_reduce(shared)
            if shared is not value:
                value.copy_(shared)


def _communication_device(device: torch.device) -> torch.device:
    """NCCL moves CUDA tensors only; gloo takes what lies on the CPU."""
    if dist.get_backend() == "nccl":
        return device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
