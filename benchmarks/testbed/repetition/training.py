"""One training run with `SteeredGRPOTrainer`: a copy of the start model, an arm, a seed."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from benchmarks.testbed.models import LanguageModel
from benchmarks.testbed.repetition.config import Arm, RepetitionConfig
from benchmarks.testbed.repetition.task import build_tokenizer, decode_words, draw_problems, is_right
from benchmarks.testbed.training import common_arguments, renamed_argument_ignored, train_quietly
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.rl.rewards import reward_function

if TYPE_CHECKING:
    from datasets import Dataset


class RightAnswer:
    """Reward 1 for a completion that ends with the right answer, 0 for any other.

    Args:
        tokenizer: of the model; by default the task's, so that a recipe can name this class.
    """

    __name__ = "right_answer"

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self._tokenizer = build_tokenizer() if tokenizer is None else tokenizer
        self._end = self._tokenizer.eos_token_id

    def __call__(self, completion_ids: Sequence[Sequence[int]], answer: Sequence[int], **columns: Any) -> list[float]:
        """Return one reward per completion; `answer` is the column of the data set."""
        rewards = []
        for ids, digit in zip(completion_ids, answer, strict=True):
            ended = bool(ids) and ids[-1] == self._end
            words = decode_words(self._tokenizer, ids[:-1] if ended else ids)
            rewards.append(float(is_right(digit, words, ended)))
        return rewards


@dataclass(frozen=True)
class Trained:
    """A trained model and how it got there."""

    model: PreTrainedModel
    """In evaluation mode, without hooks."""
    history: tuple[Mapping[str, float], ...]
    """Metrics that the trainer logged at every update."""
    seconds: float
    """Wall time of the updates."""


class Watcher(TrainerCallback):
    """Measures the model before the first update, after every `every` updates, and after the last."""

    def __init__(self, measure: Callable[[PreTrainedModel], Mapping[str, float]], every: int) -> None:
        self._measure = measure
        self._every = every
        self.found: dict[int, Mapping[str, float]] = {}
        """By update."""
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.look(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self.look(state.global_step, model)

    def look(self, step: int, model: PreTrainedModel) -> None:
        """Measure now."""
        started = time.perf_counter()
        self.found[step] = self._measure(model)
        self.seconds += time.perf_counter() - started


def train(
    language_model: LanguageModel,
    arm: Arm,
    seed: int,
    config: RepetitionConfig,
    features: FeatureSet | None = None,
    watcher: Watcher | None = None,
) -> Trained:
    """Train a copy of the start model for `config.updates` updates.

    `features`, with a choice of layer, strength and window in their settings, are for arms that steer. The time of the
    `watcher` does not count.
    """
    from qscope_posttrain.rl.trainer import SteeredGRPOTrainer

    model = copy.deepcopy(language_model.model)
    with tempfile.TemporaryDirectory(prefix="qscope-grpo-") as folder, renamed_argument_ignored():
        trainer = SteeredGRPOTrainer(
            model,
            [RightAnswer(language_model.tokenizer), *map(reward_function, arm.rewards)],
            grpo_arguments(arm, seed, config, folder),
            features=None if arm.overrides.get("negative") == "seeded" else features,
            train_dataset=prompt_data(config, seed),
            processing_class=language_model.tokenizer,
            callbacks=[] if watcher is None else [watcher],
        )
        log, seconds = train_quietly(trainer)
    history = tuple(
        {name: float(value) for name, value in entry.items() if isinstance(value, (int, float))} for entry in log
    )
    return Trained(model.eval(), history, seconds - (0.0 if watcher is None else watcher.seconds))


def grpo_arguments(arm: Arm, seed: int, config: RepetitionConfig, folder: str) -> Any:
    """Return the `SteeredGRPOConfig` of a run."""
    from qscope_posttrain.rl.config import SteeredGRPOConfig

    settings: dict[str, Any] = {
        **common_arguments(config, seed, folder),
        "max_steps": config.updates,
        "per_device_train_batch_size": config.prompts_per_update * config.rows_per_prompt,
        "num_generations": config.rows_per_prompt,
        "max_completion_length": config.answer_tokens,
        "temperature": config.temperature,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant",
        **arm.overrides,
    }
    return SteeredGRPOConfig(**settings)


def prompt_data(config: RepetitionConfig, seed: int) -> Dataset:
    """Draw a problem for every prompt of every update, none of them held out: columns `prompt` and `answer`."""
    from datasets import Dataset

    problems = draw_problems(config.updates * config.prompts_per_update, config.operations, seed, held_out=False)
    return Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in problems])
