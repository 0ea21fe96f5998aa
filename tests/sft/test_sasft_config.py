"""Settings from YAML, command lines and numpy end as plain JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sft.cases import LANGUAGES, case_model, make_features, make_rows, make_trainer

from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.config import KLAnchorConfig, SASFTConfig, TokenPenaltyConfig, known_languages
from qscope_posttrain.sft.data.language_ids import SampleLanguage


def test_integers_of_numpy_are_integers():
    config = SASFTConfig(layers=np.array([1, 2]), top=np.int64(2))
    assert json.loads(json.dumps(config.to_dict()))["layers"] == [1, 2]
    assert (type(config.layers[0]), type(config.top)) == (int, int)
    assert config == SASFTConfig(layers=[1, 2], top=2)
    json.dumps(TokenPenaltyCallback(weight=np.float32(0.5), languages=LANGUAGES).config.weight)


@pytest.mark.parametrize("settings", [{"layers": ["2"]}, {"layers": 2}, {"layers": [1.0]}, {"top": 2.5}])
def test_other_numbers_are_refused(settings):
    with pytest.raises(TypeError, match=r"layers must be integers, e\.g\. \[26, 27\], and top an integer"):
        SASFTConfig(**settings)


def test_a_checkpoint_is_written(make_model, tiny_tokenizer, tmp_path):
    model = case_model(make_model)
    callback = SASFTCallback(make_features(model), layers=np.array([2]), top=np.int64(2))
    trainer = make_trainer(
        model, make_rows(8), [callback], processing_class=tiny_tokenizer, save_strategy="steps", save_steps=1,
        output_dir=str(tmp_path),
    )  # fmt: skip
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists()


@pytest.mark.parametrize("config", [TokenPenaltyConfig, KLAnchorConfig])
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"weight": -1}, ValueError, "weight must be a finite number"),
        ({"weight": float("nan")}, ValueError, "weight must be a finite number"),
        ({"weight": "20"}, ValueError, "weight must be a finite number"),
        ({"normalization": "official"}, ValueError, "must be one of 'token_mean', 'paper'; got 'official'"),
        ({"target": "zh", "languages": ("en", "ko")}, ValueError, "'zh' is not among the languages en, ko"),
        ({"target": "zh", "ignore_languages": ["zh"]}, ValueError, "cannot be in ignore_languages"),
        ({"target": "zh", "languages": "zh"}, TypeError, r"names such as \('en', 'ko'\)"),
        ({"target": "zh", "ignore_languages": [1]}, TypeError, r"names such as \('en', 'ko'\)"),
        ({"ignore_languages": None}, TypeError, "must be names such as"),
        ({"weight": True}, ValueError, "finite number"),
    ],
)
def test_settings_that_cannot_work(config, settings, error, message):
    with pytest.raises(error, match=message):
        config(**settings)


def test_yes_and_no_are_no_words():
    with pytest.raises(TypeError, match="skip_target_labels must be True or False; got 'no'"):
        TokenPenaltyConfig(skip_target_labels="no")


def test_an_anchor_without_target_looks_at_no_language():
    with pytest.raises(ValueError, match="give a target"):
        KLAnchorConfig(ignore_languages=("ko",))
    assert not KLAnchorCallback().reads_languages
    assert KLAnchorCallback(target="zh").reads_languages


def test_defaults_are_the_settings():
    assert TokenPenaltyCallback().config == TokenPenaltyConfig()
    assert KLAnchorCallback().config == KLAnchorConfig()
    assert (TokenPenaltyConfig().weight, KLAnchorConfig().weight) == (20.0, 1.0)


def test_a_config_takes_the_place_of_options(make_model):
    features = make_features(case_model(make_model))
    for config, make in (
        (SASFTConfig(weight=0.5, top=2), lambda **given: SASFTCallback(features, **given)),
        (TokenPenaltyConfig(target="ko", weight=3.0), TokenPenaltyCallback),
        (KLAnchorConfig(weight=0.5), KLAnchorCallback),
    ):
        assert make(config=config).config is config
        with pytest.raises(TypeError, match="Give weight in the config, or leave the config out; got both"):
            make(config=config, weight=7.0)
        with pytest.raises(TypeError, match=f"config must be a {type(config).__name__}; got dict"):
            make(config={})


def test_an_unknown_option_is_named_with_the_nearest(make_model):
    features = make_features(case_model(make_model))
    with pytest.raises(TypeError, match=r"SASFTConfig has no option 'anchor_weigth'.*Did you mean 'anchor_weight'\?"):
        SASFTCallback(features, anchor_weigth=1.0)
    with pytest.raises(TypeError, match="SASFTConfig has no option 'position_weight'"):
        SASFTCallback(features, position_weight="risk")


@pytest.mark.parametrize("target", ["zh", "ja", "ru", "ko", "th"])
def test_every_language_but_the_target_is_another_one(target):
    """Without a list: a column may hold any code, and letters need only tell the target's script from the others."""
    texts = {
        "zh": "你好世界",
        "ja": "こんにちは世界",
        "ru": "привет",
        "ko": "안녕",
        "th": "สวัสดี",
        "en": "hello",
        "fr": "été",
    }
    for rule in ("language", "script"):
        config = TokenPenaltyConfig(target=target, language=rule)
        decide = SampleLanguage(rule, known_languages(config))
        for language, text in texts.items():
            found = decide.id(decide({"text": text, "language": language}))
            assert (found == 0) == (language == target), (rule, language)
            assert found >= 0


def test_an_ignored_language_takes_no_part():
    for rule in ("language", "script"):
        config = TokenPenaltyConfig(language=rule, ignore_languages=("ru",))
        decide = SampleLanguage(rule, known_languages(config), config.ignore_languages)
        assert decide.id(decide({"text": "привет", "language": "ru"})) == -1
        assert decide.id(decide({"text": "hello", "language": "en"})) > 0


def test_a_misspelt_label_is_no_other_language(make_model, tiny_tokenizer):
    rows = [{**row, "language": "englsh"} for row in make_rows(8)]
    with pytest.raises(ValueError, match="englsh"):
        make_trainer(case_model(make_model), rows, [TokenPenaltyCallback()], processing_class=tiny_tokenizer).train()
