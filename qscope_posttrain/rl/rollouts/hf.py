"""Generate a batch with the model's own `generate`, some of its rows as negatives."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.steering import SETTINGS_KEY, feature_steering
from qscope_posttrain.models.layers import check_layers, text_config, unwrapped
from qscope_posttrain.models.positions import check_counted
from qscope_posttrain.models.steering import Steering, Window, steer
from qscope_posttrain.rl.config import SteeredGRPOConfig, check_window
from qscope_posttrain.rl.rollouts.copying import CopyRule, boundary_tokens
from qscope_posttrain.rl.rollouts.generation_tap import GenerationTap, generation_tap
from qscope_posttrain.rl.rows import RowPlan


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


@contextmanager
def negative_rollout(
    source: NegativeSource, plan: RowPlan, model: nn.Module, temperature: float
) -> Iterator[GenerationTap]:
    """Inside the block, `model.generate` makes the rows of `plan` negatives and leaves the others bit-identical.

    Args:
        plan: which rows of the batch, at least one, and when.
        model: the model that generates, plain or wrapped.
        temperature: of the sampling, for the log-probabilities that the tap records.
    """
    model = unwrapped(model)
    rows, count = plan.negative.nonzero().squeeze(1), len(plan.negative)
    if source.is_boundary is not None:
        device = next(model.parameters()).device
        start = plan.start[rows].to(device)
        rule = CopyRule(source.is_boundary.to(device), start, source.copies, source.copy_length)
        with generation_tap(model, rows, temperature, rule, batch_rows=count) as tap:
            yield tap
    if source.steering is None:
        return
    steering = replace(
        source.steering,
        direction=_random_directions(source.steering, plan) if source.random else source.steering.direction,
        positions=Window(start=plan.start, length=source.window_length),
        rows=plan.negative,
    )
    # A batch whose rows all end with their first token is rare, but no fault.
    with (
        steer(model, steering, require_generated=False),
        generation_tap(model, rows, temperature, batch_rows=count) as tap,
    ):
        yield tap
    if tap.reads_everything_again:
        raise RuntimeError(
            "The model generated without a cache and read the whole text at every token, so that steering could not "
            "distinguish generated tokens from the prompt and did nothing. Leave use_cache on."
        )


def _random_directions(steering: Steering, plan: RowPlan) -> Tensor:
    """[rows, d_model] directions of the length of the steering's, one per row, whatever process generates it."""
    drawn = []
    for row in range(len(plan.negative)):
        generator = torch.Generator().manual_seed(plan.draw + plan.first + row)
        drawn.append(torch.randn(steering.direction.shape[-1], generator=generator))
    directions = torch.stack(drawn)
    return directions * (steering.direction.float().norm().cpu() / directions.norm(dim=1, keepdim=True))
