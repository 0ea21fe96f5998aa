"""One training run: a copy of the start model, an arm, a seed; probed on the way."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.rl.rewards import reward_function
from qscope_posttrain.testbed.arithmetic.arms import Arm
from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.arithmetic.language_model import ArithmeticModel
from qscope_posttrain.testbed.arithmetic.probes import Probes, ProbeSet, measure_probes
from qscope_posttrain.testbed.arithmetic.task import draw_problems, is_right
from qscope_posttrain.testbed.arithmetic.tokenizer import build_tokenizer, decode_words

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Trained:
    """What a run left."""

    model: PreTrainedModel
    """In eval mode, without hooks."""
    probes: Mapping[int, Probes]
    """By update; 0 is the start."""
    history: tuple[Mapping[str, float], ...]
    """What the trainer logged at every update."""
    seconds: float
    """Wall time of the updates, probes left out."""


class RightAnswer:
    """Reward 1 for a completion that ends with the right answer, 0 for any other.

    Args:
        tokenizer: of the model; by default the testbed's, so that a recipe can name this class.
    """

    __name__ = "right_answer"

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self._tokenizer = build_tokenizer() if tokenizer is None else tokenizer
        self._end = self._tokenizer.eos_token_id

    def __call__(self, completion_ids: Sequence[Sequence[int]], answer: Sequence[int], **columns: Any) -> list[float]:
        """One reward a completion; `answer` is the column of the data set."""
        rewards = []
        for ids, digit in zip(completion_ids, answer, strict=True):
            ended = bool(ids) and ids[-1] == self._end
            words = decode_words(self._tokenizer, ids[:-1] if ended else ids)
            rewards.append(float(is_right(digit, words, ended)))
        return rewards


def train(
    language_model: ArithmeticModel,
    arm: Arm,
    seed: int,
    config: ArithmeticConfig,
    probes: ProbeSet,
    features: FeatureSet | None = None,
) -> Trained:
    """Train a copy of the start model for `config.updates` updates with `SteeredGRPOTrainer`.

    Args:
        language_model: the start; it is not changed.
        arm: the method; its overrides win over everything that is the same for all.
        seed: of the prompts, their order, and the sampling.
        config: sizes and optimisation.
        probes: measured before, every `config.probe_every` updates, and after.
        features: for arms that steer; with a choice of layer, strength and window in their settings.
    """
    from qscope_posttrain.rl.trainer import SteeredGRPOTrainer

    model = copy.deepcopy(language_model.model)
    watcher = _ProbeWatcher(probes, config.probe_every)
    with tempfile.TemporaryDirectory(prefix="qscope-grpo-") as folder, warnings.catch_warnings():
        # transformers 5.23 renames an argument that 5.17 knows by this name only.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        trainer = SteeredGRPOTrainer(
            model,
            [RightAnswer(language_model.tokenizer), *map(reward_function, arm.rewards)],
            grpo_arguments(arm, seed, config, folder),
            features=None if arm.overrides.get("negative") == "seeded" else features,
            train_dataset=prompt_data(config, seed),
            processing_class=language_model.tokenizer,
            callbacks=[watcher],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started - watcher.seconds
    history = tuple(_numbers(entry) for entry in trainer.state.log_history if "loss" in entry)
    return Trained(model.eval(), watcher.found, history, seconds)


def grpo_arguments(arm: Arm, seed: int, config: ArithmeticConfig, folder: str) -> Any:
    """The `SteeredGRPOConfig` of a run."""
    from qscope_posttrain.rl.config import SteeredGRPOConfig

    settings: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": config.updates,
        "per_device_train_batch_size": config.prompts_per_update * config.rows_per_prompt,
        "num_generations": config.rows_per_prompt,
        "max_completion_length": config.answer_tokens,
        "temperature": config.temperature,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.98,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": seed,
        "use_cpu": config.torch_device() == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **arm.overrides,
    }
    return SteeredGRPOConfig(**settings)


def prompt_data(config: ArithmeticConfig, seed: int) -> Dataset:
    """A problem for every prompt of every update, none of them held out: columns `prompt` and `answer`."""
    from datasets import Dataset

    problems = draw_problems(config.updates * config.prompts_per_update, config.operations, seed, held_out=False)
    return Dataset.from_dict(
        {"prompt": [problem.prompt for problem in problems], "answer": [problem.answer for problem in problems]}
    )


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in entry.items() if isinstance(value, (int, float))}


class _ProbeWatcher(TrainerCallback):
    """Measures the probes before the first update, every so many updates, and after the last."""

    def __init__(self, probes: ProbeSet, every: int) -> None:
        self._probes = probes
        self._every = every
        self.found: dict[int, Probes] = {}
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._measure(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._measure(state.global_step, model)

    def _measure(self, step: int, model: Any) -> None:
        started = time.perf_counter()
        self.found[step] = measure_probes(model, self._probes)
        self.seconds += time.perf_counter() - started
