"""Language models of Qwen3's architecture and SAEs on their layers, built, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.report.progress import progress
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.formats.qwen_scope import write_tensors
from qscope_posttrain.sae.training import SAETrainingConfig, train_saes

_BATCH = 64
_LOSSES, _EXPLAINED = "losses.json", "explained_variance.json"


@dataclass(frozen=True)
class LanguageModel:
    """A pretrained model and its place in the cache."""

    model: PreTrainedModel
    """In evaluation mode."""
    tokenizer: PreTrainedTokenizerFast
    losses: tuple[float, ...]
    """Pretraining loss of every step."""
    folder: Path
    """In the format of transformers."""
    key: str


@dataclass(frozen=True)
class Dictionaries:
    """The SAEs of a model and their place in the cache."""

    saes: dict[int, SparseAutoencoder]
    """By layer, as read back from Qwen-Scope files."""
    explained_variance: dict[int, float]
    """On held-out text."""
    folder: Path
    key: str


def build_model(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    seed: int,
    intermediate_size: int | None = None,
    key_value_heads: int | None = None,
    positions: int = 128,
    rope_theta: float | None = None,
    tied: bool = True,
) -> Qwen3ForCausalLM:
    """Return a randomly initialized model; by default 2.5 times as wide in its MLPs, with half as many key heads.

    Raises:
        ValueError: sizes that do not divide.
    """
    key_value_heads = heads // 2 if key_value_heads is None else key_value_heads
    if hidden_size % heads or not key_value_heads or heads % key_value_heads:
        raise UserValueError(
            f"hidden_size {hidden_size} needs an even number of heads that divides it, got {heads} heads"
        )
    rope: dict[str, Any] = (
        {} if rope_theta is None else {"rope_parameters": {"rope_type": "default", "rope_theta": rope_theta}}
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or int(2.5 * hidden_size),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **rope,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, losses: Sequence[float] = ()
) -> None:
    """Write model and tokenizer in the format of transformers, and the losses of its pretraining if there are any."""
    with _no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if losses:
        (folder / _LOSSES).write_text(json.dumps(losses), encoding="utf-8")


def load_model(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """Load a model onto a device, in evaluation mode."""
    with _no_progress_bars():
        model: PreTrainedModel = Qwen3ForCausalLM.from_pretrained(folder, device_map=device).eval()
    return model


def load_language_model(folder: Path, key: str, device: str = "cpu") -> LanguageModel:
    """Load what `save_model` wrote after pretraining."""
    losses = json.loads((folder / _LOSSES).read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return LanguageModel(load_model(folder, device), tokenizer, tuple(losses), folder, key)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide the loading bars of transformers."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def train_dictionaries(
    model: PreTrainedModel,
    layers: Iterable[int],
    training: SAETrainingConfig,
    rows: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    folder: Path,
) -> None:
    """Train an SAE per layer on the activations of `rows`; write Qwen-Scope files and the explained variance."""
    layers = list(layers)
    saes = train_saes(collect_activations(model, rows, layers), training)
    unseen = collect_activations(model, held_out, layers)
    for layer, sae in saes.items():
        write_tensors(folder / f"layer{layer}.sae.pt", sae)
    measured = {str(layer): explained_variance(sae, unseen[layer]) for layer, sae in saes.items()}
    (folder / _EXPLAINED).write_text(json.dumps(measured), encoding="utf-8")


def load_dictionaries(folder: Path, key: str, k: int, d_model: int, device: str = "cpu") -> Dictionaries:
    """Load what `train_dictionaries` wrote."""
    measured = json.loads((folder / _EXPLAINED).read_text(encoding="utf-8"))
    saes = {
        int(layer): SparseAutoencoder.load(folder, layer=int(layer), k=k, d_model=d_model, device=device)
        for layer in measured
    }
    return Dictionaries(saes, {int(layer): value for layer, value in measured.items()}, folder, key)


def collect_activations(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, Tensor]:
    """Return raw layer outputs on every token but the first of each row: layer -> [tokens, d_model] fp32."""
    collected: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    ordered = sorted(rows, key=len)
    batches = [ordered[begin : begin + _BATCH] for begin in range(0, len(ordered), _BATCH)]
    for batch in progress(batches, description="collecting activations for the SAEs"):
        tokens, lengths = pad_right(batch), torch.tensor([len(row) for row in batch])
        places = torch.arange(tokens.shape[1])
        # Padding on the right needs no mask: causality keeps it out of the tokens that are kept.
        kept = ((places > 0) & (places < lengths.unsqueeze(1))).to(model.device)
        outputs: Any = forward_to_layer(model, layers, input_ids=tokens.to(model.device), use_cache=False)
        for layer, hidden in outputs.items():
            collected[layer].append(hidden[kept].float())
    return {layer: torch.cat(parts) for layer, parts in collected.items()}


def pad_right(rows: Sequence[Sequence[int]], pad: int = 0) -> Tensor:
    """Return rows of tokens as one tensor [rows, longest]."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])


@torch.no_grad()
def explained_variance(sae: SparseAutoencoder, x: Tensor) -> float:
    """1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2 over tokens [tokens, d_model]; 1 is perfect, sums in float64."""
    if x.shape[0] < 2:
        raise UserValueError(f"explained variance needs at least 2 tokens, got {x.shape[0]}")
    mean = x.mean(dim=0, dtype=torch.float64)
    left = x.new_zeros((), dtype=torch.float64)
    total = torch.zeros_like(left)
    for tile in x.split(4096):
        left += (tile.double() - sae.decode(*sae.encode(tile)).double()).square().sum()
        total += (tile.double() - mean).square().sum()
    return float(1 - left / total)
