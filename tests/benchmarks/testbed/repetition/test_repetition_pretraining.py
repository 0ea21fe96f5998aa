"""Pretraining: its gradients, its padding, and that the number of processes does not matter."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch

from benchmarks.testbed.models import build_model
from benchmarks.testbed.pretraining import Schedule, pretrain
from benchmarks.testbed.repetition.config import RepetitionConfig
from benchmarks.testbed.repetition.language_model import Row, _part_loss, document_rows, shard
from benchmarks.testbed.repetition.task import DocumentSettings, build_tokenizer

TOKENIZER = build_tokenizer()
PART_LOSS = functools.partial(_part_loss, pad=0)
ONE = RepetitionConfig(workers=1)


def new_model():
    return build_model(TOKENIZER, hidden_size=16, layers=1, heads=2, tied=False, seed=0)


def schedule(learning_rate: float) -> Schedule:
    return Schedule(learning_rate, weight_decay=0.01, warmup_steps=50, floor=0.05)


def rows(count: int, seed: str = "a") -> list[Row]:
    return document_rows(TOKENIZER, DocumentSettings(loops=0.2), count, seed)


def test_shards_hold_every_document_once() -> None:
    batch = rows(12)
    found = [row for part in range(2) for group in shard(batch, part) for row in group]
    assert sorted(found, key=str) == sorted(batch, key=str)


def test_long_documents_are_padded_apart() -> None:
    batch = [Row((1,) * 50, 3)] * 20 + [Row((1,) * 130, 3)] * 4
    assert [[len(row.tokens) for row in group] for group in shard(batch, 0)] == [[50] * 10, [130] * 2]
    assert [len(group) for group in shard([Row((1,) * 50, 3)] * 20, 1)] == [10]


def test_the_loss_is_the_mean_over_all_predicted_tokens() -> None:
    batch = rows(10)
    model = new_model()
    before = copy.deepcopy(model).eval()
    losses = pretrain(model, [batch], PART_LOSS, schedule(1e-3), ONE)
    total = count = 0.0
    for row in batch:
        ids = torch.tensor([row.tokens])
        with torch.no_grad():
            scores = before(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        total -= float(scores[row.prompt - 1 :].sum())
        count += len(row.tokens) - row.prompt
    assert losses[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow  # two processes import torch
def test_one_process_and_two_give_the_same_weights_and_a_falling_loss() -> None:
    drawn = rows(60 * 8)
    batches = [drawn[begin : begin + 8] for begin in range(0, len(drawn), 8)]
    one, two = new_model(), new_model()
    losses = pretrain(one, batches, PART_LOSS, schedule(3e-3), ONE)
    assert pretrain(two, batches, PART_LOSS, schedule(3e-3), replace(ONE, workers=2)) == losses
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[name]), name
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_batches_that_cannot_be_cut_are_refused() -> None:
    model = new_model()
    with pytest.raises(ValueError, match="into 2 parts"):
        pretrain(model, [rows(1)], PART_LOSS, schedule(1e-3), ONE)
