"""`qscope sft`: TRL's SFTTrainer with the SASFT penalty, from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import set_seed
from trl import SFTTrainer, get_peft_config, get_quantization_config

from qscope_posttrain.cli.artefacts import feature_origins, load_features, write_resolved
from qscope_posttrain.cli.inputs import load_tokenizer
from qscope_posttrain.cli.rows import load_rows
from qscope_posttrain.cli.sft_arguments import Recipe, parse_recipe
from qscope_posttrain.cli.sft_data import pack, prepare_evaluation, without_packing
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.sft.baselines import TokenPenaltyCallback
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
    set_seed(recipe.training.seed)
    features = load_features(recipe)
    write_resolved(recipe, features, output)
    trainer = build_trainer(recipe, features)
    result = trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    trainer.save_model(str(output))
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
    if recipe.training.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.script.dataset_name)


def build_trainer(recipe: Recipe, features: FeatureSet | None) -> SFTTrainer:
    """A stock SFTTrainer with the method's callback in its list of callbacks."""
    training, model = recipe.training, recipe.model
    tokenizer = load_tokenizer(recipe.model_name, model.model_revision)
    train_rows = load_rows(recipe, recipe.script.dataset_train_split)
    evaluation = None
    if training.eval_strategy != "no":
        evaluation = load_rows(recipe, recipe.script.dataset_test_split)
    callback = build_callback(recipe, features)
    if training.packing and callback is not None:
        packed = pack(recipe, train_rows, callback.languages)
        if evaluation is not None:
            evaluation = prepare_evaluation(recipe, evaluation, train_rows)
        train_rows = packed
        training = without_packing(training)
    training.model_init_kwargs = recipe.model_init_kwargs()
    return SFTTrainer(
        model=recipe.model_name,
        args=training,
        train_dataset=train_rows,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
        callbacks=[] if callback is None else [callback],
    )


def build_callback(recipe: Recipe, features: FeatureSet | None) -> AuxiliaryLossCallback | None:
    """The callback of the recipe's method; None for plain SFT.

    Raises:
        ValueError: features and options that do not fit, or a method without the features it needs.
    """
    options = recipe.penalty
    if recipe.run.method == "sft":
        return None
    if features is None:
        raise UserValueError(f"method {recipe.run.method} needs 'features', which also name the languages of the data.")
    if recipe.run.method == "sasft":
        return SASFTCallback(features, **{name: getattr(options, name) for name in options.to_dict()})
    return TokenPenaltyCallback(
        options.target,
        options.weight,
        options.language,
        options.normalization,
        languages=features.languages,
        ignore_languages=options.ignore_languages,
    )
