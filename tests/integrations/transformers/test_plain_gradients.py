"""The gradient of a plain `transformers.Trainer` with SASFT equals that of the loss written out row by row."""

from __future__ import annotations

import copy

import pytest
import torch
from integrations.reference import (
    KeepGradients,
    gradient_cases,
    paper_callback,
    relative_error,
)
from integrations.transformers.plain import make_plain
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
)

WEIGHT = 4.0
TOLERANCE = 1e-6
CHECKPOINTING = {
    "none": {},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


def left_padded(rows):
    """A collator that a user may write: padding on the left, and nothing else in the batch."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(row, column, value):
        return [value] * (width - len(row["input_ids"])) + row[column]

    return {
        "input_ids": torch.tensor([padded(row, "input_ids", 0) for row in rows]),
        "labels": torch.tensor([padded(row, "labels", -100) for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (width - len(row["input_ids"])) + [1] * len(row["input_ids"]) for row in rows]
        ),
    }


COLLATORS = {
    "seq2seq": lambda tokenizer: DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
    "flattening": lambda tokenizer: DataCollatorWithFlattening(),
    "hand-written": lambda tokenizer: left_padded,
}


@pytest.fixture(scope="module")
def cases(make_model):
    return gradient_cases(make_model, WEIGHT)


@pytest.mark.promise("In a plain transformers.Trainer the gradient equals the written-out loss")
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", list(CHECKPOINTING))
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("collator", list(COLLATORS))
def test_gradient_equals_the_written_out_loss(cases, tiny_tokenizer, collator, accumulation, checkpointing, tuning):
    model, features, rows, (expected, loss, penalty) = cases[tuning]
    keep = KeepGradients()
    trainer = make_plain(
        copy.deepcopy(model),
        rows,
        [paper_callback(features, weight=WEIGHT), keep],
        tokenizer=tiny_tokenizer,
        collator=COLLATORS[collator](tiny_tokenizer),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        **CHECKPOINTING[checkpointing],
    )
    trainer.train()
    assert relative_error(keep.gradients, expected) <= TOLERANCE
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)
    assert logs["sasft/penalty"] == pytest.approx(penalty, rel=1e-5)
    assert logs["sasft/hook_calls"] == 1
