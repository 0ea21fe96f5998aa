"""What a training command reads and leaves beside the model: features with their origins, resolved.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qscope_posttrain.cli.recipe import TrainingRecipe
from qscope_posttrain.cli.recipe_keys import code_requests
from qscope_posttrain.distributed import is_main_process
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.feature_set_file import feature_set_path
from qscope_posttrain.provenance import file_sha256, package_versions
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import write_text

RESOLVED = "resolved.yaml"


def load_features(recipe: TrainingRecipe) -> FeatureSet | None:
    """The FeatureSet of the recipe, if it names one."""
    return None if recipe.run.features is None else FeatureSet.load(recipe.run.features)


def feature_origins(recipe: TrainingRecipe, features: FeatureSet | None) -> dict[str, Any]:
    """The feature file, its sha256, and where its rows came from, with the sha256 of the SAE files."""
    if features is None or recipe.run.features is None:
        return {}
    path = feature_set_path(recipe.run.features)
    return {"file": str(path), "sha256": file_sha256(path), "provenance": dict(features.provenance)}


def write_resolved(recipe: TrainingRecipe, features: FeatureSet | None, output: Path) -> None:
    """Write `resolved.yaml` into `output`, from the main process alone."""
    if is_main_process():
        write_text(output / RESOLVED, resolved_yaml(recipe, features))
        status(f"configuration written to {output / RESOLVED}")


def resolved_yaml(recipe: TrainingRecipe, features: FeatureSet | None) -> str:
    """The whole configuration as a recipe that `--config` reads, below versions and hashes as comments."""
    origins: dict[str, Any] = {"versions": package_versions(), "features": feature_origins(recipe, features)}
    values = recipe.to_dict()
    if asked := code_requests(values):
        origins = {"read back with": f"--allow-code, for it names code: {'; '.join(asked)}"} | origins
    comments = yaml.safe_dump(origins, sort_keys=False, allow_unicode=True, width=1000)
    keys = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return "".join(f"# {line}\n" for line in comments.splitlines()) + "\n" + keys
