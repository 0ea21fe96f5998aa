"""A checkpoint is resumed by the run that wrote it, or refused with what differs."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rl.cases import LAYER, loop_features, make_args, make_trainer, small_model
from trl import GRPOConfig, GRPOTrainer

from qscope_posttrain.rl.checkpoints import run_identity
from qscope_posttrain.rl.rollouts.negatives import negative_source
from qscope_posttrain.rl.trainer import SteeredGRPOTrainer

RANDOM = {"steering_layer": LAYER, "steering_strength": 4.0, "steering_unit": "norm", "window_start": [0, 2],
          "window_length": 4}  # fmt: skip
KINDS = {
    "seeded": {"negative": "seeded"},
    "random": {"negative": "random", **RANDOM},
    "feature": {"negative": "feature"},
    "plain": {"negatives_per_group": 0},
}


@pytest.fixture(scope="module")
def model(make_model):
    return small_model(make_model, seed=5)


def first(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


def second(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def build(model, tokenizer, folder, kind="seeded", reward=first, features=None, **options):
    features = features or (loop_features(model) if kind == "feature" else None)
    settings = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 1, **KINDS[kind], **options}
    return make_trainer(model, make_args(**settings), tokenizer, reward=reward, features=features)


@pytest.fixture(scope="module")
def checkpoints(model, tiny_tokenizer, tmp_path_factory):
    """Checkpoint of one step, of each kind of run."""
    folders = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        build(model, tiny_tokenizer, folder, kind).train()
        folders[kind] = str(folder / "checkpoint-1")
    return folders


@pytest.mark.promise("Resuming GRPO with other negatives, settings or features is refused")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [*((kind, kind) for kind in KINDS), ("feature", "seeded"), ("random", "feature"),
     ("plain", "seeded"), ("feature", "plain")],
)  # fmt: skip
def test_another_kind_of_negative(model, tiny_tokenizer, checkpoints, tmp_path, before, after):
    resumed = build(model, tiny_tokenizer, tmp_path, after, max_steps=2)
    if before == after:
        resumed.train(resume_from_checkpoint=checkpoints[before])
        assert resumed.state.global_step == 2
        return
    changed = "negatives_per_group" if "plain" in (before, after) else "negative"
    with pytest.raises(ValueError, match=f"other settings of SteeredGRPOTrainer:.*{changed} was"):
        resumed.train(resume_from_checkpoint=checkpoints[before])
    assert resumed.state.global_step == 1


CHANGES = {
    "seed": ({"seed": 3}, "seed was 0, is 3"),
    "copies": ({"copies": 3}, "copies was 2, is 3"),
    "piece": ({"copy_length": 5}, "copy_length was 32, is 5"),
    "boundary": ({"copy_boundary": ["."]}, "copy_boundary was"),
    "window": ({"window_start": [1, 2]}, r"window_start was \[0, 2\], is \[1, 2\]"),
    "gate": ({"gate": "keep"}, "gate was 'drop', is 'keep'"),
    "weight": ({"negative_weight": 0.5}, "negative_weight was 1.0, is 0.5"),
    "overlong": ({"soft_overlong_cache": 4}, "soft_overlong_cache was 0, is 4"),
    "weights": ({"reward_weights": [0.5]}, r"rewards was \[\['first', 1.0\]\], is \[\['first', 0.5\]\]"),
    "rewards": ({"reward": second}, r"rewards was \[\['first', 1.0\]\], is \[\['second', 1.0\]\]"),
}


def test_settings_of_one_run_only_are_named_without_values(model, tiny_tokenizer, checkpoints, tmp_path):
    resumed = build(model, tiny_tokenizer, tmp_path, "plain", max_steps=2)
    with pytest.raises(
        ValueError, match=r"negatives_per_group was 1, is 0; only one of the two has copies, "
    ) as raised:
        resumed.train(resume_from_checkpoint=checkpoints["seeded"])
    assert "None" not in str(raised.value)


@pytest.mark.promise("Resuming GRPO with other negatives, settings or features is refused")
@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_other_settings(model, tiny_tokenizer, checkpoints, tmp_path, name):
    options, message = CHANGES[name]
    resumed = build(model, tiny_tokenizer, tmp_path, max_steps=2, **options)
    with pytest.raises(ValueError, match=message):
        resumed.train(resume_from_checkpoint=checkpoints["seeded"])


@pytest.mark.promise("Resuming GRPO with other negatives, settings or features is refused")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [("direction", "features_sha256 was"), ("norm", "features_sha256 was"), ("window", "window_length was 6, is 5"),
     ("strength", "steering_strength was 1.0, is 2.0")],
)  # fmt: skip
def test_other_features(model, tiny_tokenizer, checkpoints, tmp_path, how, message):
    chosen = {"strength": {"strength": 2.0}, "window": {"window_length": 5}}.get(how, {})
    other = loop_features(model, norm=9.0 if how == "norm" else 8.0, **chosen)
    if how == "direction":
        other.layers[LAYER].decoder.neg_()
    resumed = build(model, tiny_tokenizer, tmp_path, "feature", features=other, max_steps=2)
    with pytest.raises(ValueError, match=message):
        resumed.train(resume_from_checkpoint=checkpoints["feature"])


def test_the_same_features_from_a_file_and_said_in_full(model, tiny_tokenizer, checkpoints, tmp_path):
    """What the features record may as well stand in the settings."""
    file = loop_features(model).save(tmp_path / "features.safetensors")
    recorded = {
        "negative": "feature", "steering_layer": LAYER, "steering_strength": 1.0, "steering_unit": "relative",
        "window_start": [2, 2], "window_length": 6, "reward_weights": [1.0],
    }  # fmt: skip
    resumed = build(model, tiny_tokenizer, tmp_path, "feature", features=file, max_steps=2, **recorded)
    resumed.train(resume_from_checkpoint=checkpoints["feature"])
    assert resumed.state.global_step == 2


def test_what_is_computed_from_the_features_may_differ_in_its_last_bits(model):
    """As it does on another machine."""
    features, args = loop_features(model), make_args()
    source = negative_source(args, features, model, None)
    moved = replace(source, steering=replace(source.steering, direction=source.steering.direction * (1 + 2e-7)))
    args = args.settled(True)
    assert not torch.equal(source.steering.direction, moved.steering.direction)
    assert run_identity(args, source, features, []) == run_identity(args, moved, features, [])


def forgetful(folder, tmp_path):
    """The checkpoint as one without a record."""
    copied = tmp_path / "checkpoint-1"
    shutil.copytree(folder, copied)
    state = json.loads((copied / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["SteeredGRPOTrainer"]
    (copied / "trainer_state.json").write_text(json.dumps(state))
    return str(copied)


@pytest.mark.promise("Resuming GRPO with other negatives, settings or features is refused")
def test_a_checkpoint_without_a_record(model, tiny_tokenizer, checkpoints, tmp_path):
    """As for SASFT: nobody knows what it was trained with. Without negatives that does not matter."""
    resumed = build(model, tiny_tokenizer, tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="trained without SteeredGRPOTrainer"):
        resumed.train(resume_from_checkpoint=forgetful(checkpoints["seeded"], tmp_path))


def test_a_plain_checkpoint_of_trl(model, tiny_tokenizer, tmp_path):
    settings = make_args(output_dir=str(tmp_path), save_strategy="steps", save_steps=1).to_dict()
    names = set(GRPOConfig.__dataclass_fields__) & {
        "output_dir", "save_strategy", "save_steps", "max_steps", "per_device_train_batch_size", "num_generations",
        "max_completion_length", "bf16", "use_cpu", "report_to", "disable_tqdm", "learning_rate",
    }  # fmt: skip
    args = GRPOConfig(**{name: settings[name] for name in names})
    make_trainer(copy.deepcopy(model), args, tiny_tokenizer, reward=first, cls=GRPOTrainer).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    plain = build(model, tiny_tokenizer, tmp_path / "plain", "plain", max_steps=2)
    plain.train(resume_from_checkpoint=checkpoint)
    assert plain.state.global_step == 2
    with pytest.raises(ValueError, match="trained without SteeredGRPOTrainer"):
        build(model, tiny_tokenizer, tmp_path / "seeded", max_steps=2).train(resume_from_checkpoint=checkpoint)


def test_the_same_trainer_resumes_its_own_checkpoint(model, tiny_tokenizer, tmp_path):
    trainer = build(model, tiny_tokenizer, tmp_path, max_steps=2)
    assert isinstance(trainer, SteeredGRPOTrainer)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 2


def test_rollouts_of_another_engine_are_another_run():
    one, other = (
        run_identity(SimpleNamespace(use_vllm=engine, dynamic_sampling=False), None, None, [])
        for engine in (False, True)
    )
    assert one != other
    assert other["rollout_engine"] == "vllm"
