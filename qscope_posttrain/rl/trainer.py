"""TRL's `GRPOTrainer` with a negative example in each group."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOTrainer
from trl.rewards import get_soft_overlong_punishment

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.rl.checkpoints import SameRun, SaveBetweenGenerations, run_identity
from qscope_posttrain.rl.config import SteeredGRPOConfig
from qscope_posttrain.rl.dynamic_sampling import BatchDict, DynamicSampling, dead_groups, replace_rows, rows_to_redraw
from qscope_posttrain.rl.metrics import overwrite_last, row_metrics, token_metrics, token_sums
from qscope_posttrain.rl.prompts import check_data, check_inputs
from qscope_posttrain.rl.rewards import check_reward_data
from qscope_posttrain.rl.rollouts.hf import TransformersEngine
from qscope_posttrain.rl.rollouts.negatives import Engine, NegativeSource, Rollout, negative_source
from qscope_posttrain.rl.rollouts.options import check_trainer_arguments
from qscope_posttrain.rl.rollouts.vllm import VLLMEngine
from qscope_posttrain.rl.rollouts.vllm_ports import load_weights_on_cpu, plugin_enabled
from qscope_posttrain.rl.rows import (
    RowFacts,
    RowPlan,
    ScoredRows,
    find_tails,
    negative_loss_mask,
    ordinary_plan,
    plan_rows,
    total_rewards,
)

STEERED = "steered"  # Key of the flag of negatives: in the inputs of reward functions, and in the batch of the loss


class SteeredGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` that generates the last row of each group as a negative example.

    The negative is scored by the same reward functions and weighted by the unsteered policy (Qwen-Scope report,
    Eq. 28). All else is TRL's: with `negatives_per_group=0` the trajectory is bit-identical to that of `GRPOTrainer`
    with the same values (DAPO's `epsilon_high` and soft overlong punishment among them), and evaluation has no
    negatives.

    Reward functions get a keyword `steered`, one flag per row. TRL's reward metrics then describe the rows in the group
    statistics, its `completions/...` all rows; `ordinary/...` and `negative/...` the two kinds separately.

    Args:
        model (str or PreTrainedModel): As for `GRPOTrainer`, like callbacks and arguments.
        reward_funcs (callable or list of them): DAPO's soft overlong punishment joins them unless `soft_overlong_cache`
            is 0; with `reward_weights` given it has weight 1.
        args (SteeredGRPOConfig): The settings; required, since its values decide what the negatives are. The trainer
            works on a copy (`trainer.args`), so that one config serves several trainers.
        features (FeatureSet or path, default None): Where to steer, as `qscope features find-repetition` writes it.
            Without them, and where `args.negative` is left open, negatives are seeded: no SAE is needed.
        callbacks (list of TrainerCallback, default None): Further callbacks.
        arguments: all other arguments of `GRPOTrainer`.

    Raises:
        TypeError: `args` is no `SteeredGRPOConfig`, or `features` neither a FeatureSet nor a path.
        ValueError: features that are missing, incomplete, another model's or of no use; arguments or options of
            `generate` under which rows cannot be distinguished; prompts that cannot be read.

    Example:
        >>> config = qp.SteeredGRPOConfig(
        ...     folder, max_steps=1, num_generations=4, per_device_train_batch_size=4, max_completion_length=16,
        ...     use_cpu=True, bf16=False, report_to="none",
        ... )
        >>> trainer = qp.SteeredGRPOTrainer(
        ...     model, reward, config, train_dataset=dataset.select_columns("prompt"), processing_class=tokenizer
        ... )
        >>> trainer.train().global_step
        1
    """

    args: SteeredGRPOConfig
    model: torch.nn.Module

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: SteeredGRPOConfig | None = None,
        *,
        features: FeatureSet | str | PathLike[str] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        **arguments: Any,
    ) -> None:
        if not isinstance(args, SteeredGRPOConfig):
            raise UserTypeError(f"args must be a SteeredGRPOConfig; got {type(args).__name__}.")
        if isinstance(features, (str, PathLike)):
            features = FeatureSet.load(Path(features))
        if not isinstance(features, FeatureSet | None):
            raise UserTypeError(f"features must be a FeatureSet or its path; got {type(features).__name__}.")
        args = args.settled(features is not None)
        check_trainer_arguments(args, arguments)
        own = [SaveBetweenGenerations(args)] if args.has_negatives else []
        # TRL writes into the lists that it is given.
        rewards = [function for function in _as_list(reward_funcs) if function is not None]
        classes, weights = arguments.pop("reward_processing_classes", None), args.reward_weights
        classes = None if classes is None else _as_list(classes)
        environment = arguments.get("environment_factory") is not None  # it may bring a reward of its own
        if weights is not None and len(weights) != len(rewards) and not environment:
            raise UserValueError(f"reward_weights has {len(weights)} numbers for {len(rewards)} reward functions.")
        if args.soft_overlong_cache and (rewards or environment):  # the length alone is no reward: TRL refuses
            rewards.append(get_soft_overlong_punishment(args.completion_limit, args.soft_overlong_cache))
            args.reward_weights = None if weights is None else [*weights, 1.0]
            classes = None if classes is None else [*classes, None]
        arguments |= {"callbacks": [*(callbacks or []), *own], "reward_processing_classes": classes}
        with plugin_enabled(args):
            super().__init__(model, rewards, args, **arguments)
        if args.use_vllm:
            load_weights_on_cpu(self.vllm_generation)
        args.reward_weights = weights
        self._source: NegativeSource | None = None
        self._engine: Engine | None = None
        if args.has_negatives:
            self._source = negative_source(args, features, self.model, self._tokenizer)
            self._engine = (VLLMEngine if args.use_vllm else TransformersEngine)(self, self._source)
        self._dynamic = DynamicSampling(self.train_dataset) if args.dynamic_sampling else None
        check_data(self, STEERED)
        check_reward_data(self.reward_funcs, self.train_dataset)
        weighted = list(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
        self.add_callback(SameRun(run_identity(args, self._source, features, weighted), required=args.has_negatives))
        self._plan = ordinary_plan(0)
        self._rollout: Rollout | None = None
        self._rows: ScoredRows | None = None
        self._logps: Tensor | None = None
        self._token_sums: Tensor | None = None

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As `GRPOTrainer.train`. A second call with negatives starts from a fresh generation batch."""
        if self.args.has_negatives:
            self._step, self._buffered_inputs = 0, None
        self._last_loaded_step = -1  # vLLM holds the weights of the end of the first, TRL may take them for these
        self._token_sums = None
        return super().train(*arguments, **options)

    # ---- Generation and scoring

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> BatchDict:
        check_inputs(self, inputs)
        if not self.model.training:
            self._plan = ordinary_plan(len(inputs))
            return super()._generate_and_score_completions([{**row, STEERED: False} for row in inputs])
        output, dead = self._generate_and_score_attempt(inputs, 0)
        if self._dynamic is not None:
            output = self._redraw_dead_groups(output, dead, self._dynamic)
        return output

    def _generate_and_score_attempt(self, inputs: list[dict[str, Any]], attempt: int) -> tuple[BatchDict, Tensor]:
        """The batch that TRL makes of `inputs`, with its negatives; and which groups of the whole batch are dead."""
        self._plan = plan = self._plan_rows(len(inputs), attempt)
        self._rollout = None
        masks_truncated = self.mask_truncated_completions
        # An endless repetition is truncated by nature: TRL would mask it. Ordinary rows are masked below.
        self.mask_truncated_completions = masks_truncated and not plan.in_batch
        try:
            output = super()._generate_and_score_completions(
                [{**row, STEERED: flag} for row, flag in zip(inputs, plan.negative.tolist(), strict=True)]
            )
        finally:
            self.mask_truncated_completions = masks_truncated
            self._plan = ordinary_plan(0)
        rows, self._rows = self._rows, None
        if rows is None:
            raise RuntimeError("TRL returned a batch without scoring it: _calculate_rewards was not called.")
        if self.args.has_negatives or self.args.dynamic_sampling:
            self._enter_negatives(output, rows, plan, masks_truncated)
        self._log_rows(rows, output["advantages"])
        return output, dead_groups(rows.rewards, rows.everyone.negative, self.args.generations)

    def _plan_rows(self, rows: int, attempt: int) -> RowPlan:
        if self._source is None:
            return ordinary_plan(rows)
        return plan_rows(
            rows,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            group_size=self.args.generations,
            negatives_per_group=self.args.negatives_per_group,
            window_start=self._source.window_start,
            seed=self.args.seed,
            step=self.state.global_step,
            part=self._part_of_step,
            attempt=attempt,
        )

    @property
    def _part_of_step(self) -> int:
        """Number of the micro-batch within the optimizer step: a step may take several generation batches."""
        return int(self._step % self.args.gradient_accumulation_steps)

    def _generate(self, prompts: list[Any]) -> Any:
        if self._engine is None or not self._plan.in_batch:
            return super()._generate(prompts)
        with self._engine.rollout(self._plan) as self._rollout:
            return super()._generate(prompts)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's rewards [rows of all processes, functions], NaN for rows outside of their group's statistics."""
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        tails = find_tails(
            completion_ids_list,
            self.args.completion_limit,
            self.eos_token_ids,
            min_copies=self.args.loop_min_copies,
            min_tokens=self.args.loop_min_tokens,
        )
        end_tokens = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        mine = RowFacts.of(completion_ids_list, tails, self._plan.negative.to(rewards.device), end_tokens)
        total = total_rewards(rewards, self.reward_weights.to(rewards.device))
        rows = ScoredRows(tails, mine, mine.gathered(), total, rewards)
        if self.args.has_negatives:  # of every batch: the table of completions needs columns of one length
            self._log_completion_extra("steered", mine.negative.tolist())
            self._log_completion_extra("looped", mine.looped.tolist())
        if not self.model.training:
            return rewards
        self._rows = rows
        return rewards.masked_fill(~rows.everyone.kept(self._gate)[:, None], torch.nan)

    @property
    def _gate(self) -> str:
        return self.args.gate or "drop"

    def _enter_negatives(self, output: BatchDict, rows: ScoredRows, plan: RowPlan, mask_truncated: bool) -> None:
        """Write into TRL's batch which rows are negatives, their advantages, and their tokens in the loss."""
        args, negative, weight = self.args, rows.mine.negative, self.args.negative_weight or 0.0
        if mask_truncated and plan.in_batch:
            hidden = rows.mine.truncated & ~negative
            output["completion_mask"] = output["completion_mask"] * (~hidden).unsqueeze(1).int()
        behavior = torch.zeros_like(output["completion_ids"], dtype=torch.float32)
        if self._rollout is not None:
            self._rollout.check_tokens(output["completion_ids"][negative], output["completion_mask"][negative])
            drawn = self._rollout.log_probabilities(output["completion_ids"][negative])
            # What follows the end of a row was not drawn: where it should have copied, log 0 would turn sums to nan.
            behavior[negative] = drawn.masked_fill(output["completion_mask"][negative] == 0, 0.0)
            self._rollout = None
        output["advantages"] = torch.where(negative, weight * output["advantages"], output["advantages"])
        output["tool_mask"] = negative_loss_mask(
            output["completion_mask"], negative, rows.mine.kept(self._gate), rows.tails, args.negative_tokens or "tail"
        )
        output[STEERED], output["behavior_logps"] = negative, behavior
        self._count_loss_tokens(output)

    def _count_loss_tokens(self, output: BatchDict) -> None:
        in_loss = (output["completion_mask"] * output["tool_mask"]).sum()
        output["num_items_in_batch"] = self.accelerator.gather(in_loss).sum()

    # ---- Dynamic sampling

    def _redraw_dead_groups(self, output: BatchDict, dead: Tensor, dynamic: DynamicSampling) -> BatchDict:
        """Replace dead groups by living ones of further attempts; those that stay dead leave the loss."""
        processes, mine = self.accelerator.num_processes, self.accelerator.process_index
        metrics, group_size = self._metrics["train"], self.args.generations
        metrics["dynamic_sampling/dead_groups"].append(dead.float().mean().item())
        attempt = 0

        def own(groups: Tensor, rows: int) -> Tensor:
            """[rows] of this process, of a flag per group of the whole batch."""
            return groups.repeat_interleave(group_size)[mine * rows : (mine + 1) * rows]

        while bool(dead.any()) and attempt < self.args.dynamic_sampling_attempts:
            attempt += 1
            rows = rows_to_redraw(dead, group_size, processes, mine)
            total = len(rows) * processes
            seed = (self.args.seed, self.state.global_step, self._part_of_step, attempt)
            inputs = dynamic.prompts(len(rows), mine * len(rows), total, group_size, seed)
            other, other_dead = self._generate_and_score_attempt(inputs, attempt)
            whole_batch = total == dead.numel() * group_size
            places = torch.arange(len(dead), device=dead.device) if whole_batch else dead.nonzero().squeeze(1)
            revived = dead[places] & ~other_dead
            taken = own(revived, len(rows))
            output = replace_rows(output, rows[taken], other, taken.nonzero().squeeze(1), self._tokenizer.pad_token_id)
            dead[places[revived]] = False
        metrics["dynamic_sampling/attempts"].append(float(attempt))
        metrics["dynamic_sampling/left_dead"].append(dead.float().mean().item())
        alive = ~own(dead, len(output["completion_mask"]))
        output["tool_mask"] = output["tool_mask"] * alive[:, None].to(output["tool_mask"].dtype)
        self._count_loss_tokens(output)
        return output

    # ---- Loss and metrics

    def _compute_loss(self, model: torch.nn.Module, inputs: BatchDict) -> Tensor:
        self._logps = None
        loss: Tensor = super()._compute_loss(model, inputs)
        if self.model.training and STEERED in inputs:
            self._measure_tokens(loss, inputs)
        self._logps = None
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._logps = result[0]
        return result

    def _measure_tokens(self, loss: Tensor, inputs: BatchDict) -> None:
        if self._logps is None:
            raise RuntimeError("TRL computed its loss without log-probabilities.")
        # From the loss back to the log-probabilities only: elementwise, and right whatever the loss type and its clips.
        (pull,) = torch.autograd.grad(loss, self._logps, retain_graph=True)
        batch = (inputs["behavior_logps"], inputs["completion_mask"], inputs[STEERED])
        sums = token_sums(self._logps.detach(), pull, *batch)
        self._token_sums = sums if self._token_sums is None else self._token_sums + sums
        if self.accelerator.sync_gradients:
            for name, value in token_metrics(self.accelerator.reduce(self._token_sums, reduction="sum")).items():
                self._metrics["train"][name].append(value)
            self._token_sums = None

    def _log_rows(self, rows: ScoredRows, advantages: Tensor) -> None:
        """Log metrics and correct the completions table, from the rows of all processes."""
        advantages = self.accelerator.gather(advantages)
        kept = rows.everyone.kept(self._gate)
        for name, value in row_metrics(rows.everyone, kept, rows.rewards, advantages, self.args.generations).items():
            self._metrics["train"][name].append(value)
        logs: Any = self._logs
        overwrite_last(logs["advantages"], advantages)
        for name, column in zip(self.reward_func_names, rows.by_function.unbind(dim=1), strict=True):
            overwrite_last(logs["rewards"][name], column)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
