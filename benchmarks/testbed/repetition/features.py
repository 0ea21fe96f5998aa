"""SAEs of the repetition task's model, its features of endless repetition, and how to steer with them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.testbed.cache import Cache
from benchmarks.testbed.feature_sets import difference_of_means_set
from benchmarks.testbed.models import Dictionaries, LanguageModel, load_dictionaries, train_dictionaries
from benchmarks.testbed.repetition.config import RepetitionConfig
from benchmarks.testbed.repetition.language_model import OwnLoops, document_rows, prompt_ids
from benchmarks.testbed.repetition.task import (
    draw_benign_problems,
    draw_problems,
    encode_words,
    finish,
    write_steps,
)
from qscope_posttrain.features.dose_curve import CurveSettings
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.find.loops import Completion
from qscope_posttrain.features.find.repetition import find_repetition_features
from qscope_posttrain.features.find.repetition_curve import LOOP, NORMAL, steering_curve, with_choice
from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.features.steering import SETTINGS_KEY
from qscope_posttrain.models.batches import TokenText
from qscope_posttrain.models.generation import SamplingSettings, encode_prompts
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae.training import SAETrainingConfig

# Raise these when the same settings would give other SAEs (SAE training) or other features and steering (ranking,
# statistics, steering curve, sampling).
SAES_VERSION = "1"
FEATURES_VERSION = "1"
_SAES = (
    "fewest_operations", "most_operations", "noise", "answer_tokens", "model_seed",
    "sae_latents", "sae_k", "sae_steps", "sae_learning_rate", "sae_documents", "sae_loops",
)  # fmt: skip
_FEATURES = (
    "fewest_operations", "most_operations", "answer_tokens", "temperature", "model_seed", "top", "scan_samples",
    "scan_fresh_samples", "scan_random_directions", "strengths", "weak_strengths", "window_start",
    "window_lengths",
)  # fmt: skip
_HELD_OUT_DOCUMENTS = 400
WINDOW, TO_END, WINDOW_MEANS = "window", "to_end", "window_means"
WAYS = (WINDOW, TO_END, WINDOW_MEANS)
"""Ways to steer for which layer, rows and strength are chosen: along features in a window, along features at every
generated token, and along the difference of means in a window."""
NO_STEERING = "no_steering"
"""Entry of a set's settings where its curve found nothing to steer with: the curve's verdict."""

_SCAN_PROMPTS = 256
_SCAN_BATCH = 256
_BENIGN = 200


@dataclass(frozen=True)
class RepetitionFeatures:
    """Feature sets as `qscope features find-repetition` writes them, one for each way to steer."""

    folder: Path
    key: str

    def path(self, way: str = WINDOW) -> Path:
        return self.folder / f"{way}.safetensors"

    def load(self, way: str = WINDOW) -> FeatureSet:
        """Load the set for a way to steer, with the chosen layer, strength and window in its settings.

        If this way never made the model loop, it is the set for the window: see `way_in_use`.
        """
        return FeatureSet.load(self.path(self.way_in_use(way)))

    def way_in_use(self, way: str) -> str:
        """Return `way`, or "window" if the curve of `way` found nothing to steer with."""
        return way if SETTINGS_KEY in FeatureSet.load(self.path(way)).settings else WINDOW

    def tables(self, way: str = WINDOW) -> dict[str, Table]:
        """Load the ranking (of features only) and the steering curve."""
        provenance = FeatureSet.load(self.path(way)).provenance
        return {name: Table(**provenance[name]) for name in ("ranking", "steering_curve") if name in provenance}


def make_saes(config: RepetitionConfig, cache: Cache, language_model: LanguageModel) -> Dictionaries:
    """Train one SAE per layer on documents with the habit, or take them from the cache."""

    def build(folder: Path) -> None:
        tokenizer, settings, seed = language_model.tokenizer, config.documents(config.sae_loops), config.model_seed
        drawn = document_rows(tokenizer, settings, config.sae_documents, f"sae {seed}")
        held_out = document_rows(tokenizer, settings, _HELD_OUT_DOCUMENTS, f"sae, held out {seed}")
        rows, unseen = ([row.tokens for row in documents] for documents in (drawn, held_out))
        training = SAETrainingConfig(
            width=config.sae_latents,
            k=config.sae_k,
            steps=config.sae_steps,
            learning_rate=config.sae_learning_rate,
            seed=config.model_seed,
        )
        train_dictionaries(language_model.model, range(config.model_layers), training, rows, unseen, folder)

    made = cache.make("repetition-saes", SAES_VERSION, config.subset(_SAES), build, [language_model.key])
    return load_dictionaries(*made, k=config.sae_k, d_model=config.hidden_size, device=config.torch_device())


def make_features(
    config: RepetitionConfig,
    cache: Cache,
    language_model: LanguageModel,
    saes: Dictionaries,
    loops: OwnLoops,
    ways: Sequence[str] = WAYS,
) -> RepetitionFeatures:
    """Rank features by the model's own loops and choose a steering for each way, or take them from the cache."""
    made = cache.make(
        "repetition-features",
        FEATURES_VERSION,
        {**config.subset(_FEATURES), "ways": list(ways)},
        lambda folder: _find(config, language_model, saes, loops, ways, folder),
        [language_model.key, saes.key, loops.key],
    )
    return RepetitionFeatures(*made)


