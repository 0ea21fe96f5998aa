"""normalization="official" is the published loss, with its dependence on gradient accumulation."""

from __future__ import annotations

import copy

import pytest
import torch
from sft.cases import (
    KeepGradients,
    case_model,
    make_features,
    make_rows,
    make_trainer,
    paper_callback,
    relative_error,
)
from torch.nn.functional import cross_entropy

LAMBDA = 0.3


def published_gradients(model, features, micro_batches, languages, zero_threshold):
    """The published formula, batched and padded as the published code has it.

    Per micro-batch: CE sum over the window's token count, plus, per layer,
    lambda * sum_bt m q sum_s ReLU(x W_enc + b_enc - alpha[lang]) / (|S| sum_bt m + 1).
    """
    model = copy.deepcopy(model).train()
    states: dict[int, torch.Tensor] = {}
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda module, args, output, number=number: states.__setitem__(number, output))
    window = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)
    penalties = []
    for batch, codes in zip(micro_batches, languages, strict=True):
        labels = batch["labels"]
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        ce = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        m = (labels != -100).float()
        q = torch.tensor([float(code != "zh") for code in codes])
        auxiliary = torch.zeros(())
        for layer, rows in features.layers.items():
            index = torch.tensor([features.languages.index(code) for code in codes])
            alpha = 0.0 if zero_threshold else rows.encoder_mean[index][:, None, :]
            f = states[layer] @ rows.encoder.T + rows.encoder_bias
            per_token = torch.relu(f - alpha).sum(-1)
            auxiliary = auxiliary + (per_token * m * q[:, None]).sum() / (len(rows) * m.sum() + 1)
        (ce / window + LAMBDA * auxiliary).backward()
        penalties.append(float(auxiliary.detach()))
    return {name: p.grad for name, p in model.named_parameters()}, sum(penalties)


@pytest.mark.promise('normalization="official" equals the published formula, its dependence on accumulation included')
@pytest.mark.parametrize("threshold", ["language_mean", "zero"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_official_equals_the_published_formula(make_model, tiny_tokenizer, accumulation, threshold):
    model = case_model(make_model)
    features = make_features(model)
    keep = KeepGradients()
    callback = paper_callback(features, weight=LAMBDA, normalization="official", threshold=threshold)
    trainer = make_trainer(
        copy.deepcopy(model),
        make_rows(8),
        [callback, keep],
        processing_class=tiny_tokenizer,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    seen: list[dict] = []
    inner = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **options: (
        seen.append({k: v.clone() for k, v in inputs.items()}) or inner(model, inputs, **options)
    )
    trainer.train()
    languages = [[features.languages[int(row[0])] for row in batch["sasft_language_ids"]] for batch in seen]
    expected, penalty = published_gradients(model, features, seen, languages, threshold == "zero")
    assert len(seen) == accumulation
    assert relative_error(keep.gradients, expected) <= 1e-6
    assert trainer.state.log_history[0]["sasft/penalty"] == pytest.approx(penalty, rel=1e-5)


@pytest.mark.promise('normalization="official" equals the published formula, its dependence on accumulation included')
def test_official_weight_grows_with_accumulation_and_token_mean_does_not(make_model, tiny_tokenizer):
    model = case_model(make_model)
    features = make_features(model)
    logged = {}
    for normalization in ("official", "token_mean"):
        for accumulation in (1, 4):
            trainer = make_trainer(
                copy.deepcopy(model),
                make_rows(8),
                [paper_callback(features, weight=LAMBDA, normalization=normalization)],
                processing_class=tiny_tokenizer,
                per_device_train_batch_size=8 // accumulation,
                gradient_accumulation_steps=accumulation,
            )
            trainer.train()
            logged[normalization, accumulation] = trainer.state.log_history[0]["sasft/penalty"]
    assert 3 < logged["official", 4] / logged["official", 1] < 5
    assert logged["token_mean", 4] == pytest.approx(logged["token_mean", 1], rel=1e-5)
