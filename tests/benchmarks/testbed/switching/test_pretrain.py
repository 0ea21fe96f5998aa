"""Pretraining: what is refused, and that the number of processes changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.testbed.models import build_model
from benchmarks.testbed.pretraining import Schedule, pretrain
from benchmarks.testbed.switching.config import SwitchingConfig
from benchmarks.testbed.switching.language_model import _part_loss
from benchmarks.testbed.switching.windows import WindowMaker

ONE = SwitchingConfig(workers=1)
SCHEDULE = Schedule(5e-3, weight_decay=0.05, warmup_steps=60, floor=0.03)


def new_model(tokenizer, layers: int = 1):
    return build_model(tokenizer, hidden_size=32, layers=layers, heads=2, seed=2)


def test_the_loss_falls_and_a_repetition_is_identical(maker: WindowMaker, tokenizer) -> None:
    batches = maker.pretraining(560, 0.1, seed=1).input_ids.split(8)
    models = [new_model(tokenizer) for _ in range(2)]
    losses = [pretrain(model, batches, _part_loss, SCHEDULE, ONE) for model in models]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 70
    assert losses[0][-1] < losses[0][0] - 0.5
    assert not models[0].training


@pytest.mark.slow  # two processes import torch
def test_two_processes_train_the_same_weights_as_one(maker: WindowMaker, tokenizer) -> None:
    batches = maker.pretraining(48, 0.1, seed=1).input_ids.split(8)
    one, two = new_model(tokenizer, 2), new_model(tokenizer, 2)
    losses = pretrain(one, batches, _part_loss, SCHEDULE, ONE)
    assert pretrain(two, batches, _part_loss, SCHEDULE, replace(ONE, workers=2)) == losses
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_what_cannot_work_is_refused(maker: WindowMaker, tokenizer) -> None:
    with pytest.raises(ValueError, match="into 2 parts"):
        pretrain(new_model(tokenizer), maker.pretraining(9, 0.1, seed=1).input_ids.split(8), _part_loss, SCHEDULE, ONE)
    with pytest.raises(ValueError, match="must be even"):
        replace(ONE, pretraining_batch_size=7)
