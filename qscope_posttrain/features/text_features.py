"""Features that fire on each text, from one streaming pass that keeps a sparse row per text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qscope_posttrain.distributed import process_rank
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.models.batches import Text, check_texts, longest_allowed, pad_token, token_batches, tokenize_texts
from qscope_posttrain.models.calibration import calibrate, calibration_sample, layer_rows
from qscope_posttrain.models.layers import check_layers, evaluation_mode
from qscope_posttrain.report.progress import progress
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Pooling = Literal["last", "max", "mean"]


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """The features of one layer on N texts, pooled over the tokens of each: a sparse matrix `[N, d_sae]`, on the CPU.

    Features that fire nowhere in a text are absent from its row, so a row is the set F(x) of equation 2 of the
    Qwen-Scope report (with pooling "last"), or the features with h = 1 of its equation 13 (with "max" or "mean").
    """

    matrix: csr_array
    """[N, d_sae] fp32, entries above 0: activation at the last token, or its maximum or mean over those that count"""
    tokens: Tensor  # [N] int64: tokens behind each row; 0 where none counts
    truncated: Tensor  # [N] bool: the text was cut, so that its last tokens were not read
    residual: Tensor | None = None  # [N, d_model] fp32, at the last token or averaged; None if not requested
    median_norm: float = math.nan  # Of the layer's residual stream, which decides on outliers; NaN if not known

    def __len__(self) -> int:
        return len(self.tokens)


def collect_text_features(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    saes: Mapping[int, SparseAutoencoder],
    *,
    pooling: Pooling = "max",
    residual: bool = False,
    tokens_per_batch: int = 4096,
    max_length: int = 512,
    outlier_factor: float = 10.0,
    median_norms: Mapping[int, float] | None = None,
    show_progress: bool | None = None,
) -> dict[int, TextFeatures]:
    """Run the model once over `texts`, and pool what fires on each of them: {layer: TextFeatures}, in their order.

    The tokens that count, and the arguments not named here, are those of `statistics.collect_statistics`, also with
    several processes; all return everything. With pooling "last" a text whose last token is a norm outlier has an empty
    row. Memory: 8 bytes per entry, at most k entries per text with pooling "last", at most tokens * k otherwise.

    Args:
        pooling: "last" token, "max" or "mean" over the tokens that count.
        residual: keep the residual stream too, pooled alike (the mean, for "max"): the input of a linear probe.
        median_norms: {layer: norm} measured before, so that a text's row does not depend on the texts beside it.
    """
    require_extra("analysis")
    if pooling not in get_args(Pooling):
        raise UserValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}.")
    check_texts({"texts": texts})
    layers = check_layers(model, sorted(saes))
    if median_norms is not None and not set(layers) <= set(median_norms):
        raise UserValueError(f"median_norms must have the layers {list(layers)}, got {sorted(median_norms)}.")
    sequences = tokenize_texts(tokenizer, {"texts": texts}, longest_allowed(model, max_length))
    pad_id = pad_token(tokenizer)
    sample = token_batches(calibration_sample(sequences)[0], tokens_per_batch, pad_id)
    batches = token_batches(sequences, tokens_per_batch, pad_id)
    rank, processes = process_rank()
    parts: dict[int, list[dict[str, Tensor]]] = {layer: [] for layer in layers}
    with evaluation_mode(model), torch.no_grad():
        medians = calibrate(model, layers, sample).medians if median_norms is None else dict(median_norms)
        shown = progress(batches[rank::processes], description="features of each text", enabled=show_progress)
        for batch in shown:
            counts = torch.tensor([sequence.counted for sequence in batch.sequences])
            owners = torch.tensor([sequence.text for sequence in batch.sequences]).repeat_interleave(counts)
            last = torch.zeros(len(owners), dtype=torch.bool)
            last[(counts.cumsum(0) - 1)[counts > 0]] = True
            for layer, rows, _ in layer_rows(model, layers, batch):
                rows = rows.float()
                kept = (torch.linalg.vector_norm(rows, dim=1) <= outlier_factor * medians[layer]).cpu()
                if pooling == "last":
                    kept &= last
                part = _pool(rows[kept.to(rows.device)], owners[kept], saes[layer], pooling, residual)
                parts[layer].append(part)
    if processes > 1:
        gathered: list[Any] = [None] * processes
        dist.all_gather_object(gathered, parts)
        parts = {layer: [part for found in gathered for part in found[layer]] for layer in layers}
    truncated = torch.zeros(len(texts), dtype=torch.bool)
    truncated[[sequence.text for sequence in sequences if sequence.truncated]] = True
    return {
        layer: _assemble(parts[layer], len(texts), saes[layer].d_sae, truncated, medians[layer]) for layer in layers
    }


def _pool(rows: Tensor, owners: Tensor, sae: SparseAutoencoder, pooling: Pooling, residual: bool) -> dict[str, Tensor]:
    """Pool the fp32 states `rows` [tokens, d_model] of the texts `owners` [tokens] of one batch, which holds them
    whole: the entries of the matrix, and tokens and state (of width 0 if not wanted) of each text, on the CPU."""
    texts, position, tokens = owners.unique(return_inverse=True, return_counts=True)
    values, indices = (part.cpu() for part in sae.encode(rows.to(sae.device, sae.dtype)))
    fires = values > 0
    keys = owners[:, None].expand_as(indices)[fires] * sae.d_sae + indices[fires].long()
    keys, entry = keys.unique(return_inverse=True)
    pooled = torch.zeros(len(keys), dtype=torch.float64)
    pooled.scatter_reduce_(0, entry, values[fires].double(), "amax" if pooling == "max" else "sum")
    entry_texts = keys // sae.d_sae
    if pooling == "mean":
        pooled /= tokens[torch.searchsorted(texts, entry_texts)]
    states = rows.cpu().double() if residual else rows.new_zeros(len(rows), 0, device="cpu", dtype=torch.float64)
    states = torch.zeros(len(texts), states.shape[1], dtype=torch.float64).index_add_(0, position, states)
    found = {"entry_texts": entry_texts, "indices": keys % sae.d_sae, "values": pooled.float()}
    return found | {"texts": texts, "tokens": tokens, "states": (states / tokens[:, None]).float()}


def _assemble(
    parts: Sequence[dict[str, Tensor]], count: int, d_sae: int, truncated: Tensor, median_norm: float
) -> TextFeatures:
    from scipy.sparse import csr_array

    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    places = (found["entry_texts"].numpy(), found["indices"].numpy())
    matrix = csr_array((found["values"].numpy(), places), shape=(count, d_sae))
    tokens = torch.zeros(count, dtype=torch.long).index_copy_(0, found["texts"], found["tokens"])
    states = torch.zeros(count, found["states"].shape[1]).index_copy_(0, found["texts"], found["states"])
    return TextFeatures(matrix, tokens, truncated, states if states.shape[1] else None, median_norm)
