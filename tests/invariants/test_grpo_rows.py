"""Real generation: ordinary rows keep their tokens bit for bit, negatives do not, and each is known as what it is."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from rl.cases import END, LAYER, PROMPTS, loop_features, make_args, small_model
from sft.cases import with_lora
from trl import GRPOTrainer

from qscope_posttrain.rl.trainer import SteeredGRPOTrainer

LONGEST = 20
VARIANTS = {
    "feature": {"negative": "feature"},
    "random": {"negative": "random", "window_start": [1, 3]},
    "random, no features": {
        "negative": "random", "steering_layer": LAYER, "steering_strength": 8.0, "steering_unit": "norm",
        "window_start": [2, 2], "window_length": 0,
    },
    "paper": {"mode": "paper"},
    "seeded": {"negative": "seeded", "copy_length": 4, "window_start": [4, 6]},
    "copied to the end": {"negative": "seeded", "copies": 100, "copy_length": 4, "window_start": [4, 6]},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(make_model):
    return small_model(make_model, attention_dropout=0.1, seed=5)


@pytest.fixture(scope="module")
def features(model, tmp_path_factory):
    """Written to disk: the trainer is given the path."""
    path = tmp_path_factory.mktemp("features") / "loop.safetensors"
    return loop_features(model, norm=12.0).save(path)


def generate(cls, model, tokenizer, features=None, **options):
    """One optimiser step at learning rate 0; what the rows said, their flags, and what the loss was given."""
    seen = {"batches": []}

    def reward(completion_ids, steered=None, **_):
        seen["said"], seen["flags"] = [tuple(ids) for ids in completion_ids], steered
        return [float(sum(ids) % 5) for ids in completion_ids]

    settings = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_completion_length": LONGEST,
        "soft_overlong_cache": 0, "temperature": 1.0,
    }  # fmt: skip
    arguments = {"features": features} if cls is SteeredGRPOTrainer and features is not None else {}
    torch.manual_seed(7)
    trainer = cls(
        model=copy.deepcopy(model), reward_funcs=reward, args=make_args(**settings | options),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}), processing_class=tokenizer, **arguments,
    )  # fmt: skip
    inner = trainer.compute_loss

    def compute_loss(model, inputs, **more):
        seen["batches"].append(dict(inputs))
        return inner(model, inputs, **more)

    trainer.compute_loss = compute_loss
    trainer.train()
    return seen


def text(ids) -> tuple[int, ...]:
    """Of a padded row of the loss batch, what was said; the padding token is never sampled in these runs."""
    return tuple(token for token in ids if token)


@pytest.fixture(scope="module")
def plain(model, tiny_tokenizer):
    return generate(GRPOTrainer, model, tiny_tokenizer)


def test_the_case(plain):
    lengths = [len(said) for said in plain["said"]]
    assert lengths[3] == lengths[7] == LONGEST, "negatives are to be long enough for every way of making one"
    assert sum(length < LONGEST for length in lengths) > 1, "some ordinary rows are to end early"


@pytest.mark.promise("Ordinary rows sample the same tokens with and without negatives, bit for bit")
@pytest.mark.parametrize("name", VARIANTS)
def test_ordinary_rows_keep_their_tokens(model, tiny_tokenizer, features, plain, name):
    options = VARIANTS[name]
    needs = name in ("feature", "random", "paper")
    ours = generate(SteeredGRPOTrainer, model, tiny_tokenizer, features if needs else None, **options)
    assert plain["flags"] is None
    assert ours["flags"] == [False, False, False, True] * 2
    same = [a == b for a, b in zip(ours["said"], plain["said"], strict=True)]
    assert same == [True, True, True, False] * 2

    flagged = {}
    for batch in ours["batches"]:
        assert len(batch["steered"]) == 4
        for ids, flag in zip(batch["completion_ids"].tolist(), batch["steered"].tolist(), strict=True):
            flagged[text(ids)] = flag
    assert flagged == dict(zip(ours["said"], ours["flags"], strict=True))
    assert [sum(batch["steered"].tolist()) for batch in ours["batches"]] != [0, 0]


@pytest.mark.parametrize("count", [1, 2])
def test_negatives_stand_at_the_end_of_their_group(model, tiny_tokenizer, plain, count):
    ours = generate(SteeredGRPOTrainer, model, tiny_tokenizer, negatives_per_group=count, **VARIANTS["seeded"])
    group = [False] * (4 - count) + [True] * count
    assert ours["flags"] == group * 2
    for ours_row, plain_row, negative in zip(ours["said"], plain["said"], group * 2, strict=True):
        assert negative or ours_row == plain_row


def test_lora(model, tiny_tokenizer, features):
    adapted = with_lora(copy.deepcopy(model))
    plain = generate(GRPOTrainer, adapted, tiny_tokenizer)
    ours = generate(SteeredGRPOTrainer, adapted, tiny_tokenizer, features, **VARIANTS["feature"])
    same = [a == b for a, b in zip(ours["said"], plain["said"], strict=True)]
    assert same == [True, True, True, False] * 2


def test_what_copies_look_like(model, tiny_tokenizer, plain):
    """Nothing is a boundary here, so that pieces are 4 tokens: the one that ends at the window's start is repeated."""
    given = {"copy_boundary": ["\x00"], "copy_length": 4, "window_start": [8, 8], "negative": "seeded"}
    seeded = generate(SteeredGRPOTrainer, model, tiny_tokenizer, **given, copies=2)
    copied = generate(SteeredGRPOTrainer, model, tiny_tokenizer, **given, copies=100)
    for row in (3, 7):
        piece = plain["said"][row][4:8]
        assert END not in piece
        assert copied["said"][row] == plain["said"][row][:8] + piece * 3
        said = seeded["said"][row]
        assert said[:16] == plain["said"][row][:8] + piece * 2
        assert said[16:20] != piece
        assert len(said) > 16


def test_an_exception_leaves_no_hook_behind(model, tiny_tokenizer, features):
    class Broken(Exception):
        pass

    def reward(completion_ids, **_):
        raise Broken

    def hooks(model):
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    trainer = SteeredGRPOTrainer(
        model=copy.deepcopy(model), reward_funcs=reward, args=make_args(negative="feature"), features=features,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}), processing_class=tiny_tokenizer,
    )  # fmt: skip
    before = hooks(trainer.model)
    with pytest.raises(Broken):
        trainer.train()
    assert hooks(trainer.model) == before
    assert trainer.mask_truncated_completions is False
    assert not bool(trainer._plan.negative.any())


def test_an_exception_while_generating_leaves_no_hook_behind(model, tiny_tokenizer, features):
    trainer = SteeredGRPOTrainer(
        model=copy.deepcopy(model), reward_funcs=lambda **_: None,
        args=make_args(negative="feature", mask_truncated_completions=True), features=features,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}), processing_class=tiny_tokenizer,
    )  # fmt: skip
    calls = []

    def fails(module, args):
        calls.append(len(trainer.model.model.layers[LAYER]._forward_hooks))
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = trainer.model.model.layers[2].register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    assert calls == [1] * 4, "the steering hook was meant to be there while the model generated"
    assert len(trainer.model.model.layers[LAYER]._forward_hooks) == 0
    assert not trainer.model._forward_hooks
    assert trainer.mask_truncated_completions is True
