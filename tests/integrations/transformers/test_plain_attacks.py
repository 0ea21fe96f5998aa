"""Trainers, batches and models that could make the term act on other rows, with another gradient, or not at all."""

from __future__ import annotations

import copy

import pytest
import torch
from integrations.reference import (
    LANGUAGES,
    KeepGradients,
    make_features,
    make_rows,
    paper_callback,
    reference_gradients,
    relative_error,
    row_penalty,
)
from integrations.transformers.plain import make_plain
from integrations.transformers.test_plain_gradients import left_padded
from torch.nn.functional import pad
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

from qscope_posttrain.sft.baselines import TokenPenaltyCallback

WEIGHT = 4.0


@pytest.fixture
def seq2seq(tiny_tokenizer):
    return DataCollatorForSeq2Seq(tiny_tokenizer)


@pytest.fixture
def build(model, features, tiny_tokenizer):
    def build(rows=None, callbacks=(), **arguments):
        own = arguments.pop("model", model)
        callback = paper_callback(features, weight=WEIGHT)
        return make_plain(
            copy.deepcopy(own), rows or make_rows(8), [callback, *callbacks], tokenizer=tiny_tokenizer, **arguments
        )

    return build


@pytest.fixture
def assert_refused(build):
    """An error at the first step, which is not taken."""

    def assert_refused(message, **arguments):
        trainer = build(learning_rate=1.0, max_steps=2, **arguments)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())

    return assert_refused


def of_one_length(count=8):
    """Rows that padding does not tell apart."""
    rows = make_rows(count)
    for row in rows:
        row["input_ids"] = (row["input_ids"] * 2)[:12]
        row["labels"] = [-100] * 3 + row["input_ids"][3:]
    return rows


class Reordering(Trainer):
    """Trains on each batch in another order, as many rows as a batch has entries of the callback's own tensor."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        order = torch.tensor([2, 0, 1])
        return super().training_step(model, {name: value[order] for name, value in inputs.items()}, num_items_in_batch)


class Halving(Trainer):
    """Trains on the two halves of each batch, one after the other."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        half = len(inputs["labels"]) // 2
        parts = [{name: value[at] for name, value in inputs.items()} for at in (slice(half), slice(half, None))]
        return sum(super(Halving, self).training_step(model, part, num_items_in_batch) for part in parts)


