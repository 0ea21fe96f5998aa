"""Pretraining: its gradients, its padding, and that the number of processes does not matter."""

from __future__ import annotations

import copy
from itertools import chain

import pytest
import torch

from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.arithmetic.documents import DocumentSettings
from qscope_posttrain.testbed.arithmetic.language_model import document_rows
from qscope_posttrain.testbed.arithmetic.model import build_model
from qscope_posttrain.testbed.arithmetic.pretrain import IGNORED, Row, pretrain, shards
from qscope_posttrain.testbed.arithmetic.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
TINY = ArithmeticConfig(hidden_size=16, intermediate_size=24, model_layers=1, heads=2)


def rows(count: int, seed: str = "a") -> list[Row]:
    return document_rows(TOKENIZER, DocumentSettings(loops=0.2), count, seed)


def test_shards_hold_every_document_once_with_labels_on_its_completion() -> None:
    batch = rows(12)
    groups = list(chain.from_iterable(shards(batch, 0)))
    found = []
    for group in groups:
        for ids, labels in zip(group.input_ids.tolist(), group.labels.tolist(), strict=True):
            predicted = [token for token in labels if token != IGNORED]
            start = labels.index(predicted[0])
            assert labels[start : start + len(predicted)] == predicted == ids[start : start + len(predicted)]
            found.append(Row(tuple(ids[: start + len(predicted)]), start))
    assert sorted(found, key=str) == sorted(batch, key=str)


def test_long_documents_are_padded_apart() -> None:
    batch = [Row((1,) * 50, 3)] * 20 + [Row((1,) * 130, 3)] * 4
    assert [tuple(group.input_ids.shape) for group in shards(batch, 0)[0]] == [(10, 50), (2, 130)]
    even = [Row((1,) * 50, 3)] * 20
    assert [tuple(group.input_ids.shape) for group in shards(even, 0)[1]] == [(10, 50)]


def test_the_loss_is_the_mean_over_all_predicted_tokens() -> None:
    batch = rows(10)
    model = build_model(TOKENIZER, TINY)
    before = copy.deepcopy(model).eval()
    losses = pretrain(model, [batch], 1e-3, 0)
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
    one, two = build_model(TOKENIZER, TINY), build_model(TOKENIZER, TINY)
    losses = pretrain(one, batches, 3e-3, 0)
    assert pretrain(two, batches, 3e-3, 0, processes=2) == losses
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[name]), name
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_batches_that_cannot_be_cut_are_refused() -> None:
    model = build_model(TOKENIZER, TINY)
    with pytest.raises(ValueError, match="in 2"):
        pretrain(model, [rows(1)], 1e-3, 0)
    with pytest.raises(ValueError, match="3 processes"):
        pretrain(model, [rows(4)], 1e-3, 0, processes=3)
