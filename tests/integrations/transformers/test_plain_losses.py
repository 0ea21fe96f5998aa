"""The term has the divisor of the trainer's own cross-entropy, whichever way a plain trainer computes that."""

from __future__ import annotations

import copy

import pytest
import torch
from integrations.reference import (
    LANGUAGES,
    KeepGradients,
    case_model,
    make_rows,
    paper_callback,
    reference_gradients,
    relative_error,
    row_penalty,
    rows_read,
    watch,
)
from integrations.transformers.plain import make_plain
from torch.nn.functional import cross_entropy
from transformers import Trainer

from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback

WEIGHT = 4.0
TOLERANCE = 1e-6


class OwnMean(Trainer):
    """A trainer that averages over each micro-batch, and says so in the way of transformers before 5.19."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, {"logits": logits}) if return_outputs else loss


class DeclaredMean(OwnMean):
    """The same, said as transformers 5.19 and later ask for it."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True


class OwnSum(Trainer):
    """A trainer with its own loss, which divides by the tokens of the accumulation window."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return (
            cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
        )


class CallsSuper(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)


def smoothed(outputs, labels, num_items_in_batch=None):
    """A `compute_loss_func`: cross-entropy and a little entropy."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    entropy = torch.distributions.Categorical(logits=logits[targets != -100]).entropy().sum()
    return (cross_entropy(logits, targets, reduction="sum") - 0.1 * entropy) / num_items_in_batch


BY_WINDOW = {
    "plain": {},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "compute_loss_func": {"compute_loss_func": smoothed},
    "own loss over the window": {"kind": OwnSum},
    "own compute_loss around the trainer's": {"kind": CallsSuper},
}
PER_MICRO_BATCH = {"own mean": OwnMean, "own mean, declared": DeclaredMean}


@pytest.fixture
def run(model, tiny_tokenizer):
    def run(callbacks, rows=None, **arguments):
        keep = KeepGradients()
        own = arguments.pop("model", model)
        trainer = make_plain(
            copy.deepcopy(own), rows or make_rows(8), [*callbacks, keep], tokenizer=tiny_tokenizer, **arguments
        )
        seen = watch(trainer)
        trainer.train()
        return keep.gradients, trainer, seen

    return run


def share_of_the_penalty(model, rows, features):
    """Gradient and value of `WEIGHT * penalty / N` alone, for rows that share one N."""
    whole, _, penalty = reference_gradients(model, rows, row_penalty(features), WEIGHT)
    without, _, _ = reference_gradients(model, rows, row_penalty(features), 0.0)
    return {name: whole[name] - without[name] for name in whole}, penalty


def added(first, second):
    return {name: first[name] + second[name] for name in first}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("case", BY_WINDOW)
def test_over_the_tokens_of_the_accumulation_window(model, features, run, case, accumulation):
    batches = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    own, _, _ = run([], **BY_WINDOW[case], **batches)
    share, penalty = share_of_the_penalty(model, make_rows(8), features)
    gradients, trainer, seen = run([paper_callback(features, weight=WEIGHT)], **BY_WINDOW[case], **batches)
    assert len(seen) == accumulation
    assert relative_error(own, added(own, share)) > 0.5
    assert relative_error(gradients, added(own, share)) <= TOLERANCE
    assert trainer.state.log_history[0]["sasft/penalty"] == pytest.approx(penalty, rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("case", PER_MICRO_BATCH)
def test_over_the_tokens_of_each_micro_batch(model, features, run, case, accumulation):
    """As the loss is then: a mean over micro-batches of the mean over tokens."""
    batches = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    own, _, _ = run([], kind=PER_MICRO_BATCH[case], **batches)
    gradients, trainer, seen = run([paper_callback(features, weight=WEIGHT)], kind=PER_MICRO_BATCH[case], **batches)
    expected, penalties = own, []
    for batch in seen:
        share, penalty = share_of_the_penalty(model, rows_read([batch]), features)
        expected = added(expected, {name: value / accumulation for name, value in share.items()})
        penalties.append(penalty)
    assert relative_error(own, expected) > 0.5
    assert relative_error(gradients, expected) <= TOLERANCE
    logged = trainer.state.log_history[0]["sasft/penalty"]
    assert logged == pytest.approx(sum(penalties) / accumulation, rel=1e-5)


def test_a_model_that_accepts_no_loss_arguments(model, features, run):
    closed = copy.deepcopy(model)
    closed.accepts_loss_kwargs = False
    gradients, trainer, seen = run([paper_callback(features, weight=WEIGHT)], model=closed)
    assert trainer.model_accepts_loss_kwargs is False
    expected = None
    for batch in seen:
        share, _, _ = reference_gradients(model, rows_read([batch]), row_penalty(features), WEIGHT)
        share = {name: value / len(seen) for name, value in share.items()}
        expected = share if expected is None else added(expected, share)
    assert relative_error(gradients, expected) <= TOLERANCE


@pytest.mark.promise("In a plain transformers.Trainer weight 0 changes no bit")
@pytest.mark.parametrize("case", [*BY_WINDOW, *PER_MICRO_BATCH])
def test_weight_0_is_the_trainer_without_a_callback_bit_by_bit(features, run, case):
    options = BY_WINDOW.get(case) or {"kind": PER_MICRO_BATCH.get(case, Trainer)}
    own, _, _ = run([], **options)
    gradients, trainer, _ = run([SASFTCallback(features, weight=0.0)], **options)
    assert own.keys() == gradients.keys()
    assert all(torch.equal(own[name], gradients[name]) for name in own)
    assert trainer.state.log_history[0]["sasft/penalty"] > 0


def test_the_token_penalty_and_the_anchor_are_those_of_a_trl_trainer(make_model, model, tiny_tokenizer, run):
    """Their gradients are written out for TRL in tests/invariants; a plain trainer gives the same."""
    from sft.cases import make_trainer

    rows = make_rows(8)
    for row, text in zip(rows, ("河水流过旧磨坊", "The river runs") * 4, strict=True):
        row["input_ids"] = tiny_tokenizer(text)["input_ids"]
        row["labels"] = [-100, *row["input_ids"][1:]]
    for make in (
        lambda: TokenPenaltyCallback("zh", languages=LANGUAGES, anchor_weight=0.5),
        lambda: KLAnchorCallback(anchor_model=case_model(make_model, seed=1)),
    ):
        keep = KeepGradients()
        theirs = make_trainer(copy.deepcopy(model), rows, [make(), keep], processing_class=tiny_tokenizer)
        theirs.train()
        gradients, trainer, _ = run([make()], rows)
        assert relative_error(gradients, keep.gradients) <= TOLERANCE
        for name, value in trainer.state.log_history[0].items():
            if "/" in name:
                assert value == pytest.approx(theirs.state.log_history[0][name], rel=1e-5, abs=1e-9)