CHANGED = {
    "reordered in training_step": (9, {"kind": Reordering, "per_device_train_batch_size": 3}),
    "halved in training_step": (8, {"kind": Halving, "per_device_train_batch_size": 4}),
    "a last window that is smaller": (7, {"gradient_accumulation_steps": 16}),
    "workers that stay": (8, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
}


@pytest.mark.parametrize("case", CHANGED)
def test_the_gradient_is_that_of_the_rows(model, features, build, case):
    count, arguments = CHANGED[case]
    rows, keep = make_rows(count), KeepGradients()
    for number in range(2):  # a micro-batch that may be without any label
        rows[number]["labels"] = [-100] * len(rows[number]["labels"])
    build(rows, [keep], **arguments).train()
    expected, _, _ = reference_gradients(model, rows, row_penalty(features), WEIGHT)
    assert relative_error(keep.gradients, expected) <= 1e-6


def test_the_first_token_of_a_row_that_is_padded_on_the_left(model, features, build):
    """Nothing predicts it, and padding must not make a response token of it."""
    rows, penalties = make_rows(8), []
    for row in rows:
        row["labels"] = list(row["input_ids"])
    counts = sum(len(row["labels"]) - 1 for row in rows)
    # The trainer counts the labels of first tokens behind padding, in the cross-entropy and in the term alike.
    behind = sum(len(row["labels"]) < max(len(row["labels"]) for row in rows) for row in rows)
    for collator in (None, left_padded):
        trainer = build(rows, collator=collator, per_device_train_batch_size=8, gradient_accumulation_steps=1)
        trainer.train()
        penalties.append(trainer.state.log_history[0]["sasft/penalty"])
    assert behind > 0
    assert penalties[1] == pytest.approx(penalties[0] * counts / (counts + behind), rel=1e-5)


def test_collators_that_reorder_or_change_tokens(assert_refused, seq2seq):
    def reversed_rows(rows):
        return seq2seq(rows[::-1])

    def sorted_row(rows):
        return DataCollatorWithFlattening()(sorted(rows, key=lambda row: len(row["input_ids"])))

    def left_without_mask(rows):
        batch = seq2seq(rows)
        return {"input_ids": pad(batch["input_ids"], (4, 0)), "labels": pad(batch["labels"], (4, 0), value=-100)}

    def noisy(rows):
        batch = seq2seq(rows)
        batch["input_ids"][:, 2] = 1
        return batch

    message = "changes tokens, reorders samples, or pads on the left without an attention mask"
    assert_refused(message, rows=of_one_length(), collator=reversed_rows)
    assert_refused(message, collator=sorted_row)
    assert_refused(message, collator=left_without_mask, per_device_train_batch_size=1)
    assert_refused(message, collator=noisy)


def test_labels_that_are_shifted_otherwise(build, assert_refused, seq2seq):
    def shifted(rows):
        batch = seq2seq(rows)
        return {**batch, "shift_labels": pad(batch["labels"][:, 1:], (0, 1), value=-100)}

    build(collator=shifted).train()
    assert_refused("'shift_labels'", collator=lambda rows: {**seq2seq(rows), "shift_labels": seq2seq(rows)["labels"]})


def test_a_forward_without_gradient_before_that_of_the_loss(assert_refused):
    class Teacher(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            with torch.no_grad():
                model(**{name: value for name, value in inputs.items() if name != "labels"})
            return super().compute_loss(model, inputs, *args, **kwargs)

    assert_refused(r"SASFTCallback would change nothing.*first forward in compute_loss", kind=Teacher)


def test_layers_below_all_that_is_trained(model, assert_refused):
    frozen = copy.deepcopy(model).requires_grad_(False)
    frozen.lm_head.requires_grad_(True)
    assert_refused("Train parameters at or below the layers that it reads", model=frozen)


def test_the_token_penalty_where_the_head_alone_is_trained(model, tiny_tokenizer):
    """Also in a micro-batch without a penalized token."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    frozen.lm_head.requires_grad_(True)
    rows = [{**row, "language": language} for row, language in zip(make_rows(4), ("zh", "zh", "en", "en"), strict=True)]
    gradients = []
    for weight in (0.0, 1.0):
        keep, penalty = KeepGradients(), TokenPenaltyCallback("zh", weight=weight, languages=LANGUAGES)
        make_plain(
            copy.deepcopy(frozen),
            rows,
            [penalty, keep],
            tokenizer=tiny_tokenizer,
            train_sampling_strategy="sequential",
        ).train()
        gradients.append(keep.gradients)
    assert relative_error(*gradients) > 1e-3


@pytest.mark.parametrize("how", ["around compute_loss", "in evaluation mode"])
def test_a_later_step_without_the_term(build, how):
    """Also where earlier micro-batches of the same logging window had it."""

    class Later(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step == 0 or how == "in evaluation mode":
                return super().training_step(model, inputs, num_items_in_batch)
            loss = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
            self.accelerator.backward(loss)
            return loss.detach()

        def compute_loss_context_manager(self):
            self.model.train(self.state.global_step == 0 or how != "in evaluation mode")
            return super().compute_loss_context_manager()

    trainer = build(kind=Later, max_steps=4, logging_steps=10)
    with pytest.raises(RuntimeError, match="A step was taken without the loss of SASFTCallback"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_model_init_is_refused(model, features, seq2seq, tmp_path):
    with pytest.raises(ValueError, match=r"model_init=.*makes a new one at every train\(\).*model="):
        Trainer(
            model_init=lambda: copy.deepcopy(model),
            args=TrainingArguments(str(tmp_path), use_cpu=True),
            train_dataset=make_rows(4),
            data_collator=seq2seq,
            callbacks=[paper_callback(features)],
        )


@pytest.mark.parametrize("rule", ["language", "script"])
def test_a_list_of_rows_is_checked_before_training(model, tiny_tokenizer, texts, seq2seq, tmp_path, rule):
    rows = [{"input_ids": tiny_tokenizer(text)["input_ids"], "language": "zh"} for text in texts["zh"]]
    rows = [{**row, "labels": list(row["input_ids"])} for row in rows]
    before, features = copy.deepcopy(rows), make_features(model, languages=("en", "zh", "ru"))

    def make(rows):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, report_to="none")
        return Trainer(
            copy.deepcopy(model),
            arguments,
            train_dataset=rows,
            data_collator=seq2seq,
            processing_class=tiny_tokenizer,
            callbacks=[paper_callback(features, language=rule)],
        )

    with pytest.warns(UserWarning, match="All 4 rows are in zh"):
        make(rows).train()
    assert rows == before
    if rule == "language":
        with pytest.raises(ValueError, match=r"Row 4 of the training data.*'xx'"):
            make([*rows, {**rows[0], "language": "xx"}])