def benign_texts(language_model: LanguageModel, config: RepetitionConfig, count: int) -> list[TokenText]:
    """Write right solutions of benign problems, whose steps are rightly equal."""
    rng = random.Random(f"benign texts {config.model_seed}")
    problems = draw_benign_problems(count, config.operations, config.model_seed + 1)
    texts = []
    for problem, prompt in zip(problems, prompt_ids(language_model, problems), strict=True):
        words = finish(*write_steps(problem, rng))
        completion = Completion(tuple(prompt), tuple(encode_words(language_model.tokenizer, words)))
        texts.append(completion.text())
    return texts


def _find(
    config: RepetitionConfig,
    language_model: LanguageModel,
    saes: Dictionaries,
    loops: OwnLoops,
    ways: Sequence[str],
    folder: Path,
) -> None:
    model, tokenizer, collection = language_model.model, language_model.tokenizer, loops.collection
    problems = draw_problems(_SCAN_PROMPTS, config.operations, config.model_seed + 1, held_out=False)
    prompts = [problem.prompt for problem in problems]
    benign = benign_texts(language_model, config, _BENIGN)
    found = find_repetition_features(
        model, tokenizer, saes.saes, prompts, loops=collection, benign=benign, top=config.top, curve=None
    )
    sampling = SamplingSettings(
        temperature=config.temperature,
        top_p=1.0,
        max_new_tokens=config.answer_tokens,
        seed=config.model_seed,
        batch_size=_SCAN_BATCH,
    )
    for way in ways:
        to_end = way == TO_END
        candidates = _means(language_model, loops, config) if way == WINDOW_MEANS else found
        settings = CurveSettings(
            strengths=tuple(config.weak_strengths if to_end else config.strengths),
            window_start=(0, 0) if to_end else (config.window_start[0], config.window_start[1]),
            window_lengths=(0,) if to_end else tuple(config.window_lengths),
            samples=config.scan_samples,
            fresh_samples=config.scan_fresh_samples,
            random_directions=config.scan_random_directions,
            sampling=sampling,
        )
        # Steered to the end this model stutters but does not loop as it does by itself; the report, whose method that
        # is, counts any endless repetition.
        periods = None if to_end else collection.periods
        curve = steering_curve(
            model, tokenizer, encode_prompts(tokenizer, prompts), candidates, settings, periods=periods
        )
        chosen = with_choice(candidates, curve)
        if curve.chosen is None:
            chosen = replace(chosen, settings={**chosen.settings, NO_STEERING: curve.verdict()})
        chosen.save(folder / f"{way}.safetensors")


def _means(language_model: LanguageModel, loops: OwnLoops, config: RepetitionConfig) -> FeatureSet:
    """Compute, in every layer, the mean residual inside the model's own loops minus that of ordinary completions."""
    collection = loops.collection
    texts = {
        LOOP: [loop.text() for loop in collection.loops],
        NORMAL: [completion.text() for completion in collection.normal],
    }
    longest = max(len(entry.ids) for entry in (*collection.loops, *collection.normal))
    layers = dict.fromkeys(range(config.model_layers))
    statistics = collect_statistics(
        language_model.model, language_model.tokenizer, texts, layers, max_length=longest, second_moments=True
    )
    return difference_of_means_set(statistics, LOOP)
