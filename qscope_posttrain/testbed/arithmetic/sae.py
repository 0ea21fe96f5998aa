"""SAEs on every layer of the arithmetic model, trained on documents that hold the habit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.report.progress import progress
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.training import SAETrainingConfig, explained_variance, train_saes
from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.arithmetic.language_model import ArithmeticModel, document_rows
from qscope_posttrain.testbed.arithmetic.pretrain import Row
from qscope_posttrain.testbed.cache import Cache
from qscope_posttrain.testbed.sae import save_qwen_scope

_SOURCES = ("testbed/arithmetic/sae.py",)
_SETTINGS = (
    "fewest_operations", "most_operations", "noise", "answer_tokens", "model_seed",
    "sae_latents", "sae_k", "sae_steps", "sae_learning_rate", "sae_documents", "sae_loops",
)  # fmt: skip
_BATCH = 64
_HELD_OUT_DOCUMENTS = 400


@dataclass(frozen=True)
class ArithmeticSAEs:
    """The dictionaries of a model."""

    saes: dict[int, SparseAutoencoder]
    """By layer, as read back from Qwen-Scope files."""
    explained_variance: dict[int, float]
    """On held-out documents."""
    folder: Path
    key: str


def make_saes(config: ArithmeticConfig, cache: Cache, language_model: ArithmeticModel) -> ArithmeticSAEs:
    """Train one SAE a layer, or take them from the cache; both ways they come from their files."""
    key = cache.key(config.subset(*_SETTINGS), _SOURCES, [language_model.key])
    folder = cache.folder("arithmetic-saes", key, lambda place: _train(config, language_model, place))
    return load_saes(folder, key, config)


def load_saes(folder: Path, key: str, config: ArithmeticConfig) -> ArithmeticSAEs:
    """Read what `make_saes` has left in `folder`, onto the device of `config`."""
    saes = {
        layer: SparseAutoencoder.load(
            folder, layer=layer, k=config.sae_k, d_model=config.hidden_size, device=config.torch_device()
        )
        for layer in range(config.model_layers)
    }
    measured = json.loads((folder / "explained_variance.json").read_text(encoding="utf-8"))
    return ArithmeticSAEs(saes, {int(layer): value for layer, value in measured.items()}, folder, key)


def collect_activations(model: PreTrainedModel, rows: Sequence[Row], layers: Sequence[int]) -> dict[int, Tensor]:
    """Raw outputs of decoder layers on every token but the first of each document: layer -> [tokens, d_model] fp32."""
    collected: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    ordered = sorted(rows, key=lambda row: len(row.tokens))
    batches = [ordered[begin : begin + _BATCH] for begin in range(0, len(ordered), _BATCH)]
    for batch in progress(batches, description="collecting activations for the SAEs"):
        longest = len(batch[-1].tokens)
        lengths = torch.tensor([len(row.tokens) for row in batch])
        tokens = torch.tensor([[*row.tokens, *[0] * (longest - len(row.tokens))] for row in batch])
        places = torch.arange(longest)
        kept = ((places > 0) & (places < lengths.unsqueeze(1))).to(model.device)
        # Padding on the right needs no mask: causality keeps it out of the tokens that are kept.
        for layer, hidden in forward_to_layer(model, layers, input_ids=tokens.to(model.device)).items():
            collected[layer].append(hidden[kept].float())
    return {layer: torch.cat(parts) for layer, parts in collected.items()}


def _train(config: ArithmeticConfig, language_model: ArithmeticModel, folder: Path) -> None:
    layers = range(config.model_layers)
    settings = config.documents(config.sae_loops)
    rows, unseen = (
        document_rows(language_model.tokenizer, settings, count, f"{name} {config.model_seed}")
        for name, count in (("sae", config.sae_documents), ("sae, held out", _HELD_OUT_DOCUMENTS))
    )
    training = SAETrainingConfig(
        width=config.sae_latents,
        k=config.sae_k,
        steps=config.sae_steps,
        learning_rate=config.sae_learning_rate,
        seed=config.model_seed,
    )
    saes = train_saes(collect_activations(language_model.model, rows, layers), training)
    save_qwen_scope(saes, folder)
    held_out = collect_activations(language_model.model, unseen, layers)
    measured = {str(layer): explained_variance(sae, held_out[layer]) for layer, sae in saes.items()}
    (folder / "explained_variance.json").write_text(json.dumps(measured), encoding="utf-8")
