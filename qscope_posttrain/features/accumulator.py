"""Sums of one layer: what a batch adds, what processes add up to, and what the norm outliers are measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qscope_posttrain.distributed import default_reduce
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.kernels.statistics import feature_statistics_
from qscope_posttrain.models.calibration import LanguageRows
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

CODE_ENTRIES = 1 << 24
"""Entries of sparse codes held at a time: at most 128 MiB, 512 tokens of a ReLU dictionary of 32768 latents."""


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


def reduce_over_processes(sums: Mapping[int, LayerSums]) -> None:
    """Add up the sums of all processes, in place."""
    reduce = default_reduce()
    for layer in sorted(sums):
        for value in sums[layer].tensors().values():
            reduce(value)
