"""The features of endless repetition of the arithmetic model, and where, how and how strongly to steer with them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qscope_posttrain.features.directions import difference_of_means_set
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.find.loops import Completion
from qscope_posttrain.features.find.repetition import LOOP, NORMAL, find_repetition_features, with_choice
from qscope_posttrain.features.find.repetition_curve import CurveSettings
from qscope_posttrain.features.find.repetition_scan import Contrast, steering_curve
from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.features.steering import SETTINGS_KEY
from qscope_posttrain.models.batches import TokenText
from qscope_posttrain.models.generation import SamplingSettings, encode_prompts
from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.arithmetic.documents import finish, write_steps
from qscope_posttrain.testbed.arithmetic.language_model import ArithmeticModel
from qscope_posttrain.testbed.arithmetic.loops import OwnLoops
from qscope_posttrain.testbed.arithmetic.sae import ArithmeticSAEs
from qscope_posttrain.testbed.arithmetic.task import draw_benign_problems, draw_problems
from qscope_posttrain.testbed.arithmetic.tokenizer import encode_words
from qscope_posttrain.testbed.cache import Cache

_SOURCES = ("testbed/arithmetic/dictionaries.py",)
_SETTINGS = (
    "fewest_operations", "most_operations", "answer_tokens", "temperature", "model_seed", "top", "scan_samples",
    "scan_fresh_samples", "scan_random_directions", "strengths", "weak_strengths", "window_start",
    "window_lengths",
)  # fmt: skip
WINDOW, TO_END, WINDOW_MEANS = "window", "to_end", "window_means"
"""The ways to steer for which layer, rows and strength are chosen: along features in a window, along features at every
generated token, and along the difference of means in a window."""
WAYS = (WINDOW, TO_END, WINDOW_MEANS)
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
        """The set, with the choice of layer, strength and window in its settings.

        Where this way of steering never made the model loop, it is the set for the window: see `way_in_use`.
        """
        return FeatureSet.load(self.path(self.way_in_use(way)))

    def way_in_use(self, way: str) -> str:
        """`way`, or "window" where the curve of `way` found nothing to steer with."""
        return way if SETTINGS_KEY in FeatureSet.load(self.path(way)).settings else WINDOW

    def tables(self, way: str = WINDOW) -> dict[str, Any]:
        """The ranking (of features only) and the steering curve as `report.tables.Table.to_dict` gives them."""
        provenance = FeatureSet.load(self.path(way)).provenance
        return {name: provenance[name] for name in ("ranking", "steering_curve") if name in provenance}


def make_features(
    config: ArithmeticConfig, cache: Cache, language_model: ArithmeticModel, saes: ArithmeticSAEs, loops: OwnLoops
) -> RepetitionFeatures:
    """Rank features by the model's own loops and choose a steering, or take them from the cache."""
    key = cache.key(config.subset(*_SETTINGS), _SOURCES, [language_model.key, saes.key, loops.key])

    def build(folder: Path) -> None:
        _find(config, language_model, saes, loops, RepetitionFeatures(folder, key))

    return RepetitionFeatures(cache.folder("arithmetic-features", key, build), key)


def benign_texts(language_model: ArithmeticModel, config: ArithmeticConfig, count: int) -> list[TokenText]:
    """Right solutions of benign problems: steps that are rightly equal, and then the end."""
    rng = random.Random(f"benign texts {config.model_seed}")
    problems = draw_benign_problems(count, config.operations, config.model_seed + 1)
    texts = []
    for problem, prompt in zip(problems, language_model.prompts(problems), strict=True):
        words = finish(*write_steps(problem, rng))
        completion = Completion(tuple(prompt), tuple(encode_words(language_model.tokenizer, words)))
        texts.append(completion.text())
    return texts


def _find(
    config: ArithmeticConfig,
    language_model: ArithmeticModel,
    saes: ArithmeticSAEs,
    loops: OwnLoops,
    places: RepetitionFeatures,
) -> None:
    problems = draw_problems(_SCAN_PROMPTS, config.operations, config.model_seed + 1, held_out=False)
    prompts = [problem.prompt for problem in problems]
    model, tokenizer, collection = language_model.model, language_model.tokenizer, loops.collection
    benign = benign_texts(language_model, config, _BENIGN)
    found = find_repetition_features(
        model, tokenizer, saes.saes, prompts, loops=collection, benign=benign, top=config.top, curve=None
    )
    means = _means(language_model, loops, config)
    low, high = config.window_start
    in_window = ((low, high), config.window_lengths, config.strengths)
    ways = {
        WINDOW: (found, *in_window),
        TO_END: (found, (0, 0), [0], config.weak_strengths),
        WINDOW_MEANS: (means, *in_window),
    }
    for way, (candidates, start, lengths, strengths) in ways.items():
        settings = CurveSettings(
            strengths=tuple(strengths),
            window_start=start,
            window_lengths=tuple(lengths),
            samples=config.scan_samples,
            fresh_samples=config.scan_fresh_samples,
            random_directions=config.scan_random_directions,
            sampling=SamplingSettings(
                temperature=config.temperature,
                top_p=1.0,
                max_new_tokens=config.answer_tokens,
                seed=config.model_seed,
                batch_size=_SCAN_BATCH,
            ),
        )
        ids = encode_prompts(tokenizer, prompts)
        contrast = Contrast(LOOP, candidates.language_index(LOOP), candidates.language_index(NORMAL))
        # Steered to the end this model stutters but does not loop as it does by itself; the report, whose method that
        # is, counts any endless repetition.
        periods = None if way == TO_END else collection.periods
        curve = steering_curve(model, tokenizer, ids, candidates, contrast, settings, periods=periods)
        chosen = with_choice(candidates, curve)
        if curve.chosen is None:
            chosen = replace(chosen, settings={**chosen.settings, NO_STEERING: curve.verdict()})
        chosen.save(places.path(way))


def _means(language_model: ArithmeticModel, loops: OwnLoops, config: ArithmeticConfig) -> FeatureSet:
    """In every layer the mean residual inside the model's own loops minus that of its ordinary completions."""
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
