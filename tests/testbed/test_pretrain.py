"""Pretraining: what is refused, and that the number of processes changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qscope_posttrain.testbed.config import TestbedConfig
from qscope_posttrain.testbed.model import build_model
from qscope_posttrain.testbed.pretrain import pretrain
from qscope_posttrain.testbed.windows import WindowMaker

CONFIG = TestbedConfig(pretraining_steps=6, pretraining_batch_size=8)


def test_the_loss_falls_and_a_repetition_is_identical(maker: WindowMaker, tokenizer) -> None:
    config = replace(CONFIG, pretraining_steps=70, pretraining_learning_rate=5e-3)
    windows = maker.pretraining(560, 0.1, seed=1)
    models = [build_model(tokenizer, 32, 1, 2, 48, seed=2) for _ in range(2)]
    losses = [pretrain(model, windows, config) for model in models]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 70
    assert losses[0][-1] < losses[0][0] - 0.5
    assert not models[0].training


@pytest.mark.slow  # two processes import torch
def test_two_processes_train_the_same_weights_as_one(maker: WindowMaker, tokenizer) -> None:
    windows = maker.pretraining(48, 0.1, seed=1)
    one, two = (build_model(tokenizer, 32, 2, 2, 48, seed=2) for _ in range(2))
    assert pretrain(one, windows, CONFIG) == pretrain(two, windows, CONFIG, processes=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_what_cannot_work_is_refused(maker: WindowMaker, tokenizer) -> None:
    model = build_model(tokenizer, 32, 1, 2, 48, seed=2)
    with pytest.raises(ValueError, match="need 48, got 40"):
        pretrain(model, maker.pretraining(40, 0.1, seed=1), CONFIG)
    with pytest.raises(ValueError, match="3 processes"):
        pretrain(model, maker.pretraining(48, 0.1, seed=1), CONFIG, processes=3)
    with pytest.raises(ValueError, match="must be even"):
        replace(CONFIG, pretraining_batch_size=7)
