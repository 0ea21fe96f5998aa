"""Options that would silently erase the negatives, refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.rl.rollouts.options import check_options

if TYPE_CHECKING:
    from qscope_posttrain.rl.config import SteeredGRPOConfig


COPYING = ("seeded", "copied")
"""Negatives that copy a row's own text and need no features"""

_STEERING = ("steering_layer", "steering_strength", "steering_unit", "window_length")
_LARGE = 10**9
_RANGES: dict[str, tuple[float, float]] = {
    "negatives_per_group": (0, _LARGE), "steering_layer": (0, _LARGE), "window_length": (0, _LARGE),
    "probability_floor": (0.0, 1.0), "negative_weight": (0.0, 1e6), "negative_share": (0.0, 1.0),
    "negative_decay_steps": (0, _LARGE), "stop_below": (0.0, 1.0), "stop_window": (1, _LARGE),
    "loop_min_copies": (2, _LARGE), "loop_min_tokens": (1, _LARGE), "copies": (1, _LARGE), "copy_length": (1, _LARGE),
    "soft_overlong_cache": (0, _LARGE), "dynamic_sampling_attempts": (1, 100),
}  # fmt: skip


def check_steering(config: SteeredGRPOConfig) -> None:
    """ValueError for settings of steering where negatives are copied: whoever gives them means to steer."""
    given = [name for name in _STEERING if getattr(config, name) is not None]
    if config.has_negatives and config.negative in COPYING and given:
        raise UserValueError(
            f"negative={config.negative!r} copies text and does not steer, so {', '.join(given)} would do nothing. "
            "Leave that out, or give features (negative='feature') or choose negative='random'."
        )


def check_ranges(config: SteeredGRPOConfig) -> None:
    """ValueError for a number out of its range, TypeError for something else than a number."""
    for name, (low, high) in _RANGES.items():
        value = getattr(config, name)
        if value is None and type(config).__dataclass_fields__[name].default is None:
            continue
        if not isinstance(value, Real) or isinstance(value, bool):
            raise UserTypeError(f"{name} must be a number; got {value!r}.")
        number: Any = value
        if not low <= number <= high:
            raise UserValueError(f"{name} must lie between {low} and {high}; got {value}.")
        if isinstance(low, int) and number % 1:
            raise UserValueError(f"{name} must be a whole number; got {value}.")
    window, marks = config.window_start, config.copy_boundary
    numbers = window if isinstance(window, (list, tuple)) and all(isinstance(n, Real) for n in window) else ()
    if window is not None and not (
        len(numbers) == 2 and 0 <= numbers[0] <= numbers[1] and all(n == int(n) for n in numbers)
    ):
        raise UserValueError(
            f"window_start is two whole numbers, the first and the last token to start at; got {window!r}."
        )
    if not isinstance(marks, (list, tuple)) or not all(isinstance(mark, str) and mark for mark in marks):
        raise UserTypeError(f"copy_boundary must be a list of texts, none of them empty; got {marks!r}.")


def check_compatible(config: SteeredGRPOConfig) -> None:
    """ValueError for a combination of options under which negatives would have no or another effect.

    Nothing is refused when there are no negatives: then the trainer is TRL's.
    """
    if config.loss_type == "cispo" and config.epsilon_high is not None and config.epsilon_high < 1:
        raise UserValueError(
            f"loss_type='cispo' takes epsilon_high as the largest weight of a token, not as the width of a clip: "
            f"{config.epsilon_high} would shrink every token. Set epsilon_high to 5 or so, as TRL suggests."
        )
    if not config.has_negatives:
        if config.dynamic_sampling:
            _check_dynamic_sampling(config)
        return
    if config.generations - config.negatives_per_group < 2:
        raise UserValueError(
            f"negatives_per_group={config.negatives_per_group} of num_generations={config.num_generations} leaves "
            "fewer than 2 ordinary rows in a group, and their rewards could not be compared. Take more generations."
        )
    # A repeated piece has at least one token.
    shortest = max(config.loop_min_tokens, config.loop_min_copies)
    if config.gate == "drop" and shortest > config.completion_limit:
        raise UserValueError(
            f"loop_min_tokens={config.loop_min_tokens} or loop_min_copies={config.loop_min_copies} is more than "
            f"max_completion_length={config.max_completion_length}: no completion could be an endless repetition, "
            "and gate='drop' would drop all negatives."
        )
    if config.use_transformers_continuous_batching:
        raise UserValueError(
            "use_transformers_continuous_batching=True mixes the rows of a batch at every step, so that a negative "
            "cannot be told from an ordinary row while it is generated. Set it to False."
        )
    if config.use_vllm:
        raise UserValueError(
            "use_vllm=True generates outside of the torch model, where steering does not reach. Set use_vllm=False, or "
            "negatives_per_group=0 for plain DAPO."
        )
    if config.off_policy_mask_threshold is not None:
        raise UserValueError(
            "off_policy_mask_threshold drops rows of negative advantage as soon as the policy has moved away from "
            "them, which is what a negative is there to achieve. Leave it at None."
        )
    if config.importance_sampling_level == "sequence" and config.old_logps == "behaviour":
        raise UserValueError(
            "importance_sampling_level='sequence' with old_logps='behaviour' weighs a whole negative by the ratio of "
            "the policy to the steered distribution, which is near 0: it would be clipped away. Use old_logps='policy' "
            "or importance_sampling_level='token'."
        )
    if config.loss_type == "vespo":
        raise UserValueError(
            "loss_type='vespo' reshapes the weight of a whole row by its ratio and erases rows far from the policy. "
            "Use 'dapo' (or grpo, bnpo, dr_grpo, cispo, sapo)."
        )
    if config.top_entropy_quantile < 1.0:
        raise UserValueError(
            f"top_entropy_quantile={config.top_entropy_quantile} keeps only uncertain tokens in the loss, and the "
            "tokens of an endless repetition are certain. Set it to 1.0."
        )
    if config.cache_implementation not in (None, "dynamic"):
        raise UserValueError(
            f"cache_implementation={config.cache_implementation!r} compiles the decoding step without the steering "
            "hooks' row positions. Leave it at None."
        )
    given: Any = config.generation_kwargs
    check_options(given or {}, {"temperature": config.temperature, "max_new_tokens": config.completion_limit})
    if config.dynamic_sampling:
        _check_dynamic_sampling(config)


def _check_dynamic_sampling(config: SteeredGRPOConfig) -> None:
    if config.multi_objective_aggregation != "sum_then_normalize" or config.scale_rewards == "batch":
        raise UserValueError(
            "dynamic_sampling replaces single groups, so advantages must be formed within each group: use "
            "multi_objective_aggregation='sum_then_normalize' and scale_rewards 'group' or 'none'."
        )


def check_trainer_arguments(has_negatives: bool, dynamic_sampling: bool, arguments: Mapping[str, Any]) -> None:
    """ValueError for arguments of the trainer under which a row of the batch is not one generation."""
    if not (has_negatives or dynamic_sampling):
        return
    for name in ("tools", "rollout_func", "environment_factory"):
        if arguments.get(name) is not None:
            raise UserValueError(
                f"{name} generates rows in an order or number of its own, so that negatives cannot be told from "
                "ordinary rows. Leave it out, or set negatives_per_group=0 and dynamic_sampling=False."
            )
