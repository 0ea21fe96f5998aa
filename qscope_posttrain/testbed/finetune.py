"""Supervised fine-tuning of the testbed's model with a stock `trl.SFTTrainer`, and one method's penalty."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, TrainerCallback

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.sft.baselines import TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.testbed.arms import Arm
from qscope_posttrain.testbed.config import TestbedConfig
from qscope_posttrain.testbed.language_model import LanguageModel
from qscope_posttrain.testbed.windows import Windows

if TYPE_CHECKING:
    from datasets import Dataset

_WARMUP_STEPS = 10


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model and how it got there."""

    model: PreTrainedModel
    """In eval mode, without hooks."""
    history: tuple[Mapping[str, float], ...]
    """What the trainer logged at every step: `loss`, and the penalty's own metrics."""
    seconds: float
    """Wall time of the training loop."""
    step_seconds: float
    """Median wall time of a step."""


def fine_tune(
    language_model: LanguageModel,
    arm: Arm,
    weight: float,
    features: FeatureSet | None,
    config: TestbedConfig,
    seed: int,
    *,
    start: PreTrainedModel | None = None,
    windows: int | None = None,
) -> FineTuned:
    """Train a copy of a model for one pass over SFT windows.

    Args:
        language_model: the pretrained model with its text; it is not changed.
        arm: the method.
        weight: its coefficient.
        features: rows to penalise; needed if the arm uses them.
        config: sizes and optimisation.
        seed: of the data and their order, the same for every method.
        start: the model to copy, by default the pretrained one.
        windows: their number, by default `config.sft_windows`.

    Raises:
        ValueError: a method on features without features.
    """
    from trl import SFTConfig, SFTTrainer

    data = language_model.maker.dialogue("sft", windows or config.sft_windows, seed, config.sft_switch)
    if arm.drop_switched:
        data = data.select((~data.switched).nonzero().flatten().tolist())
    with tempfile.TemporaryDirectory(prefix="qscope-sft-") as folder:
        with warnings.catch_warnings():
            # transformers 5.23 renames an argument that 5.17 knows by this name only.
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            arguments = SFTConfig(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=config.sft_batch_size,
                learning_rate=config.sft_learning_rate,
                lr_scheduler_type="cosine_with_min_lr",
                lr_scheduler_kwargs={"min_lr_rate": 0.1},
                warmup_steps=_WARMUP_STEPS,
                adam_beta2=0.98,
                weight_decay=0.0,
                max_grad_norm=1.0,
                seed=seed,
                use_cpu=config.torch_device() == "cpu",
                bf16=False,
                gradient_checkpointing=False,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                dataloader_pin_memory=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
        clock = _StepClock()
        model = copy.deepcopy(language_model.model)
        if start is not None:
            # No copy of `start` itself: TRL gave it a forward that keeps to its own parameters, and a copy has it, too.
            model.load_state_dict(start.state_dict())
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=_dataset(data, config),
            processing_class=language_model.tokenizer,
            callbacks=[clock, *_penalties(language_model, arm, weight, features)],
        )
        _silence(trainer)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    history = tuple(entry for entry in trainer.state.log_history if "loss" in entry)
    return FineTuned(model.eval(), history, seconds, clock.median())


def _penalties(
    language_model: LanguageModel, arm: Arm, weight: float, features: FeatureSet | None
) -> list[TrainerCallback]:
    target = language_model.maker.target
    if arm.penalty == "none":
        return []
    callbacks: list[TrainerCallback] = []
    if arm.penalty in ("token", "both"):
        callbacks.append(
            TokenPenaltyCallback(
                target,
                arm.token_scale * weight,
                languages=language_model.languages,
                target_token_ids=language_model.target_tokens,
                **arm.token_options,
            )
        )
    if arm.uses_features:
        if features is None:
            raise UserValueError(f"method {arm.name!r} penalises features, so it needs a FeatureSet")
        callbacks.append(
            SASFTCallback(
                features,
                target,
                weight,
                layers=tuple(sorted(features.layers))[-arm.layers :],
                top=arm.top,
                target_token_ids=language_model.target_tokens,
                **arm.options,
            )
        )
    return callbacks


def _dataset(windows: Windows, config: TestbedConfig) -> Dataset:
    """Rows that are tokenised already, with labels on the response only, and the language as a column.

    A language in which methods do not act goes by the target's name: penalties leave rows of the target alone, and
    these rows stay in their denominators.
    """
    from datasets import Dataset

    acting = set(windows.languages if config.penalised is None else config.penalised)
    return Dataset.from_dict(
        {
            "input_ids": windows.input_ids.tolist(),
            "labels": windows.labels.tolist(),
            "language": [language if language in acting else config.target for language in windows.languages],
        }
    )


def _silence(trainer: Any) -> None:
    """Keep the trainer from printing a line per step; the history has them all."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


class _StepClock(TrainerCallback):
    """Wall time of every optimiser step."""

    def __init__(self) -> None:
        self._began = 0.0
        self._times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._times.append(time.perf_counter() - self._began)

    def median(self) -> float:
        """The median, in seconds; 0 before the first step."""
        ordered = sorted(self._times)
        return ordered[len(ordered) // 2] if ordered else 0.0
