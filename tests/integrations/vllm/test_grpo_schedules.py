"""What users of GRPOTrainer have keeps working with negatives from a colocated vLLM, as with transformers."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not installed here: make test-vllm")

from integrations.vllm.rollout_cases import GREEDY, LENGTH, SEEDED, STEERED, G, build, small_engines, train
from sft.cases import relative_error

SCHEDULES = {
    "accumulation": {**SEEDED, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "reuse": {**SEEDED, "per_device_train_batch_size": 4, "steps_per_generation": 2, "num_iterations": 2,
              "max_steps": 6},
    "two negatives, dropped": {**STEERED, "negatives_per_group": 2, "gate": "drop", "loop_min_tokens": 4,
                               "loop_min_copies": 2, "negative_tokens": "tail"},
    "truncated rows masked": {**SEEDED, "mask_truncated_completions": True},
    "fewest tokens": {**SEEDED, "generation_kwargs": {"min_tokens": 12}},
}  # fmt: skip
TRANSFORMERS_NAMES = {"min_tokens": "min_new_tokens"}


@pytest.mark.promise("Rollouts of vLLM have the tokens and gradients of transformers")
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_run_is_that_of_transformers(model, name, monkeypatch):
    # TRL shuffles a generation batch by torch's random numbers, of which one engine takes some and the other none.
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
    options = {**GREEDY, **SCHEDULES[name]}
    given = options.get("generation_kwargs", {})
    same = {**options, "generation_kwargs": {TRANSFORMERS_NAMES[key]: value for key, value in given.items()}}
    ours = train(model, **same)
    with small_engines():
        vllms = train(model, use_vllm=True, **options)
    assert vllms.said == ours.said
    assert vllms.flags == ours.flags
    assert relative_error(vllms.gradients, ours.gradients) < 1e-5
    if name == "fewest tokens":
        assert min(len(ids) for batch in ours.said for ids in batch) >= 12


def test_dynamic_sampling_draws_groups_again(model):
    """All ordinary rows of a greedy group are alike, so that each attempt finds groups without a signal."""

    def reward(completion_ids, **_):
        return [float(len(ids) < LENGTH) for ids in completion_ids]

    logs = []
    for engine in ({}, {"use_vllm": True, "vllm_importance_sampling_correction": True}):
        with small_engines():
            trainer = build(
                model, reward=reward, dynamic_sampling=True, max_steps=1, temperature=1e-4, **engine, **SEEDED
            )
            trainer.train()
        logs.append(trainer.state.log_history[0])
    ours, vllms = logs
    assert ours["dynamic_sampling/attempts"] == 3
    for key in ours:
        if key.startswith(("dynamic_sampling/", "ordinary/", "negative/", "completions/")) and "log_ratio" not in key:
            assert vllms[key] == pytest.approx(ours[key], abs=1e-5), key


def test_an_evaluation_has_no_negatives_and_the_weights_of_its_step(model):
    said = []

    def reward(completion_ids, steered, **_):
        said[-1].append([list(ids) for ids in completion_ids])
        assert trainer.model.training or not any(steered)
        return [float(len(ids) + number) for number, ids in enumerate(completion_ids)]

    for engine in ({}, {"use_vllm": True}):
        said.append([])
        with small_engines():
            trainer = build(
                model, reward=reward, max_steps=1, per_device_eval_batch_size=2 * G, **engine, **GREEDY, **SEEDED
            )
            trainer.train()
            trainer.evaluate(trainer.train_dataset.select(range(2)))
            trainer.train()  # from the weights of the end of the first, with a step count from 0
    assert len(said[0]) == 3
    assert said[1] == said[0]
