"""One config, one list, one trainer used again: each works as if it were new, and nothing is written into them."""

from __future__ import annotations

import copy
from dataclasses import is_dataclass

import pytest
from datasets import Dataset, IterableDataset
from rl.cases import PROMPTS, loop_features, make_args, make_trainer, small_model
from transformers import TrainerCallback

from qscope_posttrain.rl.trainer import SteeredGRPOTrainer

PROMPT_SET = Dataset.from_dict({"prompt": PROMPTS * 2})


@pytest.fixture(scope="module")
def model(make_model):
    return small_model(make_model, seed=5)


def reward(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


def build(model, tokenizer, args, **more):
    return make_trainer(model, args, tokenizer, reward=reward, **more)


def snapshot(args):
    """Every attribute, what is in lists, dictionaries and dataclasses included."""
    held = {
        name: copy.deepcopy(value) if isinstance(value, (list, dict)) or is_dataclass(value) else value
        for name, value in vars(args).items()
    }
    return held, args.to_dict()


OPTIONS = {
    "open": {},
    "steered": {"negative": "feature"},
    "random": {"negative": "random"},
    "paper": {"mode": "paper"},
    "plain": {"negatives_per_group": 0},
    "soft overlong": {"soft_overlong_cache": 4, "reward_weights": [0.5]},
    "lists": {"generation_kwargs": {"top_k": 5}, "window_start": [0, 2], "chat_template_kwargs": {"a": [1]}},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_the_config_stays_as_it_was(model, tiny_tokenizer, name):
    """Also what TRL itself writes into the settings of a trainer, for streams for example."""
    stream = name == "open"
    args = make_args(**OPTIONS[name])
    before = snapshot(args)
    features = None if name in ("open", "soft overlong") else loop_features(model)
    data = IterableDataset.from_generator(lambda: iter(PROMPT_SET)) if stream else PROMPT_SET
    trainer = build(model, tiny_tokenizer, args, features=features, train_dataset=data)
    assert snapshot(args) == before
    trainer.train()
    assert snapshot(args) == before
    assert trainer.args is not args
    if stream:
        assert trainer.args.accelerator_config.dispatch_batches is False


def test_the_copy_shares_no_container(model):
    args = make_args(generation_kwargs={"top_k": 5}, window_start=[0, 2], reward_weights=[1.0])
    ours = args.settled(False)
    shared = [
        name for name, value in vars(args).items() if isinstance(value, (list, dict)) and value is getattr(ours, name)
    ]
    assert shared == []
    assert ours.accelerator_config is not args.accelerator_config
    assert ours.settled(False) is not ours


@pytest.mark.parametrize(
    ("order", "trained"), [((False, True), False), ((True, False), True), ((True, True), False), ((False, False), True)]
)
def test_one_config_for_two_trainers(model, tiny_tokenizer, order, trained):
    """Each makes the negatives that its own features, or their absence, ask for."""
    args = make_args(soft_overlong_cache=4, reward_weights=[1.0])
    for has_features in order:
        features = loop_features(model) if has_features else None
        trainer = build(model, tiny_tokenizer, args, features=features)
        assert trainer.args.negative == ("feature" if has_features else "seeded")
        assert (trainer._source.steering is not None) == has_features
        if trained:
            trainer.train()
            assert trainer.state.log_history[0]["negative/rows"] == 2


def test_the_settings_of_a_trainer_make_another_one(model, tiny_tokenizer):
    args = make_args(soft_overlong_cache=4, reward_weights=[1.0])
    first = build(model, tiny_tokenizer, args)
    again = build(model, tiny_tokenizer, first.args)
    assert len(again.reward_funcs) == 2
    with pytest.raises(ValueError, match="negative='seeded' makes negatives without features"):
        build(model, tiny_tokenizer, first.args, features=loop_features(model))


def test_features_that_nothing_would_use_are_refused(model, tiny_tokenizer):
    features = loop_features(model)
    with pytest.raises(ValueError, match=r"negative='seeded'.*Leave the features out"):
        build(model, tiny_tokenizer, make_args(negative="seeded"), features=features)
    build(model, tiny_tokenizer, make_args(negative="seeded", negatives_per_group=0), features=features)


def test_a_field_that_was_set_later_is_checked(model, tiny_tokenizer):
    args = make_args()
    args.generation_kwargs = {"num_beams": 2}
    with pytest.raises(ValueError, match="num_beams=2"):
        build(model, tiny_tokenizer, args)
    args = make_args()
    args.negative = "seeded"
    assert build(model, tiny_tokenizer, args).args.window_start == [0, 2]
    assert args.window_start is None


def test_a_mode_that_was_set_later_is_no_other_mode_in_silence():
    args = make_args()
    args.mode = "paper"
    with pytest.raises(ValueError, match=r"mode='paper'.*give mode='paper' then, not later"):
        args.settled(True)
    args.mode = "papr"
    with pytest.raises(ValueError, match="mode must be one of"):
        args.settled(True)
    args = make_args(mode="paper")
    args.negative = "seeded"
    with pytest.raises(ValueError, match=r"mode='paper'.*negative='feature'"):
        args.settled(False)
    args.negative = None
    assert args.settled(True).negative == "feature"


@pytest.mark.parametrize("soft", [0, 4])
def test_the_callers_lists_stay_as_they_were(model, tiny_tokenizer, soft):
    rewards, classes, callbacks, weights = [reward], [None], [TrainerCallback()], [0.5]
    held = [list(kind) for kind in (rewards, classes, callbacks, weights)]
    trainer = SteeredGRPOTrainer(
        copy.deepcopy(model), rewards, make_args(soft_overlong_cache=soft, reward_weights=weights),
        train_dataset=PROMPT_SET, processing_class=tiny_tokenizer, reward_processing_classes=classes,
        callbacks=callbacks,
    )  # fmt: skip
    assert [rewards, classes, callbacks, weights] == held
    assert trainer.reward_funcs is not rewards
    assert trainer.reward_weights.tolist() == [0.5, 1.0][: 1 + bool(soft)]
    assert trainer.args.reward_weights == weights


# ---- A second train()


def rows_of(trainer):
    return [entry["negative/rows"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_second_training_has_negatives_again(model, tiny_tokenizer):
    trainer = build(model, tiny_tokenizer, make_args(max_steps=4))
    for _ in range(2):
        trainer.train()
        assert rows_of(trainer) == [2] * 4


def test_a_second_training_starts_with_a_batch_of_its_own(model, tiny_tokenizer):
    """Not with what was left of the last one, in which a training ended."""
    prompts = []

    def watched(completion_ids, steered, **_):
        prompts.append(sum(steered))
        return reward(completion_ids)

    args = make_args(max_steps=1, steps_per_generation=2, per_device_train_batch_size=4)
    trainer = make_trainer(model, args, tiny_tokenizer, reward=watched)
    trainer.train()
    trainer.train()
    assert prompts == [2, 2]


def test_a_checkpoint_that_was_put_off_does_not_outlive_its_training(model, tiny_tokenizer, tmp_path):
    args = make_args(
        max_steps=3, steps_per_generation=2, per_device_train_batch_size=4, save_strategy="steps", save_steps=3,
        output_dir=str(tmp_path),
    )  # fmt: skip
    trainer = build(model, tiny_tokenizer, args)
    for _ in range(2):
        trainer.train()
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
