"""The features of endless repetition of the arithmetic model, and where, how and how strongly to steer with them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_posttrain.features.batches import TokenText
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.find_repetition import find_repetition_features
from qscope_posttrain.features.loops import Completion
from qscope_posttrain.features.repetition_curve import CurveSettings
from qscope_posttrain.residual.sampling import SamplingSettings
from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.arithmetic.documents import finish, write_steps
from qscope_posttrain.testbed.arithmetic.language_model import ArithmeticModel
from qscope_posttrain.testbed.arithmetic.loops import OwnLoops
from qscope_posttrain.testbed.arithmetic.sae import ArithmeticSAEs
from qscope_posttrain.testbed.arithmetic.task import draw_benign_problems, draw_problems
from qscope_posttrain.testbed.arithmetic.tokenizer import encode_words
from qscope_posttrain.testbed.cache import Cache

_SOURCES = ("testbed/arithmetic/dictionaries.py", "testbed/arithmetic/task.py", "features", "residual", "sae", "text")
_SETTINGS = (
    "fewest_operations", "most_operations", "answer_tokens", "temperature", "model_seed", "top", "scan_samples",
    "scan_fresh_samples", "scan_random_directions", "strengths", "window_start", "window_lengths",
)  # fmt: skip
_FILE = "repetition.safetensors"
_SCAN_PROMPTS = 256
_SCAN_BATCH = 256
_BENIGN = 200


@dataclass(frozen=True)
class RepetitionFeatures:
    """A feature set as `qscope features find-repetition` writes it."""

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        return self.folder / _FILE

    def load(self) -> FeatureSet:
        """The set, with the choice of layer, strength and window in its settings."""
        return FeatureSet.load(self.path)

    def tables(self) -> dict[str, Any]:
        """The ranking and the steering curve as `report.tables.Table.to_dict` gives them."""
        provenance = self.load().provenance
        return {name: provenance[name] for name in ("ranking", "steering_curve")}


def make_features(
    config: ArithmeticConfig, cache: Cache, language_model: ArithmeticModel, saes: ArithmeticSAEs, loops: OwnLoops
) -> RepetitionFeatures:
    """Rank features by the model's own loops and choose a steering, or take them from the cache."""
    key = cache.key(config.subset(*_SETTINGS), _SOURCES, [language_model.key, saes.key, loops.key])

    def build(folder: Path) -> None:
        _find(config, language_model, saes, loops).save(folder / _FILE)

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
    config: ArithmeticConfig, language_model: ArithmeticModel, saes: ArithmeticSAEs, loops: OwnLoops
) -> FeatureSet:
    problems = draw_problems(_SCAN_PROMPTS, config.operations, config.model_seed + 1, held_out=False)
    sampling = SamplingSettings(
        temperature=config.temperature,
        top_p=1.0,
        max_new_tokens=config.answer_tokens,
        seed=config.model_seed,
        batch_size=_SCAN_BATCH,
    )
    low, high = config.window_start
    curve = CurveSettings(
        strengths=tuple(config.strengths),
        window_start=(low, high),
        window_lengths=tuple(config.window_lengths),
        samples=config.scan_samples,
        fresh_samples=config.scan_fresh_samples,
        random_directions=config.scan_random_directions,
        sampling=sampling,
    )
    return find_repetition_features(
        language_model.model,
        language_model.tokenizer,
        saes.saes,
        [problem.prompt for problem in problems],
        loops=loops.collection,
        benign=benign_texts(language_model, config, _BENIGN),
        top=config.top,
        curve=curve,
    )
