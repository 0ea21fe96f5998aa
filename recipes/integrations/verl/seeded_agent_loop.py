"""Example: seeded negatives in verl's GRPO (verl 0.9, V1 trainer), as an agent loop.

The last rollout of each group repeats a piece of its own text, then goes on by itself. If it ends in an endless
repetition, its repeats are in the loss, with the advantage that its reward has in the group; if not, verl never sees
the row, neither in the loss nor in the group's mean. It needs token ids alone: vLLM and SGLang both serve.

    loops.yaml:     - name: seeded
                      _target_: seeded_agent_loop.SeededAgentLoop
    training rows:  a column `agent_name` with the value "seeded". Leave it out of validation rows, which a loop cannot
                    tell from training rows.
    command:        PYTHONPATH=recipes/integrations/verl python -m verl.trainer.main_ppo ... \
                        actor_rollout_ref.rollout.agent.agent_loop_config_path=loops.yaml \
                        actor_rollout_ref.actor.clip_ratio_high=0.28 actor_rollout_ref.actor.loss_agg_mode=token-mean \
                        actor_rollout_ref.rollout.calculate_log_probs=False

Run with verl's classes and a small model in place of the engine (tests/integrations/verl), never on a GPU.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any
from uuid import uuid4

from torch import Tensor
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.utils.profiler import simple_timer

from qscope_posttrain.rl.rollouts.copying import boundary_tokens, seeded_text
from qscope_posttrain.text.repetition import repeated_tail

BOUNDARIES = ("\n", ".", "!", "?", ";", "。", "！", "？", "；")


class SeededAgentLoop(SingleTurnAgentLoop):
    """A single turn whose last rollout in a group is a seeded negative; the others are verl's own.

    Args:
        copies: copies of the piece before the row goes on by itself.
        copy_length: tokens after which a piece ends without a boundary.
        window: share of the response in which the piece may begin to be copied.
        loop_copies, loop_tokens: what makes a response that was cut off an endless repetition.
        seed: of the places where copying begins.
    """

    def __init__(
        self,
        *args: Any,
        copies: int = 2,
        copy_length: int = 32,
        window: float = 0.125,
        loop_copies: int = 4,
        loop_tokens: int = 12,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.copies, self.copy_length, self.window = copies, copy_length, window
        self.loop_copies, self.loop_tokens, self.seed = loop_copies, loop_tokens, seed

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **row: Any) -> AgentLoopOutput | list:
        if "session_id" not in row:
            raise ValueError("run() is told its place in the group by verl's V1 trainer only: set trainer.use_v1=True.")
        if row["session_id"] != self.rollout_config.n - 1:
            return await super().run(sampling_params, priority=priority, **row)
        if sampling_params.get("logprobs"):
            raise ValueError(
                "No policy sampled the copies, so a correction by rollout probabilities would take the negatives out "
                "of the loss: set actor_rollout_ref.rollout.calculate_log_probs=False and no rollout correction."
            )
        prompt = await self.ct_build_initial_tokens(list(row["raw_prompt"]))
        draw = random.Random(f"{self.seed} {row.get('global_steps')} {row.get('index')}")
        start = draw.randint(0, int(self.window * self.response_length))
        timing: dict[str, float] = {}
        with simple_timer("generate_sequences", timing):
            response = await self._negative(prompt, start, sampling_params, int(priority))
        tail = None
        if len(response) == self.response_length and response[-1] != self.tokenizer.eos_token_id:
            tail = repeated_tail(response, min_copies=self.loop_copies, min_tokens=self.loop_tokens)
        if tail is None:
            return []  # verl's V1 trainer leaves out a session without an output
        in_loss = [int(place >= tail.second_copy) for place in range(len(response))]
        return AgentLoopOutput(
            prompt_ids=prompt,
            response_ids=response,
            response_mask=in_loss,
            num_turns=2,
            metrics=AgentLoopMetrics(**timing),
            extra_fields={"turn_scores": [], "tool_rewards": []},  # as in the other rows of the batch
        )

    async def _negative(self, prompt: list[int], start: int, sampling: dict[str, Any], priority: int) -> list[int]:
        own = await self._generate(prompt, sampling, min(start + self.copy_length, self.response_length), priority)
        text = seeded_text(own, _boundaries(self.tokenizer), start, self.copies, self.copy_length)
        if text is None:  # it ended before there was a piece to copy
            return own
        text = text[: self.response_length]
        rest = self.response_length - len(text)
        return text + (await self._generate(prompt + text, sampling, rest, priority) if rest else [])

    async def _generate(self, ids: list[int], sampling: dict[str, Any], limit: int, priority: int) -> list[int]:
        output = await self.server_manager.generate(
            request_id=uuid4().hex, prompt_ids=ids, sampling_params={**sampling, "max_tokens": limit}, priority=priority
        )
        return list(output.token_ids)[:limit]


@lru_cache(maxsize=1)
def _boundaries(tokenizer: Any) -> Tensor:
    return boundary_tokens(tokenizer, BOUNDARIES, len(tokenizer))
