"""A combined readout, the KL anchor and the token penalty in a real step, against losses written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from sft.cases import (
    KeepGradients,
    make_rows,
    make_trainer,
    relative_error,
    with_lora,
)
from torch.nn.functional import cross_entropy

from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback

TARGETS = torch.arange(100, 140)
WEIGHT = 0.4
ROWS = make_rows(8)
# A response that contains target tokens, which "skip_target_labels" is about.
ROWS[0]["input_ids"][-3:] = ROWS[0]["labels"][-3:] = [100, 101, 139]


def gradients_by_hand(model, features, term, normaliser, target="zh"):
    """Rows run alone, all graphs kept; `term(list of row records) -> scalar sum`, divided by `normaliser` rows."""
    model = copy.deepcopy(model).train()
    states = {}
    blocks = [module for name, module in model.named_modules() if name.split(".")[-2:-1] == ["layers"]]
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda module, args, output, number=number: states.__setitem__(number, output))
    records, ce, count = [], torch.zeros(()), 0
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["labels"])
        ce = ce + cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
        records.append({"row": row, "logits": logits, "labels": labels, "states": {k: h[0] for k, h in states.items()}})
    others = [record for record in records if record["row"]["language"] != target]
    penalised = sum(int((record["labels"][1:] != -100).sum()) for record in others)
    divisor = {"token_mean": count, "paper": penalised}[normaliser]
    (ce / count + term(others) / divisor).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


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
    assert relative_error(found, gradients_by_hand(model, features, term, normalization)) <= 1e-6
    plain = gradients_by_hand(model, features, lambda others: torch.zeros(()), normalization)
    assert relative_error(found, plain) > 0.01


@pytest.mark.promise("Readouts, token penalty and KL anchor have the gradients of their formulas")
def test_the_default_form(model, features, tiny_tokenizer):
    """Per layer, decoder directions weighted by ReLU(nu), in standard deviations, at predicting positions."""

    def term(others):
        total = torch.zeros(())
        for layer, rows in features.layers.items():
            weights = rows.scores.relu() / rows.scores.relu().sum()
            pooled = [features.language_index(name) for name in ("en", "fr")]
            sigma = features.layers[layer].pooled_std("decoder", pooled, weights.double()).float()
            for record in others:
                alpha = rows.decoder_mean[features.languages.index(record["row"]["language"])] @ weights
                excess = torch.relu((record["states"][layer] @ rows.decoder.T @ weights - alpha) / sigma)
                response = record["labels"] != -100
                total = total + excess[torch.cat([response[1:], torch.tensor([False])])].sum()
        return WEIGHT * total

    found, _ = one_step(model, SASFTCallback(features, weight=WEIGHT), tiny_tokenizer)
    assert relative_error(found, gradients_by_hand(model, features, term, "token_mean")) <= 1e-6


def start_of(model, how):
    """The model that the anchor holds on to, and what the callback is given for it."""
    if how == "adapter":
        start = copy.deepcopy(model)
        start.disable_adapter_layers()
        return start, None
    start = copy.deepcopy(model)
    if how == "given":
        for parameter in start.parameters():
            parameter.data = parameter.data * 0.95
        return start, start
    return start, None


@pytest.mark.promise("Readouts, token penalty and KL anchor have the gradients of their formulas")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["given", "adapter"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_anchor(model, features, tiny_tokenizer, how, accumulation):
    trained = with_lora(copy.deepcopy(model)) if how == "adapter" else model
    start, given = start_of(trained, how)

    def term(others):
        total = torch.zeros(())
        kept = [i for i in range(512) if i not in TARGETS.tolist()]
        for record in others:
            with torch.no_grad():
                reference = start(input_ids=torch.tensor([record["row"]["input_ids"]])).logits[0]
            p, q = reference[:, kept].log_softmax(-1), record["logits"][:, kept].log_softmax(-1)
            for t in range(len(p) - 1):
                if record["labels"][t + 1] != -100:
                    total = total + (p[t].exp() * (p[t] - q[t])).sum()
        return WEIGHT * total

    callback = SASFTCallback(features, weight=0.0, anchor_weight=WEIGHT, target_token_ids=TARGETS, anchor_model=given)
    found, logs = one_step(
        trained, callback, tiny_tokenizer,
        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    assert relative_error(found, gradients_by_hand(trained, features, term, "token_mean")) <= 2e-6
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

    expected = gradients_by_hand(model, features, term, normalization)
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


def divergence(record, start, kept):
    """KL of a row's positions that predict a response token, over the tokens `kept`."""
    with torch.no_grad():
        reference = start(input_ids=torch.tensor([record["row"]["input_ids"]])).logits[0]
    p, q = reference[:, kept].log_softmax(-1), record["logits"][:, kept].log_softmax(-1)
    return sum((p[t].exp() * (p[t] - q[t])).sum() for t in range(len(p) - 1) if record["labels"][t + 1] != -100)


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
    kept = [i for i in range(512) if i not in TARGETS.tolist()]

    def term(others):
        total = torch.zeros(())
        for record in others:
            p = probability(record)
            for t in range(len(p) - 1):
                if record["labels"][t + 1] != -100 and record["labels"][t + 1] not in TARGETS:
                    total = total - WEIGHT * torch.log(1 - p[t])
            total = total + WEIGHT * divergence(record, start, kept)
        return total

    callback = TokenPenaltyCallback(
        weight=WEIGHT, anchor_weight=WEIGHT, target_token_ids=TARGETS, anchor_model=given, normalization=normalization
    )
    found, logs = one_step(model, callback, tiny_tokenizer, **layout)
    expected = gradients_by_hand(model, features, term, normalization)
    assert relative_error(found, expected) <= 1e-6
    assert relative_error(gradients_by_hand(model, features, lambda _: torch.zeros(()), normalization), expected) > 0.01
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
        return WEIGHT * sum(divergence(record, start, kept) for record in records)

    expected = gradients_by_hand(model, features, term, "token_mean", target=target)
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
