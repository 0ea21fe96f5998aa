"""Two gloo processes with unequal label counts give the gradients and metrics of one."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sft.cases import (
    KeepGradients,
    case_model,
    make_features,
    make_rows,
    make_trainer,
    paper_callback,
    reference_gradients,
    relative_error,
    row_penalty,
)

from qscope_posttrain.sft.baselines import TokenPenaltyCallback

HERE = Path(__file__).resolve().parent
WEIGHT = 0.5
RISK = {"target_token_ids": torch.arange(100, 140)}
PER_RANK = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
CHECKPOINTED = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "ddp_find_unused_parameters": False,
}
CASES = {
    "padded, accumulation 4": {"arguments": PER_RANK},
    "padded, accumulation 1": {"arguments": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}},
    "padding-free": {"arguments": PER_RANK | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
    "packed": {"arguments": PER_RANK | {"gradient_accumulation_steps": 2}},
    "checkpointed": {"arguments": PER_RANK | CHECKPOINTED},
    "reentrant": {"arguments": PER_RANK | REENTRANT},
    "local token counts": {"arguments": PER_RANK | {"average_tokens_across_devices": False}},
    "paper": {"arguments": PER_RANK, "options": {"normalization": "paper"}},
    "plain trainer": {"arguments": PER_RANK},
    "plain trainer, flattening": {
        "arguments": PER_RANK | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    },
    "plain trainer, checkpointed": {"arguments": PER_RANK | CHECKPOINTED},
    "token penalty": {"arguments": PER_RANK, "options": {"token_penalty": True, **RISK}},
}
HAND_WRITTEN = [
    "padded, accumulation 4", "padded, accumulation 1", "padding-free", "packed", "checkpointed", "reentrant",
    "plain trainer", "plain trainer, flattening", "plain trainer, checkpointed",
]  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    made = make_rows(8)
    for row in made[::2]:  # every second row has one label only, so that ranks differ whatever they get
        row["labels"] = [-100] * (len(row["labels"]) - 1) + row["labels"][-1:]
    return made


@pytest.fixture(scope="module")
def results(rows, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    tiny_tokenizer.save_pretrained(folder)
    cases = {
        name: {
            "options": {"weight": WEIGHT, **case.get("options", {})},
            "arguments": case["arguments"],
            "packed": name == "packed",
            "padding_free": name == "packed" or name.endswith(("padding-free", "flattening")),
            "plain": name.startswith("plain"),
        }
        for name, case in CASES.items()
    }
    torch.save({"rows": rows, "cases": cases}, folder / "job.pt")
    command = [sys.executable, str(HERE / "sasft_worker.py"), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def model(make_model):
    return case_model(make_model)


@pytest.mark.promise("Two processes train as one: SFT, uneven label counts included")
@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_two_processes_equal_the_written_out_loss(results, rows, model, name):
    features = make_features(model)
    expected, loss, penalty = reference_gradients(model, rows, row_penalty(features), WEIGHT)
    result = results[name]
    assert len(set(result["label_counts"])) == 2, "the ranks were meant to have unequal label counts"
    assert relative_error(result["gradients"], expected) <= 1e-6
    assert result["logs"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["logs"]["sasft/penalty"] == pytest.approx(penalty, rel=1e-5)
    assert result["logs"]["sasft/hook_calls"] == 1
    assert result["left_over"] == []


@pytest.mark.promise("Two processes train as one: SFT, uneven label counts included")
@pytest.mark.parametrize("name", ["paper", "token penalty"])
def test_two_processes_equal_one(results, rows, model, tiny_tokenizer, name):
    options = dict(CASES[name]["options"]) | {"weight": WEIGHT}
    features = make_features(model)
    if options.pop("token_penalty", False):
        callback = TokenPenaltyCallback("zh", languages=features.languages, **options)
    else:
        callback = paper_callback(features, **options)
    keep = KeepGradients()
    trainer = make_trainer(copy.deepcopy(model), rows, [callback, keep], processing_class=tiny_tokenizer)
    trainer.train()
    assert relative_error(results[name]["gradients"], keep.gradients) <= 1e-6
    single, double = trainer.state.log_history[0], results[name]["logs"]
    ours = [key for key in single if key.startswith(callback.name)]
    assert ours
    for key in ours:
        assert double[key] == pytest.approx(single[key], rel=1e-5), key


def test_local_token_counts_weigh_ranks_equally(results):
    """Without `average_tokens_across_devices` TRL averages the ranks' means, and so does the penalty."""
    local, everywhere = (results[name]["gradients"] for name in ("local token counts", "padded, accumulation 4"))
    assert relative_error(local, everywhere) > 0.01
