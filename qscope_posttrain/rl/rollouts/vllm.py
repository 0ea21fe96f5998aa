"""Generate a batch with vLLM, some of its rows as negatives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.layers import decoder_layers, text_config
from qscope_posttrain.rl.rollouts.copying import copied_piece
from qscope_posttrain.rl.rollouts.negatives import NegativeSource, planned_steering
from qscope_posttrain.rl.rollouts.vllm_connections import Colocated, Completion, Connection, Generate, Request, Server
from qscope_posttrain.rl.rollouts.vllm_options import check_vllm_trainer
from qscope_posttrain.rl.rollouts.vllm_steering import DIRECTIONS
from qscope_posttrain.rl.rows import RowPlan


class NegativeCompletions:
    """The negatives of this process, in their order; see `Rollout`. Empty until they have been generated."""

    def __init__(self) -> None:
        self.rows: list[Completion] = []

    def check_tokens(self, completion_ids: Tensor, completion_mask: Tensor) -> None:
        """RuntimeError unless these rows, both [rows, length], came out of TRL's generation as negatives."""
        found = [ids[mask.bool()].tolist() for ids, mask in zip(completion_ids, completion_mask, strict=True)]
        if found != [row.tokens for row in self.rows]:
            raise RuntimeError(
                "Negatives came out as other rows than those that were made negatives: TRL has put the rows of the "
                "batch in another order, or wrote into them."
            )

    def log_probabilities(self, completion_ids: Tensor) -> Tensor:
        """[rows, length] of the tokens under the distribution that vLLM drew them from, 0 for copied ones.

        That is the one after temperature, top-k, top-p and penalties. NaN where vLLM did not say, and after the end.
        """
        result = torch.full(completion_ids.shape, math.nan, dtype=torch.float32)
        for number, row in enumerate(self.rows):
            result[number, : len(row.logps)] = torch.tensor([math.nan if x is None else x for x in row.logps])
        return result.to(completion_ids.device)


