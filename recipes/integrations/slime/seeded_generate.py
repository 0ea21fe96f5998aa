"""Example: seeded negatives in slime's GRPO (read at 624b824a, 21 Aug 2026), as a custom generate function.

The last rollout of each group repeats a piece of its own text, then goes on by itself. If it ends in an endless
repetition, its repeats are in the loss, with the advantage that its reward has in the group; if not, it is taken out of
the loss and of the group's mean. It needs token ids alone.

    PYTHONPATH=recipes/integrations/slime python train.py ... --eps-clip-high 0.28 --calculate-per-token-loss \
        --custom-generate-function-path seeded_generate.generate \
        --custom-reward-post-process-path seeded_generate.group_rewards

It has run against a small stand-in of slime with the signatures above (tests/integrations/slime), never in slime.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import torch
from slime.rollout.sglang_rollout import GenerateState
from slime.rollout.sglang_rollout import generate as ordinary
from slime.utils.http_utils import post
from slime.utils.types import Sample
from torch import Tensor

from qscope_posttrain.rl.rollouts.copying import boundary_tokens, seeded_text
from qscope_posttrain.text.repetition import repeated_tail

BOUNDARIES = ("\n", ".", "!", "?", ";", "。", "！", "？", "；")
COPIES = 2  # Copies of the piece before the row goes on by itself
COPY_LENGTH = 32  # Tokens after which a piece ends without a boundary
WINDOW = 0.125  # Share of the response in which the piece may begin to be copied
LOOP_COPIES, LOOP_TOKENS = 4, 12  # What makes a response that was cut off an endless repetition


async def generate(args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False) -> Sample:
    """slime's own generation, but for the last sample of a group in training."""
    if evaluation or sample.index % args.n_samples_per_prompt != args.n_samples_per_prompt - 1:
        return await ordinary(args, sample, sampling_params)
    refused = ("use_tis", "use_rollout_logprobs", "get_mismatch_metrics", "partial_rollout")
    if given := [f"--{name.replace('_', '-')}" for name in refused if getattr(args, name)]:
        raise ValueError(
            f"Leave {', '.join(given)} out: no policy sampled the copies, so a correction by rollout probabilities "
            "would take the negatives out of the loss, and a partial rollout would go on with half of one."
        )
    tokenizer = GenerateState(args).tokenizer
    prompt = tokenizer.encode(sample.prompt, add_special_tokens=False)
    limit = sampling_params["max_new_tokens"]
    start = random.Random(f"{args.rollout_seed} {sample.index}").randint(0, int(WINDOW * limit))
    response, ended = await _sample(args, prompt, sampling_params, min(start + COPY_LENGTH, limit))
    text = seeded_text(response, _boundaries(tokenizer), start, COPIES, COPY_LENGTH)
    if text is not None:  # else it ended before there was a piece to copy
        response, ended = text[:limit], False
        if len(response) < limit:
            rest, ended = await _sample(args, prompt + response, sampling_params, limit - len(response))
            response = response + rest
    tail = None if ended else repeated_tail(response, min_copies=LOOP_COPIES, min_tokens=LOOP_TOKENS)
    sample.tokens, sample.response_length = prompt + response, len(response)
    sample.response = tokenizer.decode(response, skip_special_tokens=args.rollout_skip_special_tokens)
    sample.loss_mask = [int(tail is not None and place >= tail.second_copy) for place in range(len(response))]
    # slime wants them of each row of a batch, but without the options above only for its metric of their difference.
    sample.rollout_log_probs = [0.0] * len(response)
    sample.remove_sample = tail is None
    sample.status = Sample.Status.COMPLETED if ended else Sample.Status.TRUNCATED
    return sample


async def _sample(args: Any, ids: list[int], sampling_params: dict[str, Any], limit: int) -> tuple[list[int], bool]:
    """Tokens that the engine adds, and whether it ended by itself."""
    payload = {
        "input_ids": ids,
        "sampling_params": {**sampling_params, "max_new_tokens": limit},
        "return_logprob": True,
    }
    output = await post(f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate", payload)
    found = output["meta_info"]
    if found["finish_reason"]["type"] == "abort":
        raise RuntimeError("SGLang gave up a request; seeded negatives cannot go on with a part of one.")
    return [token for _, token, *_ in found["output_token_logprobs"]], found["finish_reason"]["type"] == "stop"


def group_rewards(args: Any, samples: list[Sample]) -> tuple[list[float], list[float]]:
    """Rewards, and what GRPO makes of them: by the mean and deviation of the rows of a group that are in the loss."""
    raw = torch.tensor([float(sample.get_reward_value(args)) for sample in samples])
    groups = torch.tensor([sample.group_index for sample in samples])
    kept = torch.tensor([not sample.remove_sample for sample in samples])
    scores = torch.zeros_like(raw)
    for group in groups.unique():
        mine = (groups == group) & kept
        centered = raw[mine] - raw[mine].mean()
        deviation = raw[mine].std() if mine.sum() > 1 and args.grpo_std_normalization else torch.tensor(1.0)
        scores[mine] = centered / (deviation + 1e-6)
    return raw.tolist(), scores.tolist()


@lru_cache(maxsize=1)
def _boundaries(tokenizer: Any) -> Tensor:
    return boundary_tokens(tokenizer, BOUNDARIES, len(tokenizer))
