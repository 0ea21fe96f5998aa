"""The example of seeded negatives for slime, against a small stand-in with the signatures that it reads and calls."""

from __future__ import annotations

import asyncio
import enum
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from integrations.circling_model import circling_model, next_logits

from qscope_posttrain.rl.rollouts.copying import CopyRule, boundary_tokens

EXAMPLE = Path(__file__).resolve().parents[3] / "recipes" / "integrations" / "slime"
RESPONSE = 96


class Status(enum.Enum):
    PENDING, COMPLETED, TRUNCATED, ABORTED = range(4)


class Sample(SimpleNamespace):
    Status = Status

    def get_reward_value(self, args):
        return self.reward


@pytest.fixture(scope="module")
def model(make_model):
    return circling_model(make_model)


@pytest.fixture
def example(model, tiny_tokenizer, monkeypatch):
    """The module of the example, between a stand-in of slime and a greedy engine; `calls` are its requests."""
    calls = []

    async def post(url, payload, max_retries=60, headers=None):
        ids, limit = list(payload["input_ids"]), payload["sampling_params"]["max_new_tokens"]
        calls.append((url, len(ids), limit))
        said = []
        while len(said) < limit and (not said or said[-1] != tiny_tokenizer.eos_token_id):
            said.append(next_logits(model, ids + said).argmax().item())
        reason = "stop" if said[-1] == tiny_tokenizer.eos_token_id else "length"
        return {
            "text": tiny_tokenizer.decode(said),
            "meta_info": {"finish_reason": {"type": reason}, "output_token_logprobs": [(-0.5, t, None) for t in said]},
        }

    async def generate(args, sample, sampling_params):
        sample.response = "slime's own"
        return sample

    for name, contents in {
        "slime": {},
        "slime.rollout": {},
        "slime.utils": {},
        "slime.rollout.sglang_rollout": {
            "GenerateState": lambda args: SimpleNamespace(tokenizer=tiny_tokenizer),
            "generate": generate,
        },
        "slime.utils.http_utils": {"post": post},
        "slime.utils.types": {"Sample": Sample},
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.delitem(sys.modules, "seeded_generate", raising=False)
    module = importlib.import_module("seeded_generate")
    monkeypatch.setattr(module, "calls", calls, raising=False)
    return module


def arguments(**more):
    given = dict.fromkeys(("use_tis", "use_rollout_logprobs", "get_mismatch_metrics", "partial_rollout"), False)
    given |= {"n_samples_per_prompt": 4, "rollout_seed": 0, "rollout_skip_special_tokens": True}
    given |= {"sglang_router_ip": "engine", "sglang_router_port": 1, "grpo_std_normalization": True}
    return SimpleNamespace(**{**given, **more})


def run(example, index, args=None, **more):
    sample = Sample(index=index, prompt="The river runs past the old mill.", reward=None, remove_sample=False)
    sampling = {"temperature": 0.0, "max_new_tokens": RESPONSE}
    return asyncio.run(example.generate(args or arguments(), sample, sampling, **more))


def test_the_last_of_a_group_is_the_negative_of_our_trainer(example, model, tiny_tokenizer):
    sample = run(example, 7)
    (_, first, own), (_, second, rest) = example.calls
    boundaries = boundary_tokens(tiny_tokenizer, example.BOUNDARIES, len(tiny_tokenizer))
    rule, said = CopyRule(boundaries, torch.tensor([own - 32]), 2, 32), []
    prompt = sample.tokens[:first]
    while len(said) < RESPONSE:
        said.append(rule(len(said), next_logits(model, prompt + said)[None])[0].argmax().item())
        rule.read(torch.tensor([said[-1]]))
    assert sample.tokens[first:] == said
    assert (second - first, sample.response_length) == (RESPONSE - rest, RESPONSE)
    assert len(sample.loss_mask) == len(sample.rollout_log_probs) == RESPONSE
    tail = example.repeated_tail(said, min_copies=4, min_tokens=12)
    assert sample.loss_mask == [0] * tail.second_copy + [1] * (RESPONSE - tail.second_copy)
    assert sample.status is Status.TRUNCATED
    assert not sample.remove_sample


@pytest.mark.parametrize(("index", "evaluation"), [(0, False), (6, False), (7, True)])
def test_the_others_are_slimes_own(example, index, evaluation):
    assert run(example, index, evaluation=evaluation).response == "slime's own"
    assert not example.calls


def test_a_row_that_does_not_loop_leaves_the_loss(example, monkeypatch):
    monkeypatch.setattr(example, "LOOP_TOKENS", 1000)
    sample = run(example, 3)
    assert sample.remove_sample
    assert sum(sample.loss_mask) == 0


@pytest.mark.parametrize("option", ["use_tis", "use_rollout_logprobs", "get_mismatch_metrics", "partial_rollout"])
def test_what_would_erase_the_negatives_is_refused(example, option):
    with pytest.raises(ValueError, match=option.replace("_", "-")):
        run(example, 3, arguments(**{option: True}))


def test_rows_outside_of_the_loss_are_outside_of_the_statistics(example):
    rewards = [1.0, 0.0, 1.0, 9.0, 0.0, 1.0, 0.0, 0.0]
    removed = [False, False, False, True, False, False, False, False]
    samples = [Sample(index=i, group_index=i // 4, reward=rewards[i], remove_sample=removed[i]) for i in range(8)]
    raw, scores = example.group_rewards(arguments(), samples)
    assert raw == rewards
    first, second = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    expected = [*((first - first.mean()) / (first.std() + 1e-6)).tolist(), 0.0]
    expected += ((second - second.mean()) / (second.std() + 1e-6)).tolist()
    assert scores == pytest.approx(expected)