class VLLMEngine:
    """Negatives in the vLLM that TRL has started in this process, or in the server that it has found.

    Seeded ones take two calls of any vLLM: for the row's own text up to the boundary, and for what follows the copies.
    Steered ones take one, of a vLLM with the plug-in, which is asked after each batch what it has steered.
    """

    def __init__(self, trainer: Any, source: NegativeSource) -> None:
        """
        Raises:
            ValueError: options of vLLM under which a negative would be none, or another model in the server.
            RuntimeError: negatives are steered, and the engine lacks the plug-in.
        """
        check_vllm_trainer(trainer)
        self._source, self._limit = source, trainer.args.completion_limit
        self._ends = {token for token in trainer.eos_token_ids if token is not None}
        self._min_tokens = (trainer.args.generation_kwargs or {}).get("min_tokens") or 0
        self._processes = trainer.accelerator.num_processes
        generation = trainer.vllm_generation
        self._in_server = generation.mode == "server"
        self._sharing = 1 if self._in_server else generation.tensor_parallel_size
        # vLLM reads the ends in the model's files; `generate` takes the trainer's.
        generation.generation_kwargs = {**generation.generation_kwargs, "stop_token_ids": sorted(self._ends)}
        self._connection: Connection | None = None
        if not self._in_server:
            self._connection = Colocated(generation)
        elif trainer.accelerator.is_main_process:
            self._connection = Server(generation, trainer.accelerator.unwrap_model(trainer.model).name_or_path)
        if source.random:
            _check_count(trainer, self._processes if self._in_server else self._sharing)
        if source.steering is not None and self._connection is not None:
            _check_plugin(self._connection, trainer.accelerator.unwrap_model(trainer.model))

    @contextmanager
    def rollout(self, plan: RowPlan) -> Iterator[NegativeCompletions]:
        """See `Engine`."""
        negatives, mine = NegativeCompletions(), plan.negative.nonzero().squeeze(1).tolist()
        made: dict[int, Completion] = {}  # By the number of the row in the batch of all processes
        connection = self._connection
        if connection is None:
            yield negatives
        else:
            with connection.intercepted(
                lambda prompts, generate: self._rows(connection, plan, prompts, generate, made)
            ):
                yield negatives
        if self._in_server and self._processes > 1:
            shared = [made]
            broadcast_object_list(shared, from_process=0)
            made = shared[0]
        if mine and not made:
            raise RuntimeError("TRL generated a batch with negatives without asking vLLM for it.")
        negatives.rows = [made[plan.first + row] for row in mine]

    def _rows(
        self,
        connection: Connection,
        plan: RowPlan,
        prompts: list[Mapping[str, Any]],
        generate: Generate,
        made: dict[int, Completion],
    ) -> list[Completion]:
        """Generate the rows of one call of vLLM, for TRL; its negatives go into `made` as well."""
        part = self._part_of_call(plan, len(prompts))
        self._check_room(prompts, connection.room)
        if self._source.steering is None:
            completions = self._seeded(part, prompts, generate)
        else:
            completions = self._steered(part, prompts, generate, connection)
        self._check_ends(completions)
        for row in part.negative.nonzero().squeeze(1).tolist():
            made[part.first + row] = completions[row]
            # Without log-probabilities TRL's importance ratio of the row is 1: it weighs for the distance between two
            # implementations of one policy, and a negative is meant to come from another.
            completions[row] = Completion(completions[row].tokens, [None] * len(completions[row].tokens))
        return completions

    def _part_of_call(self, plan: RowPlan, rows: int) -> RowPlan:
        """The plan of the rows of one call of vLLM: those of all processes in a server, those of the processes that
        share an engine (tensor parallelism) in a colocated one."""
        own = len(plan.negative)
        count = own * (self._processes if self._in_server else self._sharing)
        if rows != count:
            raise RuntimeError(f"TRL asked vLLM for {rows} rows, and {count} were planned.")
        return plan.part(plan.first // count * count, count)

    def _check_room(self, prompts: list[Mapping[str, Any]], room: int) -> None:
        """A row that is cut short is no endless repetition, and a negative would be dropped without a word."""
        longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts)
        if longest + self._limit > room:
            raise UserValueError(
                f"A prompt of {longest} tokens and max_completion_length={self._limit} make {longest + self._limit}, "
                f"and vLLM's max_model_len is {room}. Set vllm_max_model_length (of a server: --max-model-len) to at "
                "least that, or shorten the prompts."
            )

    def _check_ends(self, completions: list[Completion]) -> None:
        for row in completions:
            if len(row.tokens) < self._limit and row.tokens[-1] not in self._ends:
                raise UserValueError(
                    f"vLLM ended a row after {len(row.tokens)} tokens, neither at max_completion_length={self._limit} "
                    f"nor at an end token of the trainer ({sorted(self._ends)}) but at {row.tokens[-1]}. Let the "
                    "model's generation_config name the same end tokens in the trainer and in the files that vLLM "
                    "reads."
                )

    # ---- Seeded negatives

    def _seeded(self, plan: RowPlan, prompts: list[Mapping[str, Any]], generate: Generate) -> list[Completion]:
        starts, negatives = plan.start.tolist(), plan.negative.nonzero().squeeze(1).tolist()
        lengths = [min(self._limit, starts[row] + self._source.copy_length) for row in negatives]
        first = [self._request(prompts[row], length) for row, length in zip(negatives, lengths, strict=True)]
        completions: dict[int, Completion] = {}
        done: set[int] = set()
        for row, own in zip(negatives, generate(first), strict=True):
            copied = self._copied(own, starts[row])
            completions[row] = copied or own
            if copied is None or len(copied.tokens) == self._limit:
                done.add(row)
        going_on = [row for row in range(len(prompts)) if row not in done]
        nothing = Completion([], [])
        requests = [self._request(prompts[row], self._limit, completions.get(row, nothing)) for row in going_on]
        for row, rest in zip(going_on, generate(requests), strict=True):
            before = completions.get(row, nothing)
            completions[row] = Completion([*before.tokens, *rest.tokens], [*before.logps, *rest.logps])
        return [completions[row] for row in range(len(prompts))]

    def _copied(self, own: Completion, start: int) -> Completion | None:
        """A row's own text and the copies, None where it ended before a piece did. They were not drawn: with nothing
        else possible, their log-probability is 0."""
        source = self._source
        if source.is_boundary is None:
            raise RuntimeError("Negatives that are not steered need boundaries to copy at.")
        text = own.tokens[:-1] if own.tokens[-1] in self._ends else own.tokens
        piece = copied_piece(text, source.is_boundary, start, source.copy_length)
        if piece is None:
            return None
        begin, end = piece
        copies = text[begin:end] * source.copies
        logps = [*own.logps[:end], *[0.0] * len(copies)]
        return Completion([*text[:end], *copies][: self._limit], logps[: self._limit])

    def _request(
        self, prompt: Mapping[str, Any], length: int, before: Completion | None = None, steering: Any = None
    ) -> Request:
        """Ask for a row of `length` tokens altogether, which begins with `before`."""
        tokens = [] if before is None else before.tokens
        ids = [*prompt["prompt_token_ids"], *tokens]
        rest = length - len(tokens)
        fewest = min(max(0, self._min_tokens - len(tokens)), rest)
        return Request({**prompt, "prompt_token_ids": ids}, rest, fewest, steering)

    # ---- Steered negatives

    def _steered(
        self, plan: RowPlan, prompts: list[Mapping[str, Any]], generate: Generate, connection: Connection
    ) -> list[Completion]:
        asked, directions = self._steerings(plan)
        connection.call("qscope_put_directions", directions)
        completions = generate(
            [self._request(prompt, self._limit, None, asked.get(row)) for row, prompt in enumerate(prompts)]
        )
        # The last token of a row is never read, but by an engine that looks ahead.
        read = {steering["row"]: len(completions[row].tokens) - 1 for row, steering in asked.items()}
        expected = {
            steering["row"]: sum(_steered_tokens(edit, read[steering["row"]]) for edit in steering["edits"])
            for steering in asked.values()
        }
        for worker, counted in enumerate(connection.call("qscope_take_counts", read)):
            if counted != expected:
                raise RuntimeError(_other_counts(worker, expected, counted))
        return completions

    def _steerings(self, plan: RowPlan) -> tuple[dict[int, dict[str, Any]], dict[str, list[float]]]:
        """Steering of each negative in the form that vLLM gets, by row, and the directions by the names used there."""
        source, steering = self._source, planned_steering(self._source, plan)
        if steering is None or steering.mode != "add":
            raise RuntimeError(f"vLLM steers by mode 'add' only; got {steering}.")
        changes = {layer: steering.change(layer) for layer in steering.layers}
        shifts = {layer: change.shift for layer, change in changes.items() if change.shift is not None}
        asked: dict[int, dict[str, Any]] = {}
        directions: dict[str, list[float]] = {}
        for row in plan.negative.nonzero().squeeze(1).tolist():
            edits = []
            for layer, shift in shifts.items():
                name = f"{layer}/{row}" if source.random else str(layer)
                # With unit and strength in it, as the other engine adds it.
                directions[name] = (shift[row, 0] if source.random else shift).tolist()
                window = {"start": int(plan.start[row]), "length": source.window_length}
                edits.append({"direction": name, "layer": layer, "strength": 1.0, "mode": "add", **window})
            asked[row] = {"row": f"{plan.draw}/{plan.first + row}", "edits": edits}
        return asked, directions


