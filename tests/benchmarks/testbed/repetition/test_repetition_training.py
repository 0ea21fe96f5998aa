"""Reward, arguments and data of a run, and a run of two updates on a random model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.experiments.arms import REPETITION_ARMS as ARMS
from benchmarks.testbed.models import LanguageModel
from benchmarks.testbed.repetition.config import RepetitionConfig
from benchmarks.testbed.repetition.task import build_tokenizer, encode_words
from benchmarks.testbed.repetition.training import RightAnswer, Watcher, grpo_arguments, prompt_data, train
from qscope_posttrain.rl.config import SteeredGRPOConfig

CONFIG = RepetitionConfig(
    fewest_operations=1, most_operations=2, answer_tokens=48, updates=3, prompts_per_update=2, rows_per_prompt=4,
)  # fmt: skip


def test_the_reward_is_one_for_a_right_answer_that_ends() -> None:
    tokenizer = build_tokenizer()
    texts = ["3 + 4 = 7 ; ans 7 <eos>", "3 + 4 = 7 ; ans 7", "3 + 4 = 8 ; ans 8 <eos>", "<eos>", "ans 7 <pad>"]
    ids = [encode_words(tokenizer, text.split()) for text in texts]
    reward = RightAnswer(tokenizer)
    assert reward(prompts=["x"] * 5, completion_ids=ids, answer=[7] * 5, steered=[False] * 5) == [1, 0, 0, 0, 0]
    assert reward.__name__ == "right_answer"


@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_is_a_valid_configuration_with_the_common_settings(name: str, tmp_path) -> None:
    arguments = grpo_arguments(ARMS[name], 3, CONFIG, str(tmp_path))
    assert isinstance(arguments, SteeredGRPOConfig)
    for field, value in ARMS[name].overrides.items():
        assert getattr(arguments, field) == value
    assert (arguments.max_steps, arguments.num_generations, arguments.per_device_train_batch_size) == (3, 4, 8)
    assert (arguments.beta, arguments.epsilon_high) == (0.0, 0.28)
    assert (arguments.loss_type, arguments.num_iterations, arguments.adam_beta2) == ("dapo", 1, 0.98)
    assert (arguments.top_p, arguments.top_k, arguments.temperature) == (1.0, 0, 1.0)


def test_the_device_decides_on_the_cpu(tmp_path) -> None:
    assert grpo_arguments(ARMS["default"], 0, CONFIG, str(tmp_path)).use_cpu
    assert not grpo_arguments(ARMS["default"], 0, replace(CONFIG, device="cuda"), str(tmp_path)).use_cpu


def test_an_arm_may_bring_a_reward_of_its_own(tiny: LanguageModel) -> None:
    trained = train(tiny, ARMS["reward_penalty"], 0, replace(CONFIG, updates=1))
    entry = trained.history[0]
    assert entry["negative/rows"] == 0
    assert "rewards/repetition_penalty/mean" in entry
    weighted = sum(entry[f"rewards/{name}/mean"] for name in REWARDS)
    assert entry["reward"] == pytest.approx(weighted, abs=1e-6)


REWARDS = ("right_answer", "repetition_penalty", "soft_overlong_punishment_reward")


def test_prompts_are_problems_that_are_not_held_out() -> None:
    data = prompt_data(CONFIG, 0)
    assert len(data) == 6
    assert data[0]["prompt"].startswith("<bos> ")
    assert data[0]["prompt"].endswith(" <sep>")
    assert prompt_data(CONFIG, 0)["prompt"] == data["prompt"] != prompt_data(CONFIG, 1)["prompt"]


def norm(model: PreTrainedModel) -> dict[str, float]:
    return {"norm": float(sum(weight.detach().square().sum() for weight in model.parameters()))}


def test_a_run_is_watched_on_the_way_and_leaves_the_start_alone(tiny: LanguageModel) -> None:
    watcher = Watcher(norm, every=2)
    before = {name: weight.clone() for name, weight in tiny.model.state_dict().items()}
    trained = train(tiny, ARMS["plain"], 0, replace(CONFIG, learning_rate=0.01), watcher=watcher)
    assert sorted(watcher.found) == [0, 2, 3]
    assert watcher.found[0] == norm(tiny.model)
    assert watcher.found[3] == norm(trained.model)
    assert len(trained.history) == 3
    assert "rewards/right_answer/mean" in trained.history[0]
    assert all(torch.equal(weight, before[name]) for name, weight in tiny.model.state_dict().items())


def test_a_seeded_negative_takes_the_last_row_of_each_group(tiny: LanguageModel) -> None:
    arm = replace(ARMS["seeded"], overrides={**ARMS["seeded"].overrides, "window_start": [0, 6]})
    trained = train(tiny, arm, 0, replace(CONFIG, updates=1))
    assert trained.history[0]["negative/rows"] == 2
