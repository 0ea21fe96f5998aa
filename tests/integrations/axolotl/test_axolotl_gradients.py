"""The gradient of a step of axolotl with SASFT equals that of the loss written out row by row."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed; `make test-axolotl` installs it")

from axolotl_runs import PACKED
from integrations.frameworks import SASFT
from integrations.reference import documents, relative_error, rows_read

TOLERANCE = 1e-6
BATCHES = {  # by micro-batches of a step
    "padded": {1: {"micro_batch_size": 8}, 4: {"micro_batch_size": 2}},
    "multipack": {1: PACKED | {"sequence_len": 1024}, 4: PACKED},
}
TUNING = {
    "full": {},
    "lora": {
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "v_proj"],
    },
}
CHECKPOINTING = {
    "none": {},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


def check(run, workplace, references):
    """Compare a step of all eight conversations with the written-out loss, and the languages with the texts."""
    kept = run.step()
    rows = sorted(workplace.rows_of(kept["batches"]), key=lambda row: row["input_ids"])
    told = sorted(rows_read(kept["batches"]), key=lambda row: row["input_ids"])
    assert [row["language"] for row in told] == [row["language"] for row in rows]
    assert len({tuple(row["input_ids"]) for row in rows}) == len(rows) == 8
    expected, loss, penalty = references(rows, kept["peft"])
    without, _, _ = references(rows, kept["peft"], weight=0.0)
    assert relative_error(without, expected) > 0.5, "a missing term would not show"
    assert relative_error(kept["gradients"], expected) <= TOLERANCE
    logs = run.logs[0]
    assert logs["loss"] == pytest.approx(loss, rel=1e-4)
    assert logs["sasft/penalty"] == pytest.approx(penalty, rel=1e-5)
    assert logs["sasft/hook_calls"] == 1


@pytest.mark.promise("In ms-swift, axolotl, LLaMA-Factory and verl the gradient equals the written-out loss")
@pytest.mark.parametrize("tuning", list(TUNING))
@pytest.mark.parametrize("checkpointing", list(CHECKPOINTING))
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("batches", list(BATCHES))
def test_gradient_equals_the_written_out_loss(workplace, references, batches, accumulation, checkpointing, tuning):
    run = workplace.train(
        gradient_accumulation_steps=accumulation,
        **BATCHES[batches][accumulation],
        **CHECKPOINTING[checkpointing],
        **TUNING[tuning],
    )
    check(run, workplace, references)
    kept = run.step()
    assert len(kept["batches"]) == accumulation
    assert kept["checkpointing"] is (checkpointing != "none")
    assert any("lora_A" in name for name in kept["gradients"]) is (tuning == "lora")
    if batches == "multipack":
        assert all(len(batch["input_ids"]) == 1 for batch in kept["batches"])
        assert [len(documents(batch)) for batch in kept["batches"]] == [8 // accumulation] * accumulation


@pytest.mark.promise("In ms-swift, axolotl, LLaMA-Factory and verl weight 0 changes no bit")
@pytest.mark.parametrize("packed", [False, True])
def test_weight_zero_changes_nothing(workplace, packed):
    options = {"learning_rate": 1e-3, "max_steps": 2} | (PACKED if packed else {"micro_batch_size": 2})
    plain = workplace.train(None, **options)
    measured = workplace.train(SASFT | {"sasft_weight": 0.0}, **options)
    for step in range(2):
        assert measured.step(step)["gradients"].keys() == plain.step(step)["gradients"].keys()
        for name, gradient in plain.step(step)["gradients"].items():
            assert torch.equal(measured.step(step)["gradients"][name], gradient), name
    assert all(torch.equal(value, measured.weights[name]) for name, value in plain.weights.items())
    assert measured.logs[0]["sasft/penalty"] > 0
    assert "sasft/penalty" not in plain.logs[0]
