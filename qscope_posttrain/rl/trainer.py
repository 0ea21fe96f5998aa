"""TRL's `GRPOTrainer` with one steered negative in each group."""

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
from qscope_posttrain.rl.checkpoints import SameRun, SaveBetweenGenerations, generation_window, run_identity
from qscope_posttrain.rl.checks import check_trainer_arguments
from qscope_posttrain.rl.config import SteeredGRPOConfig
from qscope_posttrain.rl.dynamic_sampling import BatchDict, DynamicSampling, replace_rows, rows_to_redraw
from qscope_posttrain.rl.metrics import overwrite_last, row_metrics, token_metrics, token_sums
from qscope_posttrain.rl.prompts import check_data, check_inputs
from qscope_posttrain.rl.rewards import check_reward_data
from qscope_posttrain.rl.rollouts.generation_tap import GenerationTap
from qscope_posttrain.rl.rollouts.hf import NegativeSource, negative_rollout, negative_source
from qscope_posttrain.rl.rollouts.options import check_trainer_generation
from qscope_posttrain.rl.rows import RowPlan, negative_loss_mask, ordinary_plan, plan_rows
from qscope_posttrain.rl.schedule import NegativeSchedule
from qscope_posttrain.rl.scored import RowFacts, ScoredRows, dead_groups, excluded_advantages, find_tails, total_rewards

STEERED = "steered"
"""Key of the row flag: in the inputs of reward functions, and in the batch of the loss."""


class SteeredGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` for which the last row of each group is generated as a negative example.

    The negative is scored by the same reward functions and, unless configured otherwise, weighted by the unsteered
    policy (Qwen-Scope report, Eq. 28). All else is TRL's: with `negatives_per_group=0` the trajectory is bit-identical
    to that of `GRPOTrainer` with the same values, DAPO's `epsilon_high` and soft overlong punishment among them. In
    evaluation no row is ever steered.

    Reward functions get a keyword `steered`, one flag a row. TRL's reward metrics then describe the rows that
    are part of the group statistics, its `completions/...` all rows; `ordinary/...` and `negative/...` describe the two
    kinds apart.

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
            `generate` under which rows cannot be told apart; prompts that cannot be read.

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
    _logps: Tensor | None
    _token_sums: Tensor | None

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
        check_trainer_arguments(args.has_negatives, args.dynamic_sampling, arguments)
        self._negatives = args.negative_settings
        schedule = NegativeSchedule(args.negative_share, args.negative_decay_steps, args.stop_below, args.stop_window)
        own: list[TrainerCallback] = [schedule]
        if args.has_negatives:
            own.append(SaveBetweenGenerations(generation_window(args)))
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
        super().__init__(
            model, rewards, args, callbacks=[*(callbacks or []), *own], reward_processing_classes=classes, **arguments
        )
        args.reward_weights = weights
        self._source: NegativeSource | None = None
        if args.has_negatives:
            self._source = negative_source(args, features, self.model, self._tokenizer)
            check_trainer_generation(self, steered=args.is_steered)
        self._dynamic = DynamicSampling(self.train_dataset) if args.dynamic_sampling else None
        check_data(self, STEERED)
        check_reward_data(self.reward_funcs, self.train_dataset)
        weighted = list(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
        self.add_callback(SameRun(run_identity(args, self._source, features, weighted), required=args.has_negatives))
        self._plan = ordinary_plan(0)
        self._tap: GenerationTap | None = None
        self._rows: ScoredRows | None = None
        self._logps = self._token_sums = None

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As `GRPOTrainer.train`. A second call starts anew: with negatives again, from a fresh generation batch."""
        if self.args.has_negatives:
            self._schedule.start()
            self._step, self._buffered_inputs = 0, None
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
        self._tap = None
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
        share = self._schedule.share_at(self.state.global_step)
        if self._source is None or share == 0.0:
            return ordinary_plan(rows)
        return plan_rows(
            rows,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            group_size=self.args.generations,
            negatives_per_group=self.args.negatives_per_group,
            share=share,
            window_start=self._source.window_start,
            seed=self.args.seed,
            step=self.state.global_step,
            part=self._part_of_step,
            attempt=attempt,
        )

    @property
    def _part_of_step(self) -> int:
        """Number of the micro-batch within the optimiser step: a step may take several generation batches."""
        return int(self._step % self.args.gradient_accumulation_steps)

    def _generate(self, prompts: list[Any]) -> Any:
        if self._source is None or not bool(self._plan.negative.any()):
            return super()._generate(prompts)
        model = self.accelerator.unwrap_model(self.model)
        with negative_rollout(self._source, self._plan, model, self.temperature) as self._tap:
            return super()._generate(prompts)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's rewards [rows of all processes, functions], NaN for rows outside of their group's statistics."""
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rows = self._score_rows(completion_ids_list, rewards)
        if self.args.has_negatives:  # of every batch: the table of completions needs columns of one length
            self._log_completion_extra("steered", rows.mine.negative.tolist())
            self._log_completion_extra("looped", rows.mine.looped.tolist())
        if not self.model.training:
            return rewards
        self._rows = rows
        if not self._plan.in_batch:
            return rewards
        excluded = self._negatives.baseline == "exclude"
        outside = rows.everyone.negative if excluded else ~rows.everyone.kept(self._negatives.gate)
        return rewards.masked_fill(outside[:, None], torch.nan)

    def _score_rows(self, completions: Sequence[Sequence[int]], rewards: Tensor) -> ScoredRows:
        tails = find_tails(
            completions, self.args.completion_limit, self.eos_token_ids, min_copies=self.args.loop_min_copies,
            min_tokens=self.args.loop_min_tokens,
        )  # fmt: skip
        end_tokens = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        mine = RowFacts.of(completions, tails, self._plan.negative.to(rewards.device), end_tokens)
        total = total_rewards(rewards, self.reward_weights.to(rewards.device))
        return ScoredRows(tails, mine, mine.gathered(), total, rewards)

    @property
    def _schedule(self) -> NegativeSchedule:
        # Looked up each time: transformers may put a restored one in its place.
        return next(c for c in self.callback_handler.callbacks if isinstance(c, NegativeSchedule))

    def _enter_negatives(self, output: BatchDict, rows: ScoredRows, plan: RowPlan, mask_truncated: bool) -> None:
        """Write into TRL's batch which rows are negatives, what they weigh, and what of them is in the loss."""
        settings, negative = self._negatives, rows.mine.negative
        kept = rows.mine.kept(settings.gate)
        if mask_truncated and plan.in_batch:
            hidden = rows.mine.truncated & ~negative
            output["completion_mask"] = output["completion_mask"] * (~hidden).unsqueeze(1).int()
        behaviour = torch.zeros_like(output["completion_ids"], dtype=torch.float32)
        if self._tap is not None:
            self._tap.check_tokens(output["completion_ids"][negative], output["completion_mask"][negative])
            drawn = self._tap.log_probabilities(output["completion_ids"][negative])
            # What follows the end of a row was not drawn: where it should have copied, log 0 would turn sums to nan.
            behaviour[negative] = drawn.masked_fill(output["completion_mask"][negative] == 0, 0.0)
            self._tap = None
        policy = output.get("old_per_token_logps")
        # Batches with and without negatives are merged under dynamic sampling, and must hold the same tensors.
        may_matter = plan.in_batch or self._dynamic is not None
        if policy is None and may_matter and (settings.tokens == "likely" or settings.old_logps == "behaviour"):
            policy = self._policy_logps(output)
        if policy is not None and settings.old_logps == "behaviour":
            output["old_per_token_logps"] = torch.where(negative[:, None], behaviour, policy)

        advantages = output["advantages"]
        if settings.baseline == "exclude":
            everyone = excluded_advantages(
                rows.rewards, rows.everyone.negative, self.args.generations, self.scale_rewards != "none"
            )
            own = everyone[self._local(len(negative))] * kept
            advantages = torch.where(negative, own, advantages)
        output["advantages"] = torch.where(negative, settings.weight * advantages, advantages)

        output["tool_mask"] = negative_loss_mask(
            output["completion_mask"], negative, kept, rows.tails, settings.tokens if may_matter else "all",
            policy_logps=policy, floor=self.args.probability_floor,
        )  # fmt: skip
        output[STEERED], output["behaviour_logps"] = negative, behaviour
        self._count_loss_tokens(output)

    def _count_loss_tokens(self, output: BatchDict) -> None:
        in_loss = (output["completion_mask"] * output["tool_mask"]).sum()
        output["num_items_in_batch"] = self.accelerator.gather(in_loss).sum()

    @torch.no_grad()
    def _policy_logps(self, output: BatchDict) -> Tensor:
        """[rows, length] log-probabilities of the completions under the unsteered policy that generated them."""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        length = output["completion_ids"].shape[1]
        # All rows, also where a process has no negative: sharded models need every process in every forward.
        batch_size = self.args.per_device_train_batch_size
        return self._get_per_token_logps_and_entropies(self.model, ids, attention, length, batch_size)[0]

    def _local(self, rows: int) -> slice:
        first = self.accelerator.process_index * rows
        return slice(first, first + rows)

    # ---- Dynamic sampling

    def _redraw_dead_groups(self, output: BatchDict, dead: Tensor, dynamic: DynamicSampling) -> BatchDict:
        """Replace dead groups by living ones of further attempts; those that stay dead leave the loss."""
        processes, mine = self.accelerator.num_processes, self.accelerator.process_index
        self._metrics["train"]["dynamic_sampling/dead_groups"].append(dead.float().mean().item())
        attempt = 0
        while bool(dead.any()) and attempt < self.args.dynamic_sampling_attempts:
            attempt += 1
            rows = rows_to_redraw(dead, self.args.generations, processes, mine)
            total = len(rows) * processes
            seed = (self.args.seed, self.state.global_step, self._part_of_step, attempt)
            inputs = dynamic.prompts(len(rows), mine * len(rows), total, self.args.generations, seed)
            other, other_dead = self._generate_and_score_attempt(inputs, attempt)
            redrawn = dead.nonzero().squeeze(1) if total < dead.numel() * self.args.generations else None
            places = torch.arange(len(dead), device=dead.device) if redrawn is None else redrawn
            revived = dead[places] & ~other_dead
            own = revived.repeat_interleave(self.args.generations)[self._local(len(rows))]
            output = replace_rows(output, rows[own], other, own.nonzero().squeeze(1), self._tokenizer.pad_token_id)
            dead[places[revived]] = False
        self._metrics["train"]["dynamic_sampling/attempts"].append(float(attempt))
        self._metrics["train"]["dynamic_sampling/left_dead"].append(dead.float().mean().item())
        alive = ~dead.repeat_interleave(self.args.generations)[self._local(len(output["completion_mask"]))]
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
        sums = token_sums(
            self._logps.detach(), pull, inputs["behaviour_logps"], inputs["completion_mask"], inputs[STEERED],
            self.args.probability_floor,
        )  # fmt: skip
        self._token_sums = sums if self._token_sums is None else self._token_sums + sums
        if self.accelerator.sync_gradients:
            for name, value in token_metrics(self.accelerator.reduce(self._token_sums, reduction="sum")).items():
                self._metrics["train"][name].append(value)
            self._token_sums = None

    def _log_rows(self, rows: ScoredRows, advantages: Tensor) -> None:
        """Metrics, the schedule's record, and the completions table, from the rows of all processes."""
        advantages = self.accelerator.gather(advantages)
        kept = rows.everyone.kept(self._negatives.gate)
        for name, value in row_metrics(rows.everyone, kept, rows.rewards, advantages, self.args.generations).items():
            self._metrics["train"][name].append(value)
        self._schedule.record(rows.everyone.looped[rows.everyone.negative].tolist(), self.state.global_step)
        logs: Any = self._logs
        overwrite_last(logs["advantages"], advantages)
        for name, column in zip(self.reward_func_names, rows.by_function.unbind(dim=1), strict=True):
            overwrite_last(logs["rewards"][name], column)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
