"""What cannot work with axolotl is an error before the first step, and says what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed; `make test-axolotl` installs it")

from axolotl_runs import KEEP, PLUGIN, Run
from datasets import Dataset
from integrations.frameworks import SASFT

from qscope_posttrain.errors import UserFileNotFoundError, UserTypeError, UserValueError
from qscope_posttrain.sft.baselines import TokenPenaltyCallback


@pytest.fixture
def refused(workplace, monkeypatch):
    """`refused(error, words, config, prepared)`: the run ends with this error, before a step; `prepared` is whether
    data have been tokenized until then."""
    import axolotl.utils.data.sft as preparation

    calls = []
    stock = preparation.get_dataset_wrapper
    monkeypatch.setattr(preparation, "get_dataset_wrapper", lambda **given: calls.append(given) or stock(**given))

    def refused(error, words, config, prepared=False):
        calls.clear()
        with pytest.raises(error) as caught:
            workplace.train_config(config)
        for word in words:
            assert word in str(caught.value)
        assert bool(calls) is prepared
        assert not Run(Path(config["output_dir"])).begun

    return refused


def test_a_plugin_without_its_block(refused, workplace):
    config = workplace.config(None, plugins=[PLUGIN])
    refused(ValueError, ["lacks a block `qscope:`"], config)


def test_a_block_without_the_plugin(refused, workplace):
    """axolotl ignores keys that it does not know, and would train without the penalty."""
    from importlib.metadata import entry_points

    assert any(point.value.replace(":", ".") == PLUGIN for point in entry_points(group="axolotl.plugins"))
    refused(ValueError, [f"lacks plugins: [{PLUGIN}]"], workplace.config(plugins=[KEEP]))


def test_neither_is_a_training_like_any_other(workplace):
    run = workplace.train(None)
    assert "sasft/penalty" not in run.logs[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sasft_wieght": 1.0}, ["sasft_wieght", "Did you mean", "sasft_weight"]),
        ({"learning_rate": 1.0}, ["learning_rate"]),
        ({"sasft_weight": -1.0}, ["SASFTConfig.weight", "-1.0", "begin with 'sasft_'"]),
        ({"method": "grpo"}, ["method must be one of", "grpo"]),
        ({"token_penalty_target": "zh"}, ["method sasft does not use 'token_penalty_target'"]),
        ({"features": None}, ["needs 'features'"]),
    ],
)
def test_a_wrong_block(refused, workplace, change, words):
    block = {"features": str(workplace.features), **SASFT, **change}
    refused(ValueError, words, workplace.config(block))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("context_parallel_size", 2),
        ("orpo_alpha", 1.0),
        ("chunked_cross_entropy", True),
        ("balance_labels", True),
        ("streaming", True),
        ("reward_model", True),
    ],
)
def test_options_of_axolotl_by_name(refused, workplace, option, value):
    refused(ValueError, ["the loss does not work with", f"`{option}: {value}`"], workplace.config(**{option: value}))


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
def test_preferences_and_rewards(refused, workplace, kind):
    config = workplace.config(
        rl=kind, remove_unused_columns=False, datasets=[{"path": str(workplace.data), "ds_type": "json"}]
    )
    refused(ValueError, ["the loss does not work with", "rl"], config)


def test_features_that_are_not_there(refused, workplace):
    config = workplace.config(SASFT | {"features": str(workplace.folder / "nothing.safetensors")})
    refused(UserFileNotFoundError, ["no features file", "nothing.safetensors"], config)


def test_data_without_the_column(refused, workplace):
    data = workplace.write(workplace.conversations(column=None))
    config = workplace.config(datasets=[{"path": str(data), "ds_type": "json", "type": "chat_template"}])
    refused(UserValueError, ["no column 'language'", "messages"], config, prepared=True)


def test_one_of_two_data_sets_without_the_column(refused, workplace):
    paths = [workplace.data, workplace.write(workplace.conversations(column=None))]
    config = workplace.config(
        datasets=[{"path": str(path), "ds_type": "json", "type": "chat_template"} for path in paths]
    )
    refused(UserValueError, ["no column 'language'"], config, prepared=True)


@pytest.mark.parametrize(("language", "word"), [("tlh", "'tlh'"), (None, "None")])
def test_a_row_in_no_known_language(refused, workplace, language, word):
    rows = workplace.conversations()
    rows[3]["language"] = language
    config = workplace.config(
        datasets=[{"path": str(workplace.write(rows)), "ds_type": "json", "type": "chat_template"}]
    )
    refused(UserValueError, ["of the training data", word], config, prepared=True)


def test_a_script_of_several_languages(refused, workplace):
    """Latin letters are English or French, both of which the features know."""
    config = workplace.config(SASFT | {"sasft_language": "script"})
    refused(UserValueError, ["of the training data", "does not decide between en, zh, fr"], config, prepared=True)


@pytest.mark.parametrize(
    "kind", ["completion", "alpaca", {"field_instruction": "messages", "field_output": "language"}]
)
def test_types_of_data_that_lose_the_column(refused, workplace, kind):
    config = workplace.config(datasets=[{"path": str(workplace.data), "ds_type": "json", "type": kind}])
    refused(UserValueError, ["chat_template", "script"], config, prepared=isinstance(kind, str))


def test_tokenized_data_without_the_column(refused, workplace):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]}] * 8
    path = workplace.folder / "tokens.parquet"
    Dataset.from_list(rows).to_parquet(path)
    config = workplace.config(datasets=[{"path": str(path), "ds_type": "parquet", "type": None}])
    refused(UserValueError, ["no column 'language'", "tokenized before"], config, prepared=True)


def test_another_trainer_of_axolotl(workplace):
    from axolotl.core.trainers import AxolotlPRMTrainer

    from qscope_posttrain.integrations.axolotl import AxolotlHost

    trainer = AxolotlPRMTrainer.__new__(AxolotlPRMTrainer)
    callback = TokenPenaltyCallback(languages=("en", "zh"))
    with pytest.raises(UserTypeError, match=re.escape("AxolotlPRMTrainer")):
        AxolotlHost(trainer, callback).check()


def test_attached_without_the_plugin(workplace):
    """By hand or through `add_callbacks_pre_trainer` of another plug-in: the message names this one."""
    from axolotl.core.trainers import AxolotlTrainer

    trainer = AxolotlTrainer.__new__(AxolotlTrainer)
    with pytest.raises(UserTypeError, match=r"qscope_posttrain\.integrations\.axolotl"):
        TokenPenaltyCallback(languages=("en", "zh")).attach(trainer)


def test_a_plugin_that_cannot_be_imported(workplace):
    config = workplace.config(plugins=["qscope_posttrain.integrations.axolotl.SASFTPlugins"])
    with pytest.raises(AttributeError, match="SASFTPlugins"):
        workplace.train_config(config)
