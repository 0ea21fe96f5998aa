"""Effects and the causal check, on a tiny model in which the direction of Chinese is planted."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.testbed.feature_sets import direction_feature_set
from qscope_posttrain.features.build import random_directions
from qscope_posttrain.features.causal import (
    CONTROL,
    FEATURE,
    MEANS,
    causal_check,
    effect_gradients,
    measure_effects,
)
from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.models.layers import evaluation_mode
from qscope_posttrain.models.scoring import TextScores, contrast_sample, score_sample
from qscope_posttrain.models.steering import Steering, steer
from qscope_posttrain.text.tokens import script_token_ids

LAYER = 3


@pytest.fixture(scope="module")
def planted(make_model, tiny_tokenizer, texts):
    """(model, features): the LM head reads Han tokens off one direction of the residual stream."""
    model = make_model()
    direction = torch.randn(64, generator=torch.Generator().manual_seed(2))
    direction /= direction.norm()
    han = script_token_ids(tiny_tokenizer, "Han")
    with torch.no_grad():
        model.lm_head.weight[han] += 0.6 * direction
    statistics = collect_statistics(model, tiny_tokenizer, texts, {LAYER: None})
    return model, direction_feature_set(statistics, LAYER, 2 * direction, "planted", language="zh")


def explicit_scores(model, tokenizer, texts, languages, ids):
    """Mean P(ids), mean log P(ids) and perplexity over all predicting positions, text by text."""
    probability, loss = [], []
    for language in languages:
        for line in texts[language]:
            tokens = torch.tensor([tokenizer(line)["input_ids"]])
            with torch.no_grad():
                log = model(tokens).logits[0].double().log_softmax(-1)
            probability.append(log[:-1, ids].exp().sum(-1))
            loss.append(-log[:-1].gather(1, tokens[0, 1:, None])[:, 0])
    probability = torch.cat(probability)
    return float(probability.mean()), float(probability.log().mean()), float(torch.cat(loss).mean().exp())


def target_probability(model, tokenizer, texts, target, **options) -> TextScores:
    sample = contrast_sample(model, tokenizer, texts, target, **options)
    with evaluation_mode(model):
        return score_sample(model, sample)


def test_target_probability_equals_a_plain_loop(planted, tiny_tokenizer, texts):
    model, _ = planted
    han = script_token_ids(tiny_tokenizer, "Han")
    mean, _, perplexity = explicit_scores(model, tiny_tokenizer, texts, ["en", "fr", "ru", "ko"], han)
    for tokens_per_batch in (1, 300, 4096):
        scores = target_probability(model, tiny_tokenizer, texts, "zh", tokens_per_batch=tokens_per_batch)
        assert scores.mean_probability == pytest.approx(mean, rel=1e-5)
        assert scores.perplexity == pytest.approx(perplexity, rel=1e-5)
        assert len(scores.tokens) == 16


def test_soft_caps_of_the_model_are_respected(make_model, tiny_tokenizer, texts):
    model = make_model("gemma2", final_logit_softcapping=0.5)
    han = script_token_ids(tiny_tokenizer, "Han")
    mean, _, _ = explicit_scores(model, tiny_tokenizer, texts, ["en", "fr", "ru", "ko"], han)
    assert target_probability(model, tiny_tokenizer, texts, "zh").mean_probability == pytest.approx(mean, rel=1e-5)


def test_languages_that_write_the_target_script_are_not_read(planted, tiny_tokenizer, texts):
    model, _ = planted
    with_japanese = {"ja": ["日本語の文章です。"], "zh": texts["zh"], "en": texts["en"]}
    assert len(target_probability(model, tiny_tokenizer, with_japanese, "zh").tokens) == len(texts["en"])
    assert len(target_probability(model, tiny_tokenizer, with_japanese, "zh", target_tokens=[7]).tokens) == 5


def test_sample_depends_on_content_only(planted, tiny_tokenizer, texts):
    model, _ = planted
    turned = {language: lines[::-1] for language, lines in texts.items()}
    first = target_probability(model, tiny_tokenizer, texts, "zh", texts_per_language=2)
    second = target_probability(model, tiny_tokenizer, turned, "zh", texts_per_language=2)
    assert len(first.tokens) == 8
    assert first.mean_probability == second.mean_probability


@pytest.mark.parametrize("layer", [0, LAYER])
def test_effect_is_the_derivative_of_steering_every_position(layer, planted, tiny_tokenizer, texts):
    model = copy.deepcopy(planted[0]).double()
    han = script_token_ids(tiny_tokenizer, "Han")
    gradient = effect_gradients(model, tiny_tokenizer, texts, "zh", [0, LAYER], tokens_per_batch=200)[layer]
    direction = torch.randn(64, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    step, means = 1e-4, []
    for sign in (1, -1):
        with steer(model, Steering(direction, (layer,), sign * step)):
            means.append(explicit_scores(model, tiny_tokenizer, texts, ["en", "fr", "ru", "ko"], han)[1])
    assert float(gradient @ direction) == pytest.approx((means[0] - means[1]) / (2 * step), rel=1e-3)


def test_effects_need_no_trainable_parameter_and_leave_no_trace(planted, tiny_tokenizer, texts):
    model = copy.deepcopy(planted[0])
    expected = effect_gradients(model, tiny_tokenizer, texts, "zh", [1])[1]
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(False)
    found = effect_gradients(model, tiny_tokenizer, texts, "zh", [1])[1]
    torch.testing.assert_close(found, expected)
    assert not model.model.embed_tokens._forward_hooks
    assert not model.model.layers[1]._forward_hooks


def test_measure_effects_fills_the_rows_of_the_target(planted, tiny_tokenizer, texts):
    model, features = planted
    rows = features.layers[LAYER]
    both = replace(features, layers={LAYER: replace(rows.take([0, 0]), labels=("zh", "ru"))})
    measured = measure_effects(both, model, tiny_tokenizer, texts, "zh").layers[LAYER]
    gradient = effect_gradients(model, tiny_tokenizer, texts, "zh", [LAYER])[LAYER]
    assert float(measured.effects[0]) == pytest.approx(float(rows.decoder[0].double() @ gradient), rel=1e-5)
    assert measured.effects[0] > 0.05
    assert measured.effects[1].isnan()


def test_the_planted_direction_passes_and_random_ones_do_not(planted, tiny_tokenizer, texts):
    model, features = planted
    report = causal_check(model, tiny_tokenizer, texts, features, "zh", strengths=(0.3,))
    for intervention, sign in (("subtract", -1), ("add", 1)):
        (effect,) = report.of(FEATURE, LAYER, intervention)
        assert report.beyond_controls(effect), intervention
        assert sign * effect.probability_change.estimate > 0.1
        low, high = effect.probability_change.low, effect.probability_change.high
        assert low < effect.probability_change.estimate < high
        controls = report.of(CONTROL, LAYER, intervention)
        assert len(controls) == 5
        assert not all(report.beyond_controls(control) for control in controls)
    assert len(report.of(MEANS, LAYER, "add", 0.3)) == 1
    assert report.languages == ("en", "fr", "ru", "ko")
    assert report.texts == 16


def test_numbers_of_the_report_are_those_of_a_plain_loop(planted, tiny_tokenizer, texts):
    model, features = planted
    rows = features.layers[LAYER]
    han = script_token_ids(tiny_tokenizer, "Han")
    report = causal_check(model, tiny_tokenizer, texts, features, "zh", strengths=(0.2,), random_count=1)
    (effect,) = report.of(FEATURE, LAYER, "subtract")
    unit = rows.decoder[0] / rows.decoder[0].norm()
    languages = ["en", "fr", "ru", "ko"]
    base = explicit_scores(model, tiny_tokenizer, texts, languages, han)
    with steer(model, Steering(unit * -0.2 * rows.residual_median_norm, (LAYER,))):
        mean, _, perplexity = explicit_scores(model, tiny_tokenizer, texts, languages, han)
    assert effect.probability == pytest.approx(mean, rel=1e-4)
    assert effect.probability_change.estimate == pytest.approx(mean / base[0] - 1, rel=1e-3)
    assert effect.perplexity_change.estimate == pytest.approx(perplexity / base[2] - 1, rel=1e-2, abs=1e-5)
    (gone,) = report.of(FEATURE, LAYER, "project out")
    with steer(model, Steering(unit, (LAYER,), mode="project_out")):
        mean, _, _ = explicit_scores(model, tiny_tokenizer, texts, languages, han)
    assert gone.probability == pytest.approx(mean, rel=1e-4)


def test_table_has_one_line_for_all_controls(planted, tiny_tokenizer, texts):
    model, features = planted
    report = causal_check(model, tiny_tokenizer, texts, features, "zh", random_count=3)
    table = report.to_table()
    assert len(table.rows) == 3 * 3
    assert sum("random direction (3): mean, range" in row for row in table.rows) == 3
    controls = {LAYER: {"drawn": random_directions(torch.ones(1), 64, seed=1)[0]}}
    named = causal_check(model, tiny_tokenizer, texts, features, "zh", controls=controls)
    assert len(named.of(CONTROL, LAYER, "add")) == 1


def test_report_is_reproducible(planted, tiny_tokenizer, texts):
    model, features = planted
    first, second = (causal_check(model, tiny_tokenizer, texts, features, "zh", random_count=2) for _ in range(2))
    assert first == second


class TestErrors:
    def test_target(self, planted, tiny_tokenizer, texts):
        model, features = planted
        with pytest.raises(ValueError, match="no row for language 'ru'"):
            causal_check(model, tiny_tokenizer, texts, features, "ru")
        with pytest.raises(ValueError, match="'xx' is not in this FeatureSet"):
            measure_effects(features, model, tiny_tokenizer, texts, "xx")

    def test_no_other_language(self, planted, tiny_tokenizer, texts):
        model, features = planted
        with pytest.raises(ValueError, match="other than 'zh' is needed, one that does not write Han"):
            causal_check(model, tiny_tokenizer, {"zh": texts["zh"], "ja": ["文"]}, features, "zh")

    def test_strengths(self, planted, tiny_tokenizer, texts):
        model, features = planted
        for strengths in ((), (0.1, -1.0)):
            with pytest.raises(ValueError, match="strengths must be positive"):
                causal_check(model, tiny_tokenizer, texts, features, "zh", strengths=strengths)

    @pytest.mark.parametrize("ids", [[], [-1], [512]])
    def test_target_tokens(self, ids, planted, tiny_tokenizer, texts):
        with pytest.raises(ValueError, match="ids from 0 to 511"):
            target_probability(planted[0], tiny_tokenizer, texts, "zh", target_tokens=torch.tensor(ids))

    def test_another_model(self, planted, make_model, tiny_tokenizer, texts):
        with pytest.raises(ValueError, match="num_hidden_layers 4 in the features, 2 in the model"):
            causal_check(make_model(num_hidden_layers=2), tiny_tokenizer, texts, planted[1], "zh")
