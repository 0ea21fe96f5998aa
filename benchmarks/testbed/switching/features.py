"""SAEs and feature sets of the switching task's model, made once and kept in the cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.testbed.cache import Cache
from benchmarks.testbed.feature_sets import (
    difference_of_means_set,
    direction_feature_set,
    language_feature_set,
    random_feature_set,
)
from benchmarks.testbed.models import Dictionaries, load_dictionaries, train_dictionaries
from benchmarks.testbed.switching.config import ARMS, SwitchingConfig
from benchmarks.testbed.switching.language_model import SwitchingModel
from qscope_posttrain.features.causal import causal_check, effect_gradients, measure_effects
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae.training import SAETrainingConfig

# Raise these when the same settings would give other SAEs (SAE training) or other features (statistics, ranking,
# effects, controls).
SAES_VERSION = "1"
FEATURES_VERSION = "1"
RANDOM_DRAWS = 8
"""Number of different sets of random features; a run with seed s takes set s modulo this."""
_HELD_OUT_WINDOWS = 150
_CAUSAL_TEXTS, _CAUSAL_FEATURES, _CAUSAL_CONTROLS = 25, 2, 3


@dataclass(frozen=True)
class FeatureSets:
    """Directions that the methods penalize, and how they were checked."""

    folder: Path
    """Holds `sae`, `difference_of_means`, `gradient` and `random-<number>`, each as `<name>.safetensors`."""
    key: str

    def load(self, name: str) -> FeatureSet:
        """Load one of the sets by name."""
        return FeatureSet.load(self.folder / f"{name}.safetensors")

    def causal_table(self) -> Table:
        """Load the table of the causal check."""
        return Table(**json.loads((self.folder / "causal.json").read_text(encoding="utf-8")))


def make_dictionaries(config: SwitchingConfig, cache: Cache, language_model: SwitchingModel) -> Dictionaries:
    """Train the SAEs on windows with the habit, or take them from the cache; both ways they come from their files."""
    names = ("sae_layers", "sae_expansion", "sae_k", "sae_steps", "sae_windows", "switch", "model_seed")

    def build(folder: Path) -> None:
        maker = language_model.maker
        training = SAETrainingConfig(
            expansion=config.sae_expansion, k=config.sae_k, steps=config.sae_steps, seed=config.model_seed
        )
        windows = maker.pretraining(config.sae_windows, config.switch, config.model_seed + 1)
        held_out = maker.pretraining(_HELD_OUT_WINDOWS, config.switch, config.model_seed, split="val")
        rows, unseen = windows.input_ids.tolist(), held_out.input_ids.tolist()
        train_dictionaries(language_model.model, config.tapped_layers, training, rows, unseen, folder)

    made = cache.make("switching-saes", SAES_VERSION, config.subset(names), build, [language_model.key])
    return load_dictionaries(*made, k=config.sae_k, d_model=config.hidden_size)


def make_feature_sets(
    config: SwitchingConfig, cache: Cache, language_model: SwitchingModel, dictionaries: Dictionaries
) -> FeatureSets:
    """Find language features, their effects and controls on windows of the sft split, or take them from the cache.

    Thresholds and features never see validation or test text.
    """
    made = cache.make(
        "switching-features",
        FEATURES_VERSION,
        config.subset(["feature_windows", "top"]),
        lambda folder: _find(config, language_model, dictionaries, folder),
        [language_model.key, dictionaries.key],
    )
    return FeatureSets(*made)


def _find(config: SwitchingConfig, language_model: SwitchingModel, dictionaries: Dictionaries, folder: Path) -> None:
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
    penalized = features.select(language=target, layers=[last], top=min(config.top, ARMS["random_features"].top))
    for draw in range(RANDOM_DRAWS):
        random_feature_set(statistics, saes, penalized, seed=draw).save(folder / f"random-{draw}.safetensors")
    controls = random_feature_set(statistics, saes, penalized.select(top=_CAUSAL_CONTROLS), seed=config.model_seed)
    report = causal_check(
        model,
        tokenizer,
        texts,
        features.select(language=target, layers=[last], top=min(config.top, _CAUSAL_FEATURES)),
        target,
        controls={layer: dict(zip(rows.names, rows.decoder, strict=True)) for layer, rows in controls.layers.items()},
        target_tokens=tokens,
        texts_per_language=_CAUSAL_TEXTS,
        max_length=config.window,
    )
    (folder / "causal.json").write_text(json.dumps(report.to_table().to_dict()), encoding="utf-8")
