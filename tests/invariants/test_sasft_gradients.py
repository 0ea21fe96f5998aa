"""The gradient of a training step equals that of the loss written out by hand, however the batch is arranged."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from sft.cases import (
    KeepGradients,
    case_model,
    gradient_cases,
    make_features,
    make_rows,
    make_trainer,
    paper_callback,
    reference_gradients,
    relative_error,
    row_penalty,
)

from qscope_posttrain.sft.data.packing import pack_with_languages

WEIGHT = 0.5
TOLERANCE = 1e-6
CHECKPOINTING = {
    "none": {"gradient_checkpointing": False},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.fixture(scope="module")
def cases(make_model):
    return gradient_cases(make_model, WEIGHT)


def one_step(model, rows, callback, tokenizer, **arguments):
    keep = KeepGradients()
    trainer = make_trainer(copy.deepcopy(model), rows, [callback, keep], processing_class=tokenizer, **arguments)
    trainer.train()
    return keep.gradients, trainer


@pytest.mark.promise(
    "The gradient of SFT with the penalty equals an explicitly written loss to 1e-6: padded, padding-free and "
    "packed batches, accumulation, no, non-reentrant and reentrant checkpointing, full and LoRA"
)
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", list(CHECKPOINTING))
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("batches", ["padded", "padding-free", "packed"])
def test_gradient_equals_the_written_out_loss(cases, tiny_tokenizer, batches, accumulation, checkpointing, tuning):
    model, features, rows, (expected, loss, penalty) = cases[tuning]
    dataset = Dataset.from_list(rows)
    if batches == "packed":
        dataset = pack_with_languages(dataset, tiny_tokenizer, max_length=30)
        assert len(dataset) == 4
    gradients, trainer = one_step(
        model,
        dataset,
        paper_callback(features, weight=WEIGHT),
        tiny_tokenizer,
        padding_free=batches != "padded",
        per_device_train_batch_size=len(dataset) // accumulation,
        gradient_accumulation_steps=accumulation,
        **CHECKPOINTING[checkpointing],
    )
    assert relative_error(gradients, expected) <= TOLERANCE
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)
    assert logs["sasft/penalty"] == pytest.approx(penalty, rel=1e-5)
    assert logs["sasft/hook_calls"] == 1


@pytest.mark.promise(
    "The gradient stays that of the written-out loss in mixtures of experts and hybrid models, and under torch.compile"
)
@pytest.mark.parametrize(
    ("architecture", "batch", "overrides"),
    [
        # Without TRL's router loss, which depends on how rows are batched.
        ("qwen3_moe", 4, {"router_aux_loss_coef": 0.0}),
        ("qwen3_5_text", 4, {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    ],
)
def test_mixtures_of_experts_and_hybrid_models(make_model, tiny_tokenizer, architecture, batch, overrides):
    rows, model = make_rows(8), case_model(make_model, architecture=architecture, **overrides)
    features = make_features(model)
    expected, loss, penalty = reference_gradients(model, rows, row_penalty(features), WEIGHT)
    gradients, trainer = one_step(
        model,
        rows,
        paper_callback(features, weight=WEIGHT),
        tiny_tokenizer,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=8 // batch,
    )
    assert relative_error(gradients, expected) <= TOLERANCE
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)
    assert logs["sasft/penalty"] == pytest.approx(penalty, rel=1e-5)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_comparison_notices_a_missing_term(cases, tuning):
    model, features, rows, (expected, _, _) = cases[tuning]
    without, _, _ = reference_gradients(model, rows, row_penalty(features), 0.0)
    assert relative_error(without, expected) > 0.1


def test_paper_normalisation_is_a_mean_over_penalised_tokens_of_the_whole_window(cases, tiny_tokenizer):
    model, features, rows, _ = cases["full"]
    others = [row for row in rows if row["language"] != "zh"]
    penalised = sum(sum(label != -100 for label in row["labels"][1:]) for row in others)
    counted = sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    # Sum over features (3 of them) instead of their mean, and divided by the penalised tokens.
    weight = WEIGHT * 3 * counted / penalised
    expected, _, penalty = reference_gradients(model, rows, row_penalty(features), weight)
    for accumulation in (1, 4):
        gradients, trainer = one_step(
            model,
            rows,
            paper_callback(features, weight=WEIGHT, normalization="paper"),
            tiny_tokenizer,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        assert relative_error(gradients, expected) <= TOLERANCE
        logged = trainer.state.log_history[0]["sasft/penalty"]
        assert logged == pytest.approx(penalty * 3 * counted / penalised, rel=1e-5)


@pytest.mark.promise(
    "The gradient stays that of the written-out loss in mixtures of experts and hybrid models, and under torch.compile"
)
@pytest.mark.slow
def test_gradient_under_torch_compile(cases, tiny_tokenizer):
    model, features, rows, (expected, _, _) = cases["full"]
    gradients, trainer = one_step(
        model,
        rows,
        paper_callback(features, weight=WEIGHT),
        tiny_tokenizer,
        torch_compile=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        **CHECKPOINTING["non-reentrant"],
    )
    assert relative_error(gradients, expected) <= TOLERANCE
    assert trainer.state.log_history[0]["sasft/hook_calls"] == 1


def test_bf16_autocast_stays_close_to_fp32(cases, tiny_tokenizer):
    model, features, rows, (expected, _, penalty) = cases["full"]
    gradients, trainer = one_step(model, rows, paper_callback(features, weight=WEIGHT), tiny_tokenizer, bf16=True)
    without, _, _ = reference_gradients(model, rows, row_penalty(features), 0.0)
    assert relative_error(gradients, expected) < 0.1 < 0.5 * relative_error(without, expected)
    assert trainer.state.log_history[0]["sasft/penalty"] == pytest.approx(penalty, rel=0.02)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
