"""Recipe of the negatives of a run, and the interface of the engines that generate them."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.steering import SETTINGS_KEY, feature_steering
from qscope_posttrain.models.layers import check_layers, text_config
from qscope_posttrain.models.positions import check_counted
from qscope_posttrain.models.steering import Steering
from qscope_posttrain.rl.config import SteeredGRPOConfig, check_window
from qscope_posttrain.rl.rollouts.copying import boundary_tokens
from qscope_posttrain.rl.rows import RowPlan


class Rollout(Protocol):
    """The negatives of a batch that an engine has generated, those of this process, in their order."""

    def check_tokens(self, completion_ids: Tensor, completion_mask: Tensor) -> None:
        """RuntimeError unless the negatives are the rows that came out as such, both [rows, length]."""

    def log_probabilities(self, completion_ids: Tensor) -> Tensor:
        """[rows, length] of the tokens under the distribution they were drawn from; NaN where it is not known."""


class Engine(Protocol):
    """Generates batches with negatives among their rows, inside TRL's own generation."""

    def rollout(self, plan: RowPlan) -> AbstractContextManager[Rollout | None]:
        """Inside the block, TRL's generation makes the rows of `plan` negatives; None without one on this process."""


@dataclass(frozen=True, eq=False)
class NegativeSource:
    """Recipe of the negatives: a steering, or copies of a row's own text."""

    steering: Steering | None  # Direction, layer and strength, without rows and window; None for copies
    window_start: tuple[int, int]  # First and last generated token at which steering or copying may start
    window_length: int | None = None  # Steered tokens; None: to the end
    random: bool = False  # Whether each row is steered along a fresh random direction of the same length
    is_boundary: Tensor | None = None  # [vocabulary] bool for copying
    copies: int = 0  # Copies of a piece before the model goes on
    copy_length: int = 0  # Maximum number of tokens of a piece


def negative_source(
    config: SteeredGRPOConfig, features: FeatureSet | None, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> NegativeSource:
    """The negatives that `config` and `features` describe, checked against the model.

    Raises:
        ValueError: features are missing or belong to another model, or neither they nor the config say where, how
            strongly or when to steer.
    """
    config = config.settled(features is not None)
    if not config.is_steered:
        first, last = config.window_start or [0, 0]
        boundaries = boundary_tokens(tokenizer, config.copy_boundary, text_config(model).vocab_size)
        return NegativeSource(
            None, (first, last), is_boundary=boundaries, copies=config.copies, copy_length=config.copy_length
        )
    steering = _steering(config, features, model)
    if not steering.strength:
        raise UserValueError(
            "steering_strength=0 steers nothing, and negatives would be ordinary rows. Give another strength, or set "
            "negatives_per_group=0 for plain DAPO."
        )
    check_layers(model, steering.layers)
    check_counted(model)
    recorded = dict(features.settings.get(SETTINGS_KEY, {})) if features is not None else {}
    if config.negative == "feature" and recorded.get("specific") is False:
        warnings.warn(
            "These features are recorded as not specific: steering with them did not make the model loop clearly more "
            "often than random directions of the same length. Negatives made with them prove nothing "
            "about the features.",
            stacklevel=3,
        )
    start = config.window_start if config.window_start is not None else recorded.get("window_start")
    length = config.window_length if config.window_length is not None else recorded.get("window_length")
    if start is None or length is None:
        missing = " and ".join(["window_start"] * (start is None) + ["window_length"] * (length is None))
        found = ", or find the features with `qscope features find-repetition`, which chooses them"
        raise UserValueError(
            f"The negatives need {missing}, set or recorded with features. window_start=[4, 9] and window_length=30 "
            f"steer some thirty tokens, [0, 0] and 0 steer to the end{found if features is not None else ''}."
        )
    check_window(config, (int(start[0]), int(start[1])))
    return NegativeSource(
        steering, (int(start[0]), int(start[1])), int(length) or None, random=config.negative == "random"
    )


def _steering(config: SteeredGRPOConfig, features: FeatureSet | None, model: nn.Module) -> Steering:
    if features is not None:
        features.check_model(model)
        return feature_steering(
            features, layer=config.steering_layer, strength=config.steering_strength, unit=config.steering_unit
        )
    if config.steering_layer is None or config.steering_strength is None or config.steering_unit in (None, "relative"):
        raise UserValueError(
            "negative='random' without features needs steering_layer, steering_strength, steering_unit='norm' (or "
            "'raw') and, unless mode='paper', window_start and window_length; with features it takes theirs."
        )
    direction = torch.ones(text_config(model).hidden_size)
    return Steering(direction, (config.steering_layer,), config.steering_strength, unit="norm")


def planned_steering(source: NegativeSource, plan: RowPlan) -> Steering | None:
    """The steering of `source`, without rows and window, along what the rows of `plan` are steered; None for copies.

    Where it is random, its direction is [rows, d_model], the same for a row whatever process or engine generates it.
    """
    steering = source.steering
    if steering is None or not source.random:
        return steering
    drawn = []
    for row in range(len(plan.negative)):
        generator = torch.Generator().manual_seed(plan.draw + plan.first + row)
        drawn.append(torch.randn(steering.direction.shape[-1], generator=generator))
    directions = torch.stack(drawn)
    length = steering.direction.float().norm().cpu()
    return replace(steering, direction=directions * (length / directions.norm(dim=1, keepdim=True)))
