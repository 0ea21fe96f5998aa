"""One callback object and several trainers or trainings: each training has the penalty, or says why it cannot."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from accelerate.utils import memory
from sft.cases import make_rows, make_trainer
from transformers import TrainerCallback

from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback

RUN = {"max_steps": 2, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
KINDS = ("sasft", "token_penalty", "kl_anchor")


@pytest.fixture
def build(model, tiny_tokenizer):
    def build(callbacks=(), seed=0, **arguments):
        return make_trainer(
            copy.deepcopy(model), make_rows(8, seed), callbacks, processing_class=tiny_tokenizer, **{**RUN, **arguments}
        )

    return build


@pytest.fixture
def make(features):
    def make(kind="sasft"):
        if kind == "sasft":
            return SASFTCallback(features, weight=0.5, anchor_weight=0.5)
        return TokenPenaltyCallback(weight=5.0) if kind == "token_penalty" else KLAnchorCallback(weight=5.0)

    return make


def course(trainer, name=None):
    """Losses and our metrics of the last training."""
    prefixes = ("loss",) if name is None else ("loss", f"{name}/")
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: value for key, value in entry.items() if key.startswith(prefixes)} for entry in entries]


def expected(build, make, kind, seed=0):
    trainer = build([make(kind)], seed)
    trainer.train()
    found = course(trainer, kind)
    assert all(f"{kind}/penalty" in entry and entry[f"{kind}/hook_calls"] == 1 for entry in found)
    return found


ORDERS = ("make train make train", "make make train train", "second first", "never trained")


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        pytest.param("sasft", ORDERS[0], marks=pytest.mark.slow),
        *(("sasft", order) for order in ORDERS[1:]),
        *(pytest.param(kind, ORDERS[1], marks=pytest.mark.slow) for kind in KINDS[1:]),
    ],
)
def test_one_object_for_two_trainers(build, make, kind, order):
    """As each trainer with a callback of its own: also the re-run notebook cell, whose first trainer never trains."""
    callback = make(kind)
    first = build([callback])
    if order == "make train make train":
        first.train()
    second = build([callback], seed=1)
    if order == "second first":
        second.train()
    if order not in ("make train make train", "never trained"):
        first.train()
    if order != "second first":
        second.train()
    assert course(second, kind) == expected(build, make, kind, seed=1)
    if order != "never trained":
        assert course(first, kind) == expected(build, make, kind)


def test_trainings_in_turns(build, make):
    """The second trainer trains in the middle of a step of the first one."""
    callback = make()
    second = build([callback], seed=1)

    class Between(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                second.train()

    first = build([callback, Between()])
    first.train()
    assert course(first, "sasft") == expected(build, make, "sasft")
    assert course(second, "sasft") == expected(build, make, "sasft", seed=1)


@pytest.mark.parametrize("kind", ["sasft", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_a_second_training_of_the_same_trainer(build, make, kind):
    results = []
    for callbacks in ([make(kind)], []):
        trainer = build(callbacks, num_train_epochs=1)
        trainer.train()
        trainer.train()
        results.append(course(trainer, kind))
    again, plain = results
    assert all(entry[f"{kind}/hook_calls"] == 1 for entry in again)
    assert [entry["loss"] for entry in again] != [entry["loss"] for entry in plain]


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_other_data_for_the_next_training(build, make, trained):
    trainer = build([make()], learning_rate=0.0)
    if trained:
        trainer.train()
    trainer.train_dataset = build(seed=1).train_dataset
    trainer.train()
    other = build([make()], seed=1, learning_rate=0.0)
    other.train()
    assert course(trainer, "sasft") == course(other, "sasft")
    trainer.train_dataset = trainer.train_dataset.remove_columns("language")
    with pytest.raises(ValueError, match="no column 'language'"):
        trainer.train()
    assert trainer.callback_handler.callbacks


def test_the_second_training_is_held_to_the_first_start(build):
    trainer = build([KLAnchorCallback(weight=0.0)], max_steps=1, gradient_accumulation_steps=4)
    trainer.train()
    assert abs(course(trainer, "kl_anchor")[0]["kl_anchor/divergence"]) < 1e-6
    trainer.train()
    assert course(trainer, "kl_anchor")[0]["kl_anchor/divergence"] > 1e-4


def test_training_again_after_an_error(build, make):
    class FailOnce(TrainerCallback):
        failed = False

        def on_substep_end(self, args, state, control, **kwargs):
            if not self.failed:
                self.failed = True
                raise OSError("disk full")

    trainer = build([make(), FailOnce()], learning_rate=0.0)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    trainer.train()
    whole = build([make()], learning_rate=0.0)
    whole.train()
    assert course(trainer, "sasft") == course(whole, "sasft")


def test_smaller_batches_after_running_out_of_memory(build, make, monkeypatch):
    """transformers enters its inner loop again: what the failed attempt counted is gone."""
    monkeypatch.setattr(memory, "clear_device_cache", lambda *args, **kwargs: None)
    trainer = build([make()], auto_find_batch_size=True, per_device_train_batch_size=4, learning_rate=0.0, max_steps=1)
    inner, failures = trainer.training_step, []

    def training_step(*args, **kwargs):
        if trainer._train_batch_size == 4:
            failures.append(inner(*args, **kwargs))
            raise RuntimeError("CUDA out of memory.")
        return inner(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    whole = build([make()], per_device_train_batch_size=3, learning_rate=0.0, max_steps=1)
    whole.train()
    assert failures
    assert course(trainer, "sasft") == course(whole, "sasft")


def test_evaluation_and_prediction_in_between_change_nothing(build, make):
    rows = make_rows(4, seed=7)
    trainer = build([make()])
    for row in rows:
        del row["language"]
    data = type(trainer.train_dataset).from_list(rows)
    trainer.evaluate(data)
    trainer.predict(data)
    trainer.train()
    first = course(trainer, "sasft")
    trainer.evaluate(data)
    assert first == expected(build, make, "sasft")


@pytest.mark.slow
class TestLeaving:
    @pytest.mark.parametrize(
        ("how", "trained"),
        [("detach", False), ("detach", True), ("remove", False), ("remove", True), ("pop", False), ("by class", True)],
    )
    def test_a_trainer_that_was_left_is_a_plain_one(self, build, make, how, trained):
        callback = make()
        trainer = build([callback], learning_rate=0.0)
        if trained:
            trainer.train()
        if how == "detach":
            callback.detach()
            assert "train" not in vars(trainer)
        elif how == "pop":
            assert trainer.pop_callback(callback) is callback
        else:
            trainer.remove_callback(callback if how == "remove" else SASFTCallback)
        trainer.train()
        plain = build(learning_rate=0.0)
        plain.train()
        assert course(trainer, "sasft") == course(plain)
        assert not callback.runs
        assert not {"train", "compute_loss", "get_train_dataloader"} & vars(trainer).keys()
        assert not any(module._forward_hooks for module in trainer.model.modules())

    @pytest.mark.parametrize("how", ["detach", "remove"])
    def test_leaving_within_a_training(self, build, make, how):
        callback = make()

        class Stop(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    callback.detach() if how == "detach" else trainer.remove_callback(callback)

        trainer = build([callback, Stop()], learning_rate=0.0)
        trainer.train()
        plain = build(learning_rate=0.0)
        plain.train()
        assert course(trainer)[0] != course(plain)[0]
        assert course(trainer, "sasft")[1] == course(plain)[1]
        assert "train" not in vars(trainer)

    def test_detaching_leaves_all_trainers(self, build, make):
        callback = make()
        trainers = [build([callback]), build([callback])]
        trainers[0].train()
        callback.detach()
        assert not any({"train", "compute_loss"} & vars(trainer).keys() for trainer in trainers)
        assert not any(callback in trainer.callback_handler.callbacks for trainer in trainers)

    def test_attaching_again_after_a_training_and_after_detaching(self, build, make):
        callback = make()
        trainer = build(learning_rate=0.0)
        for _ in range(2):
            callback.attach(trainer)
            trainer.train()
            assert course(trainer, "sasft")[0]["sasft/hook_calls"] == 1
        callback.detach()
        callback.attach(trainer)
        trainer.train()
        assert course(trainer, "sasft")[0]["sasft/hook_calls"] == 1

    def test_two_callbacks_come_and_go_together(self, build, make):
        first, second = make(), make("token_penalty")
        trainer = build([first, second], learning_rate=0.0)
        losses = []
        for _ in range(2):
            trainer.train()
            losses.append([entry["loss"] for entry in course(trainer)])
        assert losses[0] == pytest.approx(losses[1])
        first.detach()
        trainer.train()
        assert "token_penalty/penalty" in trainer.state.log_history[0]
        second.detach()
        assert "train" not in vars(trainer)


class TestRefusals:
    @pytest.mark.parametrize("used", [False, True])
    def test_added_late(self, build, make, used):
        """Also an object that is attached to another trainer at this moment."""
        callback = make()
        others = [build([callback])] if used else []
        trainer = build()
        trainer.add_callback(callback)
        before = copy.deepcopy(trainer.model.state_dict())
        with pytest.raises(RuntimeError, match=r"add_callback after the trainer had been made.*callback\.attach"):
            trainer.train()
        assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
        callback.attach(trainer)
        trainer.train()
        assert course(trainer, "sasft") == expected(build, make, "sasft")
        assert all(callback in other.callback_handler.callbacks for other in others)

    def test_twice_in_one_list(self, build, make):
        callback = make()
        with pytest.raises(ValueError, match="callbacks twice"):
            build([callback, callback])
        trainer = build([callback])
        trainer.add_callback(callback)
        with pytest.raises(ValueError, match="callbacks twice"):
            trainer.train()

    def test_nothing_is_written_into_the_arguments(self, build, make):
        trainer = build()
        before = copy.deepcopy(trainer.args.to_dict())
        make().attach(trainer)
        trainer.train()
        after = trainer.args.to_dict()
        assert {key for key in before if before[key] != after[key]} <= {"logging_dir"}


@pytest.mark.slow
class TestOwnership:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("trained", [False, True])
    def test_a_callback_keeps_no_dead_trainer(self, build, make, kind, trained):
        callback = make(kind)
        trainer = build([callback])
        if trained:
            trainer.train()
        dead = weakref.ref(trainer), weakref.ref(trainer.model)
        del trainer
        gc.collect()
        assert [reference() for reference in dead] == [None, None]
        assert not callback.runs

    def test_a_model_that_outlives_its_trainer_has_no_hooks(self, build, make):
        trainer = build([make()])
        model = trainer.model
        del trainer
        gc.collect()
        assert not any(module._forward_hooks for module in model.modules())

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
    def test_a_copy_is_attached_to_nothing(self, build, make, how):
        for kind in KINDS:
            callback = make(kind)
            trainer = build([callback])
            again = how(callback)
            assert (len(callback.runs), len(again.runs)) == (1, 0)
            assert again.identity() == callback.identity()
        other = build([again])
        other.train()
        trainer.train()
        assert course(other, kind) == course(trainer, kind)


def test_a_step_without_the_term_is_an_error(build, make):
    """Somebody else's compute_loss in place of ours must not become a plain training."""
    trainer = build([make("token_penalty")])
    trainer.compute_loss = type(trainer).compute_loss.__get__(trainer)
    with pytest.raises(RuntimeError, match="A step was taken without the loss of TokenPenaltyCallback"):
        trainer.train()
    assert trainer.state.global_step == 1
