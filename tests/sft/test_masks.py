"""Which positions are penalised, over document boundaries and languages."""

from __future__ import annotations

import pytest
import torch

from qscope_posttrain.sft.masks import TokenBatch

EN, ZH, FR = 0, 1, 2


def test_response_positions_of_a_padded_batch():
    labels = torch.tensor([[-100, -100, 5, 6, 7], [-100, 8, 9, -100, -100], [-100, 4, 4, 4, 4]])
    ids = torch.tensor([[EN] * 5, [FR, FR, FR, -1, -1], [ZH] * 5])
    batch = TokenBatch.from_inputs({"labels": labels, "attention_mask": ids}, ids)
    assert batch.eligible(ZH, "response").int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [0] * 5]
    assert batch.eligible(ZH, "predicting").int().tolist() == [[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0] * 5]


def test_documents_of_a_flattened_batch_do_not_reach_into_each_other():
    labels = torch.tensor([[-100, 5, 6, -100, 7, 8, -100, 9]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1]])
    ids = torch.tensor([[EN, EN, EN, ZH, ZH, ZH, FR, FR]])
    batch = TokenBatch.from_inputs({"labels": labels, "position_ids": positions}, ids)
    assert batch.eligible(ZH, "response").int().tolist() == [[0, 1, 1, 0, 0, 0, 0, 1]]
    assert batch.eligible(ZH, "predicting").int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 0]]


def test_a_first_token_with_a_label_is_not_a_response_token_except_as_published():
    labels = torch.tensor([[5, 6, 7]])
    ids = torch.full((1, 3), EN)
    batch = TokenBatch.from_inputs({"labels": labels}, ids)
    assert batch.eligible(ZH, "response").int().tolist() == [[0, 1, 1]]
    assert batch.published(ZH).int().tolist() == [[1, 1, 1]]


def test_running_text_without_boundaries_stops_where_the_language_changes():
    labels = torch.tensor([[5, 6, 7, 8]])
    ids = torch.tensor([[ZH, ZH, EN, EN]])
    batch = TokenBatch.from_inputs({"labels": labels}, ids)
    assert batch.eligible(ZH, "predicting").int().tolist() == [[0, 0, 1, 0]]


def test_errors():
    with pytest.raises(ValueError, match="no 'labels'"):
        TokenBatch.from_inputs({"input_ids": torch.zeros(1, 2)}, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="differ in shape"):
        TokenBatch.from_inputs({"labels": torch.zeros(1, 2)}, torch.zeros(1, 3))
