"""A combined readout, the KL anchor and the token penalty in a real step, against losses written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from invariants.by_hand import (
    TARGETS,
    WEIGHT,
    divergence_by_hand,
    gradients_by_hand,
    moved,
    rows_with_target_tokens,
    sasft_by_hand,
    tokens_by_hand,
)
from sft.cases import KeepGradients, make_trainer, relative_error, with_lora

from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback

ROWS = rows_with_target_tokens()


def one_step(model, callback, tokenizer, **arguments):
    keep = KeepGradients()
    trainer = make_trainer(
        copy.deepcopy(model),
        ROWS,
        [callback, keep],
        processing_class=tokenizer,
        **{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, **arguments},
    )
    trainer.train()
    return keep.gradients, trainer.state.log_history[0]


def probability(record):
    return record["logits"].softmax(-1)[:, TARGETS].sum(-1)


@pytest.mark.promise("Readouts, token penalty and KL anchor have the gradients of their formulas")
@pytest.mark.parametrize("positions", ["response", "predicting"])
@pytest.mark.parametrize("normalization", ["token_mean", "paper"])
def test_combined_decoder_readout(model, features, tiny_tokenizer, positions, normalization):
    options = {"readout": "decoder", "scale": "std", "combine": "effect", "layers": (2,)}

    def term(others):
        rows = features.layers[2]
        weights = rows.effects / rows.effects.sum()
        pooled = [features.language_index(name) for name in ("en", "fr")]
        sigma = features.layers[2].pooled_std("decoder", pooled, weights.double()).float()
        values = []
        for record in others:
            alpha = rows.decoder_mean[features.languages.index(record["row"]["language"])] @ weights
            excess = torch.relu((record["states"][2] @ rows.decoder.T @ weights - alpha) / sigma)
            response = record["labels"] != -100
            chosen = response if positions == "response" else torch.cat([response[1:], torch.tensor([False])])
            values.append(excess[chosen])
        return WEIGHT * torch.cat(values).sum()

    callback = SASFTCallback(
        features, weight=WEIGHT, positions=positions,
        normalization=normalization, **options,
    )  # fmt: skip
    found, _ = one_step(model, callback, tiny_tokenizer)
    assert relative_error(found, gradients_by_hand(model, ROWS, term, normalization)) <= 1e-6
    plain = gradients_by_hand(model, ROWS, lambda others: torch.zeros(()), normalization)
    assert relative_error(found, plain) > 0.01


@pytest.mark.promise("Readouts, token penalty and KL anchor have the gradients of their formulas")
def test_the_default_form(model, features, tiny_tokenizer):
    """Per layer, decoder directions weighted by ReLU(nu), in standard deviations, at predicting positions."""

    found, _ = one_step(model, SASFTCallback(features, weight=WEIGHT), tiny_tokenizer)
    assert relative_error(found, gradients_by_hand(model, ROWS, sasft_by_hand(features))) <= 1e-6


def start_of(model, how):
    """The model that the anchor holds on to, and what the callback is given for it."""
    if how == "adapter":
        start = copy.deepcopy(model)
        start.disable_adapter_layers()
        return start, None
    start = moved(model)
    return start, start


@pytest.mark.promise("Readouts, token penalty and KL anchor have the gradients of their formulas")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["given", "adapter"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_anchor(model, features, tiny_tokenizer, how, accumulation):
    trained = with_lora(copy.deepcopy(model)) if how == "adapter" else model
    start, given = start_of(trained, how)

    kept = [i for i in range(512) if i not in TARGETS.tolist()]

    def term(others):
        return WEIGHT * sum(divergence_by_hand(record, start, kept) for record in others)

    callback = SASFTCallback(features, weight=0.0, anchor_weight=WEIGHT, target_token_ids=TARGETS, anchor_model=given)
    found, logs = one_step(
        trained, callback, tiny_tokenizer,
        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    assert relative_error(found, gradients_by_hand(trained, ROWS, term, "token_mean")) <= 2e-6
    assert logs["sasft/anchor"] > 1e-4
    assert logs["sasft/hook_calls"] == 1


def test_anchor_to_a_frozen_copy_starts_at_zero_and_grows(model, features, tiny_tokenizer):
    callback = SASFTCallback(features, weight=0.5, anchor_weight=1.0, target_token_ids=TARGETS)
    trainer = make_trainer(
        copy.deepcopy(model), ROWS, [callback], processing_class=tiny_tokenizer, max_steps=3, learning_rate=1e-2
    )
    trainer.train()
    values = [entry["sasft/anchor"] for entry in trainer.state.log_history if "sasft/anchor" in entry]
    assert abs(values[0]) < 1e-6 < 1e-3 < values[-1]
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


@pytest.mark.promise("Readouts, token penalty and KL anchor have the gradients of their formulas")
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("normalization", ["token_mean", "paper"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_token_penalty(model, features, tiny_tokenizer, skip, normalization, accumulation):
    chosen = []

    def term(others):
        total = torch.zeros(())
        chosen.clear()
        for record in others:
            p = probability(record)
            for t in range(len(p) - 1):
                label = int(record["labels"][t + 1])
                if label == -100 or (skip and label in TARGETS.tolist()):
                    continue
                total = total - torch.log(1 - p[t])
                chosen.append(float(p[t].detach()))
        return WEIGHT * total

    expected = gradients_by_hand(model, ROWS, term, normalization)
    callback = TokenPenaltyCallback(
        "zh", WEIGHT, languages=features.languages, normalization=normalization, target_token_ids=TARGETS,
        skip_target_labels=skip,
    )  # fmt: skip
    found, logs = one_step(
        model, callback, tiny_tokenizer,
        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    assert relative_error(found, expected) <= 1e-6
    assert logs["token_penalty/target_probability"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-4)


LAYOUTS = [
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "padding_free": True},
]


@pytest.mark.promise("Readouts, token penalty and KL anchor have the gradients of their formulas")
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=["padded", "accumulated", "padding-free"])
@pytest.mark.parametrize("normalization", ["token_mean", "paper"])
def test_token_penalty_with_an_anchor(model, features, tiny_tokenizer, layout, normalization):
    """Without a FeatureSet and without a list of languages."""
    start, given = start_of(model, "given")
    callback = TokenPenaltyCallback(
        weight=WEIGHT, anchor_weight=WEIGHT, target_token_ids=TARGETS, anchor_model=given, normalization=normalization
    )
    found, logs = one_step(model, callback, tiny_tokenizer, **layout)
    expected = gradients_by_hand(model, ROWS, tokens_by_hand(start), normalization)
    assert relative_error(found, expected) <= 1e-6
    assert relative_error(gradients_by_hand(model, ROWS, lambda _: torch.zeros(()), normalization), expected) > 0.01
    assert logs["token_penalty/anchor"] > 1e-4
    assert logs["token_penalty/hook_calls"] == 1


@pytest.mark.promise("Readouts, token penalty and KL anchor have the gradients of their formulas")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["padded", "accumulated", "padding-free"])
@pytest.mark.parametrize("target", [None, "zh"])
def test_the_anchor_alone(model, features, tiny_tokenizer, layout, target):
    """Without a target every response is held, over all tokens, and the language column is not looked at."""
    start, given = start_of(model, "given")
    kept = [i for i in range(512) if target is None or i not in TARGETS.tolist()]
    callback = KLAnchorCallback(
        weight=WEIGHT, target=target, anchor_model=given, language="language" if target else "no such column",
        target_token_ids=None if target is None else TARGETS,
    )  # fmt: skip
    found, logs = one_step(model, callback, tiny_tokenizer, **layout)

    def term(records):
        return WEIGHT * sum(divergence_by_hand(record, start, kept) for record in records)

    expected = gradients_by_hand(model, ROWS, term, "token_mean", target=target)
    assert relative_error(found, expected) <= 1e-6
    assert logs["kl_anchor/divergence"] > 1e-4
    assert logs["kl_anchor/hook_calls"] == 1


def test_target_tokens_come_from_the_script(model, features, tiny_tokenizer):
    callback = TokenPenaltyCallback("zh", 0.1, languages=features.languages)
    tokens = callback.prepare(make_trainer(copy.deepcopy(model), ROWS, processing_class=tiny_tokenizer)).tokens.tolist()
    assert tiny_tokenizer("河水")["input_ids"][0] in tokens
    assert not set(tiny_tokenizer("The river")["input_ids"]) & set(tokens)
    latin = TokenPenaltyCallback("en")
    with pytest.raises(ValueError, match="target_token_ids"):
        one_step(model, latin, tiny_tokenizer)
    outside = SASFTCallback(features, anchor_weight=1.0, target_token_ids=torch.tensor([512]))
    with pytest.raises(ValueError, match="among the model's 512 tokens"):
        one_step(model, outside, tiny_tokenizer)


def test_sharded_parameters_are_refused(model, features, tiny_tokenizer):
    trainer = make_trainer(copy.deepcopy(model), ROWS, processing_class=tiny_tokenizer)
    trainer.is_fsdp_enabled = True
    for callback in (
        SASFTCallback(features, anchor_weight=1.0),
        TokenPenaltyCallback("zh", languages=features.languages),
        KLAnchorCallback(),
    ):
        with pytest.raises(ValueError, match="under FSDP"):
            callback.attach(trainer)
