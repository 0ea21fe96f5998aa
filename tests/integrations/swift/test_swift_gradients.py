"""The gradient of a step of ms-swift with SASFT equals that of the loss written out row by row."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("swift.callbacks", reason="ms-swift is not installed here; `make test-swift` installs it")

from integrations.reference import reference_gradients, relative_error, row_penalty
from swift_runs import WEIGHT, Workplace
from transformers import AutoModelForCausalLM

from qscope_posttrain.features.feature_set import FeatureSet

TOLERANCE = 1e-6
BATCHES = {"padded": {}, "padding-free": {"padding_free": "true"}, "packed": {"packing": "true", "packing_length": 256}}
TUNING = {
    "full": {"tuner_type": "full"},
    "lora": {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0, "target_modules": ["q_proj", "v_proj"]},
}
CHECKPOINTING = {
    "none": {"gradient_checkpointing": "false"},
    "non-reentrant": {"gradient_checkpointing": "true", "gradient_checkpointing_kwargs": '{"use_reentrant": false}'},
    "default": {"gradient_checkpointing": "true"},
}


def rows_per_step(batches, accumulation):
    """Rows of a micro-batch, of which `accumulation` make up all that there are: 8, or 4 packed ones."""
    return {
        "per_device_train_batch_size": (4 if batches == "packed" else 8) // accumulation,
        "gradient_accumulation_steps": accumulation,
    }


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, make_model, tiny_tokenizer, texts):
    return Workplace(tmp_path_factory.mktemp("swift"), make_model, tiny_tokenizer, texts)


@pytest.fixture(scope="module")
def references(workplace):
    """`references(rows, adapter, weight)`: gradients, loss and penalty of the step, written out row by row."""
    features = FeatureSet.load(workplace.features)
    known = {}

    def reference(rows, peft=None, weight=WEIGHT):
        key = json.dumps([rows, peft is not None, weight])
        if key not in known:
            model = AutoModelForCausalLM.from_pretrained(workplace.model, dtype=torch.float32)
            if peft is not None:
                from peft import get_peft_model

                config, state = peft
                model = get_peft_model(model, config)
                model.load_state_dict(state)
            known[key] = reference_gradients(model, rows, row_penalty(features), weight)
        return known[key]

    return reference


def check(run, workplace, references, **options):
    """Compare with the written-out loss; returns the rows of the step."""
    kept = run.rank()
    rows = sorted(workplace.rows_of(kept["batches"]), key=lambda row: row["input_ids"])
    assert len(rows) == 8
    expected, loss, penalty = references(rows, kept["peft"], **options)
    without, _, _ = references(rows, kept["peft"], weight=0.0)
    assert relative_error(without, expected) > 0.5, "a missing term would not show"
    assert relative_error(kept["gradients"], expected) <= TOLERANCE
    logs = run.logs[0]
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)
    assert logs["sasft/penalty"] == pytest.approx(penalty, rel=1e-5)
    assert logs["sasft/hook_calls"] == 1
    return rows


@pytest.mark.parametrize("tuning", list(TUNING))
@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("batches", list(BATCHES))
def test_gradient_equals_the_written_out_loss(workplace, references, batches, accumulation, checkpointing, tuning):
    options = BATCHES[batches] | TUNING[tuning] | CHECKPOINTING[checkpointing] | rows_per_step(batches, accumulation)
    run = workplace.train(options, workplace.settings())
    check(run, workplace, references)
    kept = run.rank()
    assert len(kept["batches"]) == accumulation
    assert kept["checkpointing"] is (checkpointing != "none")
    if checkpointing != "none":
        assert kept["use_reentrant"] is False
    assert any("lora_A" in name for name in kept["gradients"]) is (tuning == "lora")
