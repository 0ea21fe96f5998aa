"""The example of seeded negatives for verl: its agent loop as verl makes it, with a small model for an engine."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl.experimental.agent_loop", reason="verl is not installed here: make test-verl")

import hydra
import numpy as np
import torch
from hydra import compose, initialize_config_module
from integrations.circling_model import circling_model, next_logits
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput

from qscope_posttrain.rl.rollouts.copying import CopyRule, boundary_tokens
from qscope_posttrain.rl.rows import find_tails, negative_loss_mask

EXAMPLE = Path(__file__).resolve().parents[3] / "recipes" / "integrations" / "verl"
RESPONSE = 96


class Engine:
    """In place of verl's client of vLLM or SGLang: greedy, by the same call."""

    def __init__(self, model, end):
        self.model, self.end, self.calls = model, end, []

    async def generate(self, request_id, *, prompt_ids, sampling_params, priority=0, **media):
        limit = sampling_params.get("max_tokens", RESPONSE)
        self.calls.append((len(prompt_ids), limit))
        ids = list(prompt_ids)
        while len(ids) < len(prompt_ids) + limit and (len(ids) == len(prompt_ids) or ids[-1] != self.end):
            ids.append(next_logits(self.model, ids).argmax().item())
        return TokenOutput(token_ids=ids[len(prompt_ids) :], extra_fields={})


@pytest.fixture(scope="module")
def model(make_model):
    return circling_model(make_model)


@pytest.fixture
def make_loop(model, tiny_tokenizer, monkeypatch):
    """Factory: what verl's worker does with an entry of `agent_loop_config_path`."""
    monkeypatch.syspath_prepend(EXAMPLE)

    def make(target="seeded_agent_loop.SeededAgentLoop", end=None, **options):
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose(
                "ppo_trainer",
                overrides=["actor_rollout_ref.rollout.n=4", f"actor_rollout_ref.rollout.response_length={RESPONSE}"],
            )
        entry = OmegaConf.create({"name": "seeded", "_target_": target, **options})
        return hydra.utils.instantiate(
            config=entry,
            trainer_config=DictConfigWrap(config=config),
            server_manager=Engine(model, tiny_tokenizer.eos_token_id if end is None else end),
            tokenizer=tiny_tokenizer,
            processor=None,
            hf_model_type="qwen3",
            dataset_cls=RLHFDataset,
            data_config=DictConfigWrap(config.data),
            tools=ToolListWrap([]),
        )

    yield make
    sys.modules.pop("seeded_agent_loop", None)


def run(loop, place, text="The river runs past the old mill.", **more):
    row = {"raw_prompt": [{"role": "user", "content": text}], "index": 3, "global_steps": 7, "uid": "u", **more}
    row |= {} if place is None else {"session_id": place}
    loop.loop = asyncio.new_event_loop()
    try:
        return loop.loop.run_until_complete(loop.run({"temperature": 0.0, "logprobs": False}, **row))
    finally:
        loop.loop.close()


def by_the_rule(model, tokenizer, prompt, start, copies, piece_length, end):
    """The row as the package's own trainer generates it: every token drawn, the copies forced."""
    boundaries = boundary_tokens(tokenizer, ["\n", ".", "!", "?", ";", "。", "！", "？", "；"], len(tokenizer))
    rule, said = CopyRule(boundaries, torch.tensor([start]), copies, piece_length), []
    while len(said) < RESPONSE and (not said or said[-1] != end):
        said.append(rule(len(said), next_logits(model, prompt + said)[None])[0].argmax().item())
        rule.read(torch.tensor([said[-1]]))
    return said


def test_the_last_of_a_group_is_the_negative_of_our_trainer(make_loop, model, tiny_tokenizer):
    end = tiny_tokenizer.eos_token_id
    loop = make_loop()
    output = run(loop, 3)
    (first, own), (second, rest) = loop.server_manager.calls
    start = own - 32
    assert 0 <= start <= RESPONSE // 8
    assert second - first == RESPONSE - rest
    expected = by_the_rule(model, tiny_tokenizer, output.prompt_ids, start, 2, 32, end)
    assert output.response_ids == expected
    assert output.response_ids != run(make_loop(), 0).response_ids, "the copies are not what it says by itself"
    tails = find_tails([expected], RESPONSE, [end], min_copies=4, min_tokens=12)
    ones = torch.ones(1, len(expected), dtype=torch.int64)
    mask = negative_loss_mask(ones, torch.tensor([True]), torch.tensor([True]), tails, "tail")
    assert output.response_mask == mask[0].tolist()
    assert 0 < sum(output.response_mask) < RESPONSE


def test_the_others_are_verls_own(make_loop):
    own = make_loop("verl.experimental.agent_loop.single_turn_agent_loop.SingleTurnAgentLoop")
    for place in range(3):
        found, expected = run(make_loop(), place), run(own, place)
        assert found.response_ids == expected.response_ids
        assert found.response_mask == expected.response_mask
        assert found.extra_fields.keys() == run(make_loop(), 3).extra_fields.keys()


def test_places_of_copying_differ_between_rows_and_repeat(make_loop):
    starts = []
    for index in range(4):
        loops = make_loop(), make_loop()
        for loop in loops:
            run(loop, 3, index=index)
        assert loops[0].server_manager.calls == loops[1].server_manager.calls
        starts.append(loops[0].server_manager.calls[0][1])
    assert len(set(starts)) > 1


def test_a_row_that_does_not_loop_leaves_the_batch(make_loop, model):
    """verl's V1 trainer takes a list of outputs, and leaves out a session with none."""
    loop = make_loop(loop_tokens=1000)
    assert run(loop, 3) == []
    prompt = run(make_loop(), 3).prompt_ids
    ends_at_once = next_logits(model, prompt).argmax().item()
    assert run(make_loop(end=ends_at_once), 3) == []


def test_what_cannot_work_is_refused(make_loop):
    with pytest.raises(ValueError, match="use_v1=True"):
        run(make_loop(), None)
    loop = make_loop()
    loop.loop = asyncio.new_event_loop()
    with pytest.raises(ValueError, match="calculate_log_probs=False"):
        loop.loop.run_until_complete(loop.run({"logprobs": True}, raw_prompt=[], session_id=3))
    loop.loop.close()


def test_verls_advantage_reaches_the_repeats_alone(make_loop):
    outputs = [run(make_loop(), place) for place in range(4)]
    mask = torch.zeros(4, RESPONSE)
    for row, output in enumerate(outputs):
        mask[row, : len(output.response_mask)] = torch.tensor(output.response_mask)
    rewards = torch.zeros(4, RESPONSE)
    rewards[:3, -1] = torch.tensor([1.0, 0.0, 1.0])  # the negative's reward is 0, as the user's function says
    advantages, _ = compute_grpo_outcome_advantage(rewards, mask, np.array(["u"] * 4, dtype=object))
    scores = torch.tensor([1.0, 0.0, 1.0, 0.0])
    expected = (scores - scores.mean()) / (scores.std() + 1e-6)
    assert torch.allclose(advantages, expected[:, None] * mask)
    assert advantages[3].min() < 0
