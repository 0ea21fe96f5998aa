"""Sums of a pass over texts: what a batch adds, what processes add up to, and the checkpoint of an unfinished pass."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.files import replacing
from qscope_posttrain.kernels.statistics import feature_statistics_
from qscope_posttrain.models.batches import TokenSequence
from qscope_posttrain.models.calibration import LanguageRows
from qscope_posttrain.report.progress import status
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

FORMAT = "qscope_posttrain.pass_checkpoint"
SAME_MEDIAN = 1e-4  # Relative difference of median norms up to which the weights count as the same
CODE_ENTRIES = 1 << 24  # Entries of sparse codes held at a time: at most 128 MiB


@dataclass(frozen=True, eq=False)
class LayerSums:
    """Sums over the counted tokens of one layer, fp64 and int64, on the device where they are added up. L languages, d
    = d_model, S = d_sae."""

    tokens: Tensor  # [L] counted tokens
    outliers: Tensor  # [L] tokens left out because their norm exceeds outlier_factor times the median norm
    residual_sum: Tensor  # [L, d]
    residual_second_moment: Tensor | None  # [L, d, d] sum of h h', or None if not requested
    activation_sum: Tensor | None  # [L, S] sum of post-activations, or None without an SAE
    firing_count: Tensor | None  # [L, S] tokens with a post-activation above zero, or None without an SAE

    @classmethod
    def zeros(
        cls, languages: int, d_model: int, sae: SparseAutoencoder | None, second_moments: bool, device: torch.device
    ) -> LayerSums:
        if device.type == "mps":  # has no fp64
            device = torch.device("cpu")
        exact: dict[str, Any] = {"dtype": torch.float64, "device": device}
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        return cls(
            tokens=torch.zeros(languages, **whole),
            outliers=torch.zeros(languages, **whole),
            residual_sum=torch.zeros(languages, d_model, **exact),
            residual_second_moment=torch.zeros(languages, d_model, d_model, **exact) if second_moments else None,
            activation_sum=torch.zeros(languages, sae.d_sae, **exact) if sae is not None else None,
            firing_count=torch.zeros(languages, sae.d_sae, **whole) if sae is not None else None,
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
        kept = ~(torch.linalg.vector_norm(rows, dim=1) > norm_limit)  # NaN stays, and shows in the sums
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


class PassCheckpoint:
    """Checkpoint of the sums of one process; does nothing when no path is given."""

    def __init__(
        self, path: str | Path | None, key: Mapping[str, Any], medians: Mapping[int, float], rank: int, processes: int
    ) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and not self.path.parent.is_dir():
            raise UserFileNotFoundError(f"No checkpoint at {self.path}: the folder {self.path.parent} does not exist.")
        if self.path is not None and processes > 1:
            self.path = self.path.with_name(f"{self.path.name}.rank{rank}")
        self.key = json.dumps({**key, "rank": rank}, sort_keys=True)
        self.medians = {str(layer): median for layer, median in medians.items()}

    def resume(self, sums: Mapping[int, LayerSums]) -> int:
        """Fill `sums` from the file if it belongs to this pass; returns the number of batches already in them."""
        if self.path is None or not self.path.exists():
            return 0
        try:
            with safe_open(str(self.path), framework="pt") as file:
                done = self._matching(file.metadata() or {}, set(file.keys()), sums)
                if done is None:
                    status(f"{self.path} belongs to another pass; starting from the beginning.", enabled=True)
                    return 0
                values = {f"{layer}.{name}": v for layer, part in sums.items() for name, v in part.tensors().items()}
                read = {name: file.get_tensor(name) for name in values}
            if any(read[name].shape != value.shape for name, value in values.items()):
                raise SafetensorError("a tensor has another shape")
            for name, value in values.items():
                value.copy_(read[name])
        except (SafetensorError, OSError) as error:
            status(f"{self.path} is damaged ({error}); starting from the beginning.", enabled=True)
            return 0
        status(f"Resuming from {self.path}: {done} batches are done.", enabled=True)
        return done

    def _matching(self, metadata: Mapping[str, str], names: set[str], sums: Mapping[int, LayerSums]) -> int | None:
        expected = {f"{layer}.{name}" for layer, layer_sums in sums.items() for name in layer_sums.tensors()}
        try:
            document = json.loads(metadata.get(FORMAT, "{}"))
            medians, done = document["medians"], int(document["batches"])
            same = (
                document.get("key") == self.key
                and names == expected
                and medians.keys() == self.medians.keys()
                and all(math.isclose(medians[i], self.medians[i], rel_tol=SAME_MEDIAN) for i in medians)
            )
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            return None
        return done if same and done >= 0 else None

    def write(self, sums: Mapping[int, LayerSums], batches: int) -> None:
        """Replace the file by the current state."""
        if self.path is None:
            return
        tensors = {f"{layer}.{name}": v.cpu() for layer, part in sums.items() for name, v in part.tensors().items()}
        document = json.dumps({"key": self.key, "medians": self.medians, "batches": batches})
        with replacing(self.path) as unfinished:
            unfinished.write_bytes(save(tensors, metadata={FORMAT: document}))

    def delete(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def describe_sae(sae: SparseAutoencoder | None) -> dict[str, Any] | None:
    """Describe an SAE well enough to distinguish two, also of unknown source: shape, source, norms of the weights."""
    if sae is None:
        return None
    norms = {name: float(torch.linalg.vector_norm(getattr(sae, name).float())) for name in ("W_enc", "b_enc")}
    shape = {"d_sae": sae.d_sae, "d_model": sae.d_model}
    return {"source": str(sae.source), **shape, "activation": repr(sae.activation), **norms}


def sequence_fingerprint(sequences: Sequence[TokenSequence], languages: Sequence[str]) -> str:
    """SHA-256 over the token ids of all sequences, their languages and where they count, whatever their order."""
    digest = hashlib.sha256()
    for language, content, start in sorted((languages[s.language], s.content_hash(), s.start) for s in sequences):
        digest.update(language.encode() + b"\0" + content + start.to_bytes(8, "little"))
    return digest.hexdigest()
