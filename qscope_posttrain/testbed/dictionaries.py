"""SAEs and feature sets of a testbed model, made once and kept in the cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_posttrain.features.causal import causal_check, effect_gradients, measure_effects
from qscope_posttrain.features.directions import (
    difference_of_means_set,
    direction_feature_set,
    random_feature_set,
)
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.find.language import language_feature_set
from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.training import SAETrainingConfig, explained_variance, train_saes
from qscope_posttrain.testbed.arms import ARMS
from qscope_posttrain.testbed.cache import Cache
from qscope_posttrain.testbed.config import TestbedConfig
from qscope_posttrain.testbed.language_model import LanguageModel
from qscope_posttrain.testbed.sae import collect_activations, save_qwen_scope

_SOURCES = ("testbed/dictionaries.py",)
_HELD_OUT_WINDOWS = 150
RANDOM_DRAWS = 8
"""How many different sets of random features there are; a run with seed s takes number s modulo this."""
_CAUSAL_TEXTS = 25
_CAUSAL_FEATURES = 2
_CAUSAL_CONTROLS = 3


@dataclass(frozen=True)
class Dictionaries:
    """The SAEs of a testbed model."""

    saes: dict[int, SparseAutoencoder]
    """By layer, as read back from Qwen-Scope files."""
    explained_variance: dict[int, float]
    """On held-out text."""
    folder: Path
    key: str


@dataclass(frozen=True)
class FeatureSets:
    """Rows that the methods penalise, and what was learnt about them."""

    folder: Path
    """Holds `sae`, `difference_of_means`, `gradient` and `random-<number>`, each as `<name>.safetensors`."""
    key: str

    def load(self, name: str) -> FeatureSet:
        """One of the sets by name."""
        return FeatureSet.load(self.folder / f"{name}.safetensors")

    def causal_table(self) -> dict[str, Any]:
        """The causal check as `report.tables.Table.to_dict` gives it."""
        content: dict[str, Any] = json.loads((self.folder / "causal.json").read_text(encoding="utf-8"))
        return content


def make_dictionaries(config: TestbedConfig, cache: Cache, language_model: LanguageModel) -> Dictionaries:
    """Train the SAEs on windows with the habit, or take them from the cache; both ways they come from their files."""
    settings = config.subset("sae_layers", "sae_expansion", "sae_k", "sae_steps", "sae_windows", "switch", "model_seed")
    key = cache.key(settings, _SOURCES, [language_model.key])
    folder = cache.folder("saes", key, lambda place: _train(config, language_model, place))
    saes = {
        layer: SparseAutoencoder.load(folder, layer=layer, k=config.sae_k, d_model=config.hidden_size)
        for layer in config.tapped_layers
    }
    measured = json.loads((folder / "explained_variance.json").read_text(encoding="utf-8"))
    return Dictionaries(saes, {int(layer): value for layer, value in measured.items()}, folder, key)


def make_feature_sets(
    config: TestbedConfig, cache: Cache, language_model: LanguageModel, dictionaries: Dictionaries
) -> FeatureSets:
    """Find language features, their effects and controls on windows of the sft split, or take them from the cache.

    Thresholds and features never see validation or test text.
    """
    settings = config.subset("feature_windows", "top")
    key = cache.key(settings, _SOURCES, [language_model.key, dictionaries.key])
    folder = cache.folder("features", key, lambda place: _find(config, language_model, dictionaries, place))
    return FeatureSets(folder, key)


def _train(config: TestbedConfig, language_model: LanguageModel, folder: Path) -> None:
    maker, model = language_model.maker, language_model.model
    windows = maker.pretraining(config.sae_windows, config.switch, config.model_seed + 1)
    activations = collect_activations(model, windows, config.tapped_layers)
    training = SAETrainingConfig(
        expansion=config.sae_expansion, k=config.sae_k, steps=config.sae_steps, seed=config.model_seed
    )
    saes = train_saes(activations, training)
    held_out = maker.pretraining(_HELD_OUT_WINDOWS, config.switch, config.model_seed, split="val")
    unseen = collect_activations(model, held_out, config.tapped_layers)
    save_qwen_scope(saes, folder)
    measured = {str(layer): explained_variance(sae, unseen[layer]) for layer, sae in saes.items()}
    (folder / "explained_variance.json").write_text(json.dumps(measured), encoding="utf-8")


def _find(config: TestbedConfig, language_model: LanguageModel, dictionaries: Dictionaries, folder: Path) -> None:
    model, tokenizer, saes = language_model.model, language_model.tokenizer, dictionaries.saes
    target, last = config.target, config.tapped_layers[-1]
    texts = language_model.texts("sft", config.feature_windows, config.model_seed + 2)
    statistics = collect_statistics(model, tokenizer, texts, saes, max_length=config.window)
    found = language_feature_set(statistics, saes, top=config.top)
    tokens = language_model.target_tokens
    features = measure_effects(found, model, tokenizer, texts, target, target_tokens=tokens)
    features.save(folder / "sae.safetensors")
    gradient = effect_gradients(model, tokenizer, texts, target, [last], target_tokens=tokens)[last]
    direction = direction_feature_set(statistics, last, gradient, f"gradient of log P({target})", language=target)
    direction.save(folder / "gradient.safetensors")
    difference_of_means_set(statistics, target).save(folder / "difference_of_means.safetensors")
    penalised = features.select(language=target, layers=[last], top=min(config.top, ARMS["random_features"].top))
    for draw in range(RANDOM_DRAWS):
        random_feature_set(statistics, saes, penalised, seed=draw).save(folder / f"random-{draw}.safetensors")
    report = causal_check(
        model,
        tokenizer,
        texts,
        features.select(language=target, layers=[last], top=min(config.top, _CAUSAL_FEATURES)),
        target,
        controls=random_feature_set(statistics, saes, penalised.select(top=_CAUSAL_CONTROLS), seed=config.model_seed),
        target_tokens=tokens,
        texts_per_language=_CAUSAL_TEXTS,
        max_length=config.window,
    )
    (folder / "causal.json").write_text(json.dumps(report.to_table().to_dict()), encoding="utf-8")
