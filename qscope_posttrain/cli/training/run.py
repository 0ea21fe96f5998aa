"""Make, run and save a trainer, and separate what the user got wrong from what broke.

Trainers refuse settings when they are made, and some (an optimizer without its package, a scheduler without its
options, a checkpoint of another model) only when training begins. From the first step on every error is a bug or a
failure of the machine, and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from transformers import Trainer, TrainerCallback, set_seed
from trl import get_peft_config, get_quantization_config

from qscope_posttrain.cli.training import TrainingRecipe
from qscope_posttrain.cli.training.checks import check_checkpoint
from qscope_posttrain.errors import library_refusals
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import write_summary

T = TypeVar("T", bound=Trainer)
Log = Sequence[Mapping[str, Any]]


class _Begun(TrainerCallback):
    """Calls `first` before the first step, when nothing can be refused any more, and records that it has begun."""

    def __init__(self, first: Callable[[], None]) -> None:
        self.first = first
        self.begun = False

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        if not self.begun:
            self.begun = True
            self.first()


def make_trainer(recipe: TrainingRecipe, kind: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """Make a trainer of this kind, with the adapter and the quantization of the recipe.

    Raises:
        ValueError: settings, a model or an adapter that the trainer or a library under it refuses.
        FileNotFoundError: no such checkpoint to resume from.
    """
    if recipe.training.resume_from_checkpoint:
        check_checkpoint(recipe)
    with library_refusals("the trainer cannot be made"):
        set_seed(recipe.training.seed)
        settings |= {
            "peft_config": get_peft_config(recipe.model),
            "quantization_config": get_quantization_config(recipe.model),
        }
        return kind(*arguments, **settings)


def run_training(
    recipe: TrainingRecipe,
    trainer: Trainer,
    command: str,
    features: FeatureSet | None,
    report: Callable[[Log], dict[str, Any]] = lambda log: {},
) -> None:
    """Train, save the model, write `resolved.yaml` (at the first step) and `summary.json` beside it, and push it.

    Args:
        report: Further results, from the log.

    Raises:
        ValueError: what a library refuses before the first step.
        OSError: the model cannot be written or pushed.
    """
    watch = _Begun(lambda: recipe.write_resolved(features))
    trainer.add_callback(watch)
    try:
        result = trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    except Exception:
        if watch.begun:
            raise
        with library_refusals("the training cannot begin"):
            raise
    with library_refusals(f"cannot save the model in '{recipe.output}'", OSError):
        trainer.save_model(str(recipe.output))
    if trainer.accelerator.is_main_process:
        log = trainer.state.log_history
        results = {
            "model": str(recipe.output),
            "steps": result.global_step,
            "metrics": result.metrics,
            **report(log),
            "log": log,
            "features": recipe.feature_origins(features),
        }
        write_summary(recipe.output, command, recipe.to_dict(), results)
        status(f"model and summary.json written to {recipe.output}")
    if recipe.training.push_to_hub:
        with library_refusals("cannot push the model to the hub", OSError):
            trainer.push_to_hub(dataset_name=recipe.script.dataset_name)
