"""The part of a recipe that sets the loss, as trainers of other frameworks are given it."""

from __future__ import annotations

from pathlib import Path

import pytest
from integrations.reference import case_model, make_features

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.config import KLAnchorConfig, SASFTConfig, TokenPenaltyConfig
from qscope_posttrain.sft.settings import LossSettings


@pytest.mark.parametrize(
    ("values", "config"),
    [
        (
            {"features": "f.safetensors", "sasft_weight": 0.3, "sasft_layers": [1, 2], "anchor_weight": 1.0},
            SASFTConfig(weight=0.3, layers=(1, 2), anchor_weight=1.0),
        ),
        (
            {"method": "token_penalty", "token_penalty_target": "ko", "token_penalty_anchor_weight": 2.0},
            TokenPenaltyConfig(target="ko", anchor_weight=2.0),
        ),
        ({"method": "kl_anchor", "anchor_weight": 0.5}, KLAnchorConfig(weight=0.5)),
    ],
)
def test_the_keys_of_a_recipe_make_the_settings(values, config):
    assert LossSettings.read(values, "qscope").config == config


def test_the_framework_says_where_the_language_is_unless_the_user_does():
    values = {"features": "f", "sasft_target": "zh"}
    assert LossSettings.read(values, "here", language="channel").config.language == "channel"
    values["sasft_language"] = "script"
    assert LossSettings.read(values, "here", language="channel").config.language == "script"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"features": "f", "sasft_wieght": 1}, "here: unknown key 'sasft_wieght'. Did you mean 'sasft_weight'"),
        ({"features": "f", "learning_rate": 1}, "belongs to the framework's own settings"),
        ({"features": "f", "token_penalty_weight": 1.0}, "here: method sasft does not use 'token_penalty_weight'"),
        ({"features": "f", "sasft_weight": -1}, r"here: SASFTConfig.weight .* got -1.*begin with 'sasft_'"),
        ({"features": "f", "sasft_weight": "1"}, "must be a finite number"),
        ({"features": "f", "sasft_readout": "both"}, "must be one of 'encoder', 'decoder'"),
        ({"sasft_weight": 1}, "here: method sasft needs 'features'.*got None"),
        ({"method": "token_penalty", "features": "f"}, "uses no features"),
        ({"method": "sft"}, "leave the callback out"),
        ({"method": "SASFT", "features": "f"}, "method must be one of sasft, token_penalty, kl_anchor; got 'SASFT'"),
        ({"features": "f", "sasft_anchor_weight": 1.0, "anchor_weight": 2.0}, "are the same option; got 1.0 and 2.0"),
    ],
)
def test_what_cannot_be_meant_is_refused(values, words):
    with pytest.raises(UserValueError, match=words):
        LossSettings.read(values, "here")


def test_a_file_may_name_norwegian(tmp_path):
    file = tmp_path / "loss.yaml"
    file.write_text(
        "method: token_penalty\ntoken_penalty_target: zh\ntoken_penalty_ignore_languages: [no, en]\n"
        "token_penalty_skip_target_labels: no\n"
    )
    config = LossSettings.load(file).config
    assert config.ignore_languages == ("no", "en")
    assert config.skip_target_labels is False


FILES = sorted((Path(__file__).resolve().parents[2] / "recipes" / "integrations").glob("*/loss_*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_the_files_in_recipes_can_be_read(file):
    assert LossSettings.load(file).config.target == "zh"


def test_a_file_that_is_not_there_or_says_nothing(tmp_path):
    with pytest.raises(UserFileNotFoundError, match=r"absent\.yaml"):
        LossSettings.load(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserValueError, match="must map keys to values"):
        LossSettings.load(tmp_path / "list.yaml")


def test_the_callback_of_each_method(make_model, tmp_path):
    file = tmp_path / "features.safetensors"
    make_features(case_model(make_model)).save(file)
    made = LossSettings.read({"features": str(file), "sasft_weight": 0.3}, "here").callback()
    assert isinstance(made, SASFTCallback)
    assert made.config.weight == 0.3
    assert isinstance(LossSettings.read({"method": "token_penalty"}, "here").callback(), TokenPenaltyCallback)
    assert isinstance(LossSettings.read({"method": "kl_anchor"}, "here").callback(), KLAnchorCallback)
    with pytest.raises(FileNotFoundError):
        LossSettings.read({"features": "absent.safetensors"}, "here").callback()
