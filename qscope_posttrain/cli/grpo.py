"""`qscope grpo`: TRL's GRPOTrainer with one steered negative in each group, from a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from trl import get_peft_config, get_quantization_config

from qscope_posttrain.cli.artefacts import feature_origins, write_resolved
from qscope_posttrain.cli.grpo_arguments import GRPORecipe, parse_recipe
from qscope_posttrain.cli.grpo_checks import check_recipe, prepare
from qscope_posttrain.cli.grpo_data import needed_features
from qscope_posttrain.cli.grpo_results import final_metrics, results_table
from qscope_posttrain.cli.training import make_trainer, push, run_training
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary
from qscope_posttrain.rl.trainer import SteeredGRPOTrainer


def run(arguments: Sequence[str]) -> int:
    """Parse, then check (`--dry_run`) or train. Returns the exit status."""
    recipe = parse_recipe(arguments)
    if recipe.run.dry_run:
        checks = check_recipe(recipe)
        checks.table().print()
        return 0 if checks.passed else 1
    train(recipe)
    return 0


def train(recipe: GRPORecipe) -> None:
    """Train, save the model, and write `resolved.yaml` and `summary.json` beside it."""
    output = writable_folder(recipe.output)
    features = needed_features(recipe)
    inputs = prepare(recipe, features)
    trainer = make_trainer(
        recipe,
        lambda: SteeredGRPOTrainer(
            recipe.model_name,
            inputs.rewards,
            recipe.trainer_arguments(),
            features=features,
            train_dataset=inputs.rows,
            eval_dataset=inputs.evaluation,
            processing_class=inputs.tokenizer,
            peft_config=get_peft_config(recipe.model),
            quantization_config=get_quantization_config(recipe.model),
        ),
    )
    result = run_training(recipe, trainer, lambda: write_resolved(recipe, features, output))
    if trainer.accelerator.is_main_process:
        log = trainer.state.log_history
        table = results_table(log)
        results = {
            "model": str(output),
            "steps": result.global_step,
            "metrics": result.metrics,
            "final": final_metrics(log),
            "table": table,
            "log": log,
            "features": feature_origins(recipe, features),
        }
        write_summary(output, "grpo", recipe.to_dict(), results)
        table.print()
        status(f"model and summary.json written to {output}")
    push(recipe, trainer)
