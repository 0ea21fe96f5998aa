"""Make, run and save a trainer, and tell what the user got wrong from what broke.

Trainers refuse settings when they are made, and some (an optimizer without its package, a scheduler without its
options, a checkpoint of another model) only when training begins. From the first step on every error is a bug or a
failure of the machine, and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from transformers import Trainer, TrainerCallback, set_seed

from qscope_posttrain.cli.checks import check_checkpoint
from qscope_posttrain.cli.recipe import TrainingRecipe
from qscope_posttrain.errors import library_refusals

T = TypeVar("T", bound=Trainer)


class _Begun(TrainerCallback):
    """Whether a step has begun, and what is done before the first one."""

    def __init__(self, first: Callable[[], None]) -> None:
        self.first = first
        self.begun = False

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        if not self.begun:
            self.begun = True
            self.first()


def make_trainer(recipe: TrainingRecipe, make: Callable[[], T]) -> T:
    """The trainer that `make` returns.

    Raises:
        ValueError: settings, a model or an adapter that the trainer or a library under it refuses.
        FileNotFoundError: no such checkpoint to resume from.
    """
    if recipe.training.resume_from_checkpoint:
        check_checkpoint(recipe)
    with library_refusals("the trainer cannot be made"):
        set_seed(recipe.training.seed)
        return make()


def run_training(recipe: TrainingRecipe, trainer: Trainer, first: Callable[[], None]) -> Any:
    """Train, save the model, and return what `trainer.train` returns.

    `first` is called before the first step, when nothing can be refused any more, a checkpoint of another run included.

    Raises:
        ValueError: what a library refuses before the first step.
        OSError: the model cannot be written.
    """
    watch = _Begun(first)
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
    return result


def push(recipe: TrainingRecipe, trainer: Trainer) -> None:
    """Push the model to the hub where the recipe says so."""
    if recipe.training.push_to_hub:
        with library_refusals("cannot push the model to the hub", OSError):
            trainer.push_to_hub(dataset_name=recipe.script.dataset_name)
