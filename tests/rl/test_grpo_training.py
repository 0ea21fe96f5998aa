"""What users of GRPOTrainer have keeps working with negatives: adapters, checkpointing, resuming, kinds of data."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset, IterableDataset
from rl.cases import (
    LAYER,
    PROMPTS,
    Formula,
    loop_features,
    make_args,
    prescribed,
    run_prescribed,
    small_model,
    written_gradients,
)
from sft.cases import relative_error, with_lora
from trl import GRPOTrainer

from qscope_posttrain.rl.trainer import SteeredGRPOTrainer

ROWS = prescribed()
PROMPT_SET = Dataset.from_dict({"prompt": PROMPTS * 4})
SAMPLED = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "gate": "keep",
    "negative_tokens": "all", "max_completion_length": 12, "loop_min_tokens": 6, "loop_min_copies": 2,
}  # fmt: skip


def reward(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.fixture(scope="module")
def model(make_model):
    return small_model(make_model, seed=5)


@pytest.fixture(scope="module")
def features(model):
    return loop_features(model, norm=12.0, window_start=[0, 2])


def train(
    model, tokenizer, features=None, cls=SteeredGRPOTrainer, dataset=PROMPT_SET, resume=None, reward=reward, **options
):
    more = {"features": features} if features is not None else {}
    torch.manual_seed(3)
    trainer = cls(
        model=copy.deepcopy(model), reward_funcs=reward, args=make_args(**SAMPLED | options), train_dataset=dataset,
        processing_class=tokenizer, **more,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def entries(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# ---- Gradient checkpointing and adapters


@pytest.fixture(scope="module")
def uncheckpointed(model, tiny_tokenizer, features):
    return {
        kind: run_prescribed(
            with_lora(copy.deepcopy(model)) if kind == "lora" else model, tiny_tokenizer, [ROWS], features=features,
            negative="feature", window_start=[2, 2], window_length=None, gate="keep",
        )
        for kind in ("full", "lora")
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients(model, tiny_tokenizer, features, uncheckpointed, kind, reentrant):
    """Also that a checkpointed model decodes with its cache: rollouts have the log-probabilities of steering."""
    expected = uncheckpointed[kind]
    found = run_prescribed(
        with_lora(copy.deepcopy(model)) if kind == "lora" else model, tiny_tokenizer, [ROWS], features=features,
        negative="feature", window_start=[2, 2], window_length=None, gate="keep",
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    assert relative_error(found.gradients, expected.gradients) <= 1e-6
    if kind == "lora":
        assert all("lora" in name for name in found.gradients)
    logs = [outcome.trainer.state.log_history[0] for outcome in (found, expected)]
    assert logs[0]["negative/log_ratio"] == pytest.approx(logs[1]["negative/log_ratio"], rel=1e-4)
    assert abs(logs[0]["negative/log_ratio"]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_generates_the_same(model, tiny_tokenizer, features, reentrant):
    said = {}

    def run(name, **options):
        def watched(completion_ids, **_):
            said[name] = completion_ids
            return reward(completion_ids)

        train(model, tiny_tokenizer, features, reward=watched, max_steps=1, **options)

    run("plain")
    run("checkpointed", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert said["checkpointed"] == said["plain"]


def test_lora_trains_its_adapters_only(model, tiny_tokenizer, features):
    adapted = with_lora(copy.deepcopy(model))
    trainer = train(adapted, tiny_tokenizer, features, max_steps=2)
    before = dict(adapted.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora" not in name), name
    assert [entry["negative/rows"] for entry in entries(trainer)] == [2, 2]


# ---- Resuming


def parameters_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


NEGATIVES = {
    "off": {"negatives_per_group": 0},
    "steered": {"negative": "feature"},
    "seeded": {"negative": "seeded", "copies": 1, "copy_length": 4},
}


@pytest.mark.promise("A GRPO run that is resumed equals an unbroken one bit for bit")
@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("grpo", "off")), "steered", "seeded"]
)
def test_resumed_equals_uninterrupted(model, tiny_tokenizer, features, tmp_path, kind):
    """Also for GRPOTrainer alone: what it cannot do, we need not."""
    cls = GRPOTrainer if kind == "grpo" else SteeredGRPOTrainer
    options = {**NEGATIVES.get(kind, NEGATIVES["off"]), "max_steps": 4}
    given = features if kind == "steered" else None
    saving = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    whole = train(model, tiny_tokenizer, given, cls=cls, **options, **saving)
    resumed = train(model, tiny_tokenizer, given, cls=cls, resume=str(tmp_path / "checkpoint-2"), **options)
    assert parameters_equal(whole, resumed)
    first, second = entries(whole), entries(resumed)
    assert [entry["step"] for entry in second] == [1, 2, 3, 4]
    for a, b in zip(first, second, strict=True):
        different = {name for name in a if a[name] != b[name] and not name.endswith("_time")}
        assert not different, a["step"]
    if kind == "grpo":
        return
    rows = [entry["negative/rows"] for entry in second]
    assert rows == [0 if kind == "off" else 2] * 4


def checkpoints(folder):
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize("batches", [{"steps_per_generation": 2}, {"num_iterations": 2}])
def test_checkpoints_lie_between_generation_batches(model, tiny_tokenizer, features, tmp_path, batches):
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 5, **batches}
    saving = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    whole = train(model, tiny_tokenizer, features, **options, **saving)
    assert checkpoints(tmp_path) == [2, 4, 5]
    resumed = train(model, tiny_tokenizer, features, resume=str(tmp_path / "checkpoint-2"), **options)
    assert parameters_equal(whole, resumed)


def test_without_negatives_checkpoints_are_trls(model, tiny_tokenizer, tmp_path):
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "steps_per_generation": 2}
    saving = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    train(model, tiny_tokenizer, negatives_per_group=0, max_steps=3, **options, **saving)
    assert checkpoints(tmp_path) == [1, 2, 3]


# ---- Data and generation batches


def test_a_stream_of_prompts(model, tiny_tokenizer, features):
    flags = []

    def watched(completion_ids, steered, prompts, **_):
        flags.append(steered)
        assert [len(set(prompts[i : i + 4])) for i in (0, 4)] == [1, 1]
        return reward(completion_ids)

    stream = IterableDataset.from_generator(lambda: iter([{"prompt": prompt} for prompt in PROMPTS * 4]))
    train(model, tiny_tokenizer, features, dataset=stream, reward=watched, max_steps=2)
    assert flags == [[False, False, False, True] * 2] * 2


def test_conversations_and_columns(model, tiny_tokenizer, features):
    dataset = Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": text}] for text in PROMPTS], "answer": [1, 2, 3, 4]}
    )
    seen = []

    def watched(completions, completion_ids, answer, steered, **_):
        seen.append((answer, steered))
        assert all(completion[0]["role"] == "assistant" for completion in completions)
        return reward(completion_ids)

    trainer = train(model, tiny_tokenizer, features, dataset=dataset, reward=watched, max_steps=1)
    assert seen == [([1] * 4 + [2] * 4, [False, False, False, True] * 2)]
    assert entries(trainer)[0]["negative/rows"] == 2


def test_dynamic_sampling_keeps_the_columns(model, tiny_tokenizer):
    """Redrawn prompts come with their own columns; a group is dead unless its answer is even."""
    dataset = Dataset.from_dict({"prompt": PROMPTS * 2, "answer": [1, 3, 2, 4, 1, 3, 2, 4]})
    seen = []

    def watched(prompts, completion_ids, answer, **_):
        assert all(PROMPTS[[1, 3, 2, 4].index(a)] == p for a, p in zip(answer, prompts, strict=True))
        seen.append(answer[::4])
        return [float(i) if a % 2 == 0 else 0.0 for i, a in enumerate(answer)]

    trainer = train(
        model, tiny_tokenizer, dataset=dataset, reward=watched, max_steps=1, negative="seeded", dynamic_sampling=True,
        dynamic_sampling_attempts=20,
    )  # fmt: skip
    assert seen[0] == [1, 3]
    assert all(answer % 2 for answers in seen[1:-1] for answer in answers[1:])
    logged = entries(trainer)[0]
    assert logged["dynamic_sampling/attempts"] == len(seen) - 1
    assert logged["dynamic_sampling/left_dead"] == 0


def test_several_generations_in_one_optimiser_step(model, tiny_tokenizer, monkeypatch):
    """Four micro-batches, two to a generation: the second generation draws for itself."""
    plans = []
    inner = SteeredGRPOTrainer._plan_rows

    def watched(self, rows, attempt):
        plans.append(inner(self, rows, attempt))
        return plans[-1]

    monkeypatch.setattr(SteeredGRPOTrainer, "_plan_rows", watched)
    train(
        model, tiny_tokenizer, negative="random", steering_layer=LAYER, steering_strength=4.0, steering_unit="norm",
        window_start=[0, 8], window_length=4, gradient_accumulation_steps=4, steps_per_generation=2, max_steps=2,
    )  # fmt: skip
    assert len(plans) == 4
    assert len({plan.draw for plan in plans}) == 4
    assert len({tuple(plan.start.tolist()) for plan in plans}) == 4


def test_a_generation_for_several_optimiser_steps(model, tiny_tokenizer):
    """The second optimiser step of one generation, against the loss by hand over the rows that it was given."""
    outcome = run_prescribed(
        model, tiny_tokenizer, [ROWS], per_device_train_batch_size=4, steps_per_generation=2, max_steps=2,
        loss_type="grpo",
    )  # fmt: skip
    assert len(outcome.said) == 1
    second = outcome.micro_batches()[1]
    left_out = [row for row in range(8) if row not in second]
    expected, _ = written_gradients(model, outcome.said[0], Formula(loss_type="grpo"), left_out=left_out)
    halved = {name: gradient / 2 for name, gradient in outcome.gradients.items()}  # mean over 4 rows, not over 8
    assert relative_error(halved, expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3_moe", "qwen3_5_text"])
def test_other_architectures(make_model, tiny_tokenizer, architecture):
    model = make_model(architecture, initializer_range=0.2)
    features = loop_features(model, norm=100.0, window_start=[0, 0])
    said = {}

    def run(name, **options):
        def watched(completion_ids, **_):
            said[name] = [tuple(ids) for ids in completion_ids]
            return reward(completion_ids)

        return train(model, tiny_tokenizer, features, reward=watched, max_steps=1, **options)

    run("plain", negatives_per_group=0)
    trainer = run("steered")
    same = [a == b for a, b in zip(said["plain"], said["steered"], strict=True)]
    assert same[3::4] == [False, False]
    assert all(flag for row, flag in enumerate(same) if row % 4 < 3)
    assert entries(trainer)[0]["negative/rows"] == 2
