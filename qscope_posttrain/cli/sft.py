"""`qscope sft`: TRL's SFTTrainer with the SASFT penalty, from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import set_seed
from trl import SFTTrainer, get_peft_config, get_quantization_config

from qscope_posttrain.cli.inputs import load_tokenizer
from qscope_posttrain.cli.sft_arguments import Recipe, parse_recipe
from qscope_posttrain.cli.sft_data import load_rows, pack, without_packing
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.provenance import file_sha256, package_versions
from qscope_posttrain.report.progress import is_main_process, status
from qscope_posttrain.report.summary import writable_folder, write_summary, write_text
from qscope_posttrain.sft.baselines import TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback

if TYPE_CHECKING:
    from qscope_posttrain.sft.attachment import AuxiliaryLossCallback

RESOLVED = "resolved.yaml"


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
    if is_main_process():
        write_text(output / RESOLVED, resolved_yaml(recipe, features))
        status(f"configuration written to {output / RESOLVED}")
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
        train_rows = pack(recipe, train_rows, callback.languages)
        if evaluation is not None:
            evaluation = pack(recipe, evaluation, callback.languages)
        training = without_packing(training)
    given: Any = training.model_init_kwargs or {}
    own = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    training.model_init_kwargs = own | given
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
        raise ValueError(f"method {recipe.run.method} needs 'features', which also name the languages of the data.")
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


def load_features(recipe: Recipe) -> FeatureSet | None:
    """The FeatureSet of the recipe, if it names one."""
    return None if recipe.run.features is None else FeatureSet.load(recipe.run.features)


def feature_origins(recipe: Recipe, features: FeatureSet | None) -> dict[str, Any]:
    """The feature file, its sha256, and where its rows came from, with the sha256 of the SAE files."""
    if features is None or recipe.run.features is None:
        return {}
    path = Path(recipe.run.features)
    return {"file": str(path), "sha256": file_sha256(path), "provenance": dict(features.provenance)}


def resolved_yaml(recipe: Recipe, features: FeatureSet | None) -> str:
    """The whole configuration as a recipe that `qscope sft --config` reads, below versions and hashes as comments."""
    origins = {"versions": package_versions(), "features": feature_origins(recipe, features)}
    comments = yaml.safe_dump(origins, sort_keys=False, allow_unicode=True, width=1000)
    keys = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    return "".join(f"# {line}\n" for line in comments.splitlines()) + "\n" + keys
