"""`qscope sft`: TRL's SFTTrainer with an auxiliary loss, from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trl import SFTTrainer, get_peft_config, get_quantization_config

from qscope_posttrain.cli.artefacts import feature_origins, load_features, write_resolved
from qscope_posttrain.cli.rows import load_rows
from qscope_posttrain.cli.sft_arguments import Recipe, parse_recipe
from qscope_posttrain.cli.sft_data import pack, prepare_evaluation, trainer_tokenizer, without_packing
from qscope_posttrain.cli.training import make_trainer, push, run_training
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback

if TYPE_CHECKING:
    from qscope_posttrain.sft.attachment import AuxiliaryLossCallback


def run(arguments: Sequence[str]) -> int:
    """Parse, then check (`--dry_run`) or train. Returns the exit status."""
    recipe = parse_recipe(arguments)
    if recipe.run.dry_run:
        from qscope_posttrain.cli.sft_checks import check_recipe

        checks = check_recipe(recipe)
        checks.table().print()
        return 0 if checks.passed else 1
    train(recipe)
    return 0


def train(recipe: Recipe) -> None:
    """Train, save the model, and write `resolved.yaml` and `summary.json` beside it."""
    output = writable_folder(recipe.output)
    features = None if recipe.penalty is None else load_features(recipe)  # the control does without the file
    trainer = build_trainer(recipe, features)
    result = run_training(recipe, trainer, lambda: write_resolved(recipe, features, output))
    if trainer.accelerator.is_main_process:
        results = {
            "model": str(output),
            "steps": result.global_step,
            "metrics": result.metrics,
            "log": trainer.state.log_history,
            "features": feature_origins(recipe, features),
        }
        write_summary(output, "sft", recipe.to_dict(), results)
        status(f"model and summary.json written to {output}")
    push(recipe, trainer)


def build_trainer(recipe: Recipe, features: FeatureSet | None) -> SFTTrainer:
    """A stock SFTTrainer with the method's callback in its list of callbacks."""
    training, model = recipe.trainer_arguments(), recipe.model
    tokenizer = trainer_tokenizer(recipe, training)
    train_rows = load_rows(recipe, recipe.script.dataset_train_split)
    evaluation = None
    if training.eval_strategy != "no":
        evaluation = load_rows(recipe, recipe.script.dataset_test_split)
    callback = build_callback(recipe, features)
    if training.packing and callback is not None and callback.reads_languages:
        packed = pack(recipe, train_rows, callback.languages)
        if evaluation is not None:
            evaluation = prepare_evaluation(recipe, evaluation, train_rows)
        train_rows = packed
        training = without_packing(training)
    return make_trainer(
        recipe,
        lambda: SFTTrainer(
            model=recipe.model_name,
            args=training,
            train_dataset=train_rows,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=get_peft_config(model),
            quantization_config=get_quantization_config(model),
            callbacks=[] if callback is None else [callback],
        ),
    )


def build_callback(recipe: Recipe, features: FeatureSet | None) -> AuxiliaryLossCallback | None:
    """The callback of the recipe's method; None for plain SFT.

    Raises:
        ValueError: features and options that do not fit, or method sasft without features.
    """
    if recipe.penalty is None:
        return None
    if recipe.run.method == "token_penalty":
        return TokenPenaltyCallback(config=recipe.penalty)
    if recipe.run.method == "kl_anchor":
        return KLAnchorCallback(config=recipe.penalty)
    if features is None:
        raise UserValueError("method sasft needs 'features'.")
    return SASFTCallback(features, config=recipe.penalty)
