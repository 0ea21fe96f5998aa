"""The gradient of a step in other precisions, against the loss written out by hand in the same precision."""

from __future__ import annotations

import copy

import pytest
import torch
from invariants.by_hand import case, gradients_by_hand, rows_with_target_tokens
from sft.cases import KeepGradients, make_features, make_trainer, relative_error, with_lora
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

LOSSES = ("sasft", "token penalty and anchor")
ROWS = rows_with_target_tokens()
EPSILON = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""Largest relative error of rounding once"""
DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.promise("Gradients equal the written-out loss under bf16 and fp16 autocast, to the rounding of the type")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast(model, features, tiny_tokenizer, precision, loss):
    """fp16 as on a GPU, with the scaler that accelerate leaves out on a CPU; its gradients come unscaled."""
    autocast = torch.autocast("cpu", dtype=DTYPE[precision])
    callback, term = case(loss, model, features, autocast)
    keep = KeepGradients()
    trainer = make_trainer(
        copy.deepcopy(model),
        ROWS,
        [callback, keep],
        processing_class=tiny_tokenizer,
        max_grad_norm=1e9,  # the trainer takes the scale out where it clips
        **{precision: True},
    )
    if precision == "fp16":
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.train()
    assert trainer.state.log_history[0][f"{callback.name}/hook_calls"] == 1
    expected = gradients_by_hand(model, ROWS, term, precision=autocast)
    without = gradients_by_hand(model, ROWS, lambda others: torch.zeros(()), precision=autocast)
    assert relative_error(keep.gradients, expected) <= 4 * EPSILON[precision] < relative_error(without, expected)


QUANTIZED = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8 bits": {"load_in_8bit": True},  # multiplies in fp16, by columns that depend on the batch
}
TOLERANCE = {"4 bits": 1e-6, "8 bits": 4 * EPSILON["fp16"]}


@pytest.fixture(scope="module")
def quantized(make_model, tmp_path_factory):
    """Factory of LoRA on a base that bitsandbytes has quantized, and of its features."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed here: pip install bitsandbytes")
    folder = tmp_path_factory.mktemp("quantized")
    # Widths of whole blocks of bitsandbytes
    wide = make_model(initializer_range=0.15, num_hidden_layers=3, hidden_size=64, intermediate_size=128)
    wide.save_pretrained(folder)

    def quantized(bits):
        settings = BitsAndBytesConfig(**QUANTIZED[bits])
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
        return with_lora(base), make_features(base)

    return quantized


@pytest.mark.promise("Gradients equal the written-out loss with LoRA on a base that bitsandbytes has quantized")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bits", list(QUANTIZED))
def test_lora_on_a_quantized_base(quantized, tiny_tokenizer, bits, loss):
    model, features = quantized(bits)
    callback, term = case(loss, model, features)
    keep = KeepGradients()
    trainer = make_trainer(
        copy.deepcopy(model), ROWS, [callback, keep], processing_class=tiny_tokenizer, gradient_checkpointing=True
    )
    for trained, parameter in zip(trainer.model.parameters(), model.parameters(), strict=True):
        if trained.requires_grad:
            assert trained.dtype == torch.bfloat16, "TRL trains adapters of quantized models in bf16"
            trained.data = parameter.data.clone()
    trainer.train()
    expected = gradients_by_hand(model, ROWS, term)
    without = gradients_by_hand(model, ROWS, lambda others: torch.zeros(()))
    assert all("lora" in name for name in expected)
    assert relative_error(keep.gradients, expected) <= TOLERANCE[bits] < relative_error(without, expected)
