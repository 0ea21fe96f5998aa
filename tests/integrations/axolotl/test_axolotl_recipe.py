"""axolotl accepts the recipe as it is, for eight GPUs that can do bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed; `make test-axolotl` installs it")

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
GPUS = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}


@pytest.fixture
def recipe():
    return yaml.safe_load((RECIPES / "integrations/axolotl/sasft_zh.yaml").read_text(encoding="utf-8"))


def check_config(recipe):
    """axolotl's own checks; loading a configuration would also ask for the model."""
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    config = DictDefault(recipe)
    prepare_plugins(config)
    return validate_config(config, capabilities=GPUS, env_capabilities={"torch_version": "2.13.0"})


def test_axolotl_accepts_it(recipe):
    from axolotl.utils.config import merge_input_args

    checked = check_config(recipe)
    assert not set(recipe) - set(merge_input_args()[1].model_fields), "axolotl ignores keys that it does not know"
    simple = [key for key, value in recipe.items() if isinstance(value, str | int | float)]
    assert {key: checked[key] for key in simple} == {key: recipe[key] for key in simple}


def test_its_loss_is_that_of_the_recipe_for_trl(recipe):
    from qscope_posttrain.integrations.axolotl import read_settings

    assert read_settings(check_config(recipe).qscope) == read_settings(recipe["qscope"])
    trl = yaml.safe_load((RECIPES / "qwen3-1.7b/sasft_zh.yaml").read_text(encoding="utf-8"))
    assert recipe["qscope"] == {key: trl[key] for key in recipe["qscope"]}
    same = {"learning_rate", "weight_decay", "warmup_steps", "gradient_accumulation_steps"}
    assert {key: recipe[key] for key in same} == {key: trl[key] for key in same}
