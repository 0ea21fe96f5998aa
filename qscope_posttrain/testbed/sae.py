"""Dictionaries for the testbed's model: activations of its last layers, trained, saved in Qwen-Scope's own format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.report.progress import progress
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.testbed.windows import Windows

_BATCH = 32


def collect_activations(model: PreTrainedModel, windows: Windows, layers: Sequence[int]) -> dict[int, Tensor]:
    """Raw outputs of decoder layers on every token but the first of each window: layer -> [tokens, d_model] fp32."""
    collected: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    batches = windows.input_ids.split(_BATCH)
    for batch in progress(batches, total=len(batches), description="collecting activations for the SAEs"):
        for layer, hidden in forward_to_layer(model, layers, input_ids=batch.to(model.device), use_cache=False).items():
            collected[layer].append(hidden[:, 1:].reshape(-1, hidden.shape[-1]).float())
    return {layer: torch.cat(parts) for layer, parts in collected.items()}


def save_qwen_scope(saes: Mapping[int, SparseAutoencoder], folder: Path) -> None:
    """Write `layer{n}.sae.pt` as Qwen-Scope publishes them: keys W_enc, W_dec, b_enc, b_dec and W_dec transposed."""
    for layer, sae in saes.items():
        tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec.T.contiguous(), "b_dec": sae.b_dec}
        torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, folder / f"layer{layer}.sae.pt")