def _steered_tokens(edit: Mapping[str, Any], read: int) -> int:
    """Tokens that an edit steers in a row of which `read` generated tokens are read."""
    start, length = edit["start"], edit["length"]
    end = read if length is None else min(read, start + length)
    return max(0, end - start)


def _check_count(trainer: Any, processes: int) -> None:
    """ValueError for more negatives in one call of vLLM than it holds directions, where each has its own."""
    args = trainer.args
    rows = args.per_device_train_batch_size * (args.steps_per_generation or 1) * processes
    negatives = rows // args.generations * args.negatives_per_group
    if negatives > DIRECTIONS:
        raise UserValueError(
            f"negative='random' takes a direction per negative, and {negatives} of {rows} rows of a generation batch "
            f"are negatives; vLLM holds {DIRECTIONS} directions. Lower steps_per_generation or the batch size."
        )


def _check_plugin(connection: Connection, model: Any) -> None:
    """RuntimeError without the plug-in in each worker of the engine, ValueError for another model in it."""
    own = {"layers": len(decoder_layers(model)), "hidden_size": text_config(model).hidden_size}
    for found in connection.call("qscope_put_directions", {}):
        held = {name: found[name] for name in own}
        if held != own:
            raise UserValueError(
                f"vLLM holds the model {found['model']!r} with {held['layers']} layers of width {held['hidden_size']}, "
                f"and one with {own['layers']} of width {own['hidden_size']} is trained. Start vLLM with the model of "
                "the training."
            )


def _other_counts(worker: int, expected: Mapping[str, int], counted: Mapping[str, int]) -> str:
    rows = sorted(name for name in {*expected, *counted} if expected.get(name) != counted.get(name))
    few = "; ".join(f"row {name}: {expected.get(name, 0)} tokens, steered {counted.get(name, 0)}" for name in rows[:4])
    return (
        f"vLLM did not steer what was planned (worker {worker}, {len(rows)} rows): {few}. The batch is not used. "
        "Either vLLM ran the model without the plug-in, or somebody else sends steered requests to the same engine."
    )
