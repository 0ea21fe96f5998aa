"""Checkpoints from which a resumed run equals one that was not interrupted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.utils import logging
from trl import GRPOConfig

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.steering import SETTINGS_KEY
from qscope_posttrain.provenance import check_resumed
from qscope_posttrain.rl.config import SteeredGRPOConfig
from qscope_posttrain.rl.rollouts.negatives import NegativeSource

logger = logging.get_logger(__name__)

_RECORD = "SteeredGRPOTrainer"  # Name of the record in checkpoints


class SaveBetweenGenerations(TrainerCallback):
    """Puts off a checkpoint that falls inside a generation batch to the end of that batch.

    A run that resumes inside one would generate the rest of the batch anew, from a newer policy. The last checkpoint of
    a training is written where it falls, and so are all with `load_best_model_at_end`, which wants them beside the
    evaluations.
    """

    def __init__(self, args: Any) -> None:
        # The distance between two generations, counted from 0 again in a resumed run.
        micro_batches = args.steps_per_generation * args.num_iterations
        accumulated = args.gradient_accumulation_steps
        self.window = math.lcm(micro_batches, accumulated) // accumulated
        """Optimizer steps after which generation batches and steps end together"""
        self._due = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._due = False
        if state.global_step % self.window and state.is_world_process_zero:
            logger.warning(
                f"the checkpoint of step {state.global_step} lies inside a generation batch of {self.window} steps: "
                "the rest of that batch is generated anew, so that this run will not equal an uninterrupted one."
            )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if args.load_best_model_at_end or state.global_step >= state.max_steps:
            return control
        inside = state.global_step % self.window != 0
        wanted = control.should_save or self._due
        if inside and control.should_save and state.is_world_process_zero:
            end = math.ceil(state.global_step / self.window) * self.window
            logger.info(f"the checkpoint of step {state.global_step} waits for the generation batch to end at {end}.")
        control.should_save = wanted and not inside
        self._due = wanted and inside
        return control


def run_identity(
    args: SteeredGRPOConfig,
    source: NegativeSource | None,
    features: FeatureSet | None,
    rewards: Sequence[tuple[str, float]],
) -> dict[str, Any]:
    """JSON values in which a resumed run must agree with the one before, wherever they were set.

    Args:
        args: settled.
        source: of the negatives, if there are any.
        features: that the negatives are steered by, if there are any.
        rewards: name and weight of each reward function.
    """
    engine = {"rollout_engine": "vllm"} if args.use_vllm else {}  # a seed draws other rollouts in each
    if source is None:  # all else is TRL's, which does not check
        return {"negatives_per_group": 0, "dynamic_sampling": args.dynamic_sampling, **engine}
    names = {field.name for field in fields(SteeredGRPOConfig)} - {field.name for field in fields(GRPOConfig)}
    identity: dict[str, Any] = {name: getattr(args, name) for name in sorted({*names, "seed"})} | engine
    identity["rewards"] = list(rewards)
    identity |= {"window_start": list(source.window_start), "window_length": source.window_length or 0}
    if source.steering is not None:
        (layer,) = source.steering.layers
        identity["steering_layer"], identity["steering_unit"] = layer, source.steering.unit
        identity["steering_strength"] = float(source.steering.strength)
        if features is not None:
            identity["features_sha256"] = _fingerprint(features, layer)
    return dict(json.loads(json.dumps(identity)))


def _fingerprint(features: FeatureSet, layer: int) -> str:
    """Hash of the rows that make the direction, as stored: values computed from them differ in their last bits from
    machine to machine."""
    rows = features.layers[layer]
    chosen = dict(features.settings.get(SETTINGS_KEY, {})).get("label")
    digest = hashlib.sha256(json.dumps([chosen, rows.labels, rows.residual_median_norm]).encode())
    digest.update(rows.decoder.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class SameRun(TrainerCallback):
    """Refuses a checkpoint of a run with other negatives, rewards or seed, and leaves its own record in checkpoints."""

    def __init__(self, identity: dict[str, Any], required: bool) -> None:
        """`identity` as `run_identity` gives it; `required`: whether a checkpoint without a record is refused, too."""
        self._identity, self._required = identity, required

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """ValueError for a checkpoint of another run."""
        records: Any = state.stateful_callbacks
        if self._required or _RECORD in records or state.global_step == 0:
            check_resumed(state, _RECORD, self._identity)
