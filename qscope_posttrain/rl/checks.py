"""Checks of settings: ranges, and combinations that would silently erase the negatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.rl.rollouts.options import check_options

if TYPE_CHECKING:
    from qscope_posttrain.rl.config import SteeredGRPOConfig

_LARGE = 10**9
_RANGES: dict[str, tuple[float, float]] = {
    "negatives_per_group": (0, _LARGE),
    "steering_layer": (0, _LARGE),
    "window_length": (0, _LARGE),
    "negative_weight": (0.0, 1e6),
    "loop_min_copies": (2, _LARGE),
    "loop_min_tokens": (1, _LARGE),
    "copies": (1, _LARGE),
    "copy_length": (1, _LARGE),
    "soft_overlong_cache": (0, _LARGE),
    "dynamic_sampling_attempts": (1, 100),
}
# Option -> whether a value leaves negatives what they are, and why others do not.
_ERASING: dict[str, tuple[Any, str]] = {
    "use_transformers_continuous_batching": (
        (False,),
        "mixes the rows of a batch at every step, so that a negative cannot be distinguished from an ordinary row "
        "while it is generated. Set it to False.",
    ),
    "use_vllm": (
        (False,),
        "generates outside of the torch model, where steering does not reach. Set use_vllm=False, or "
        "negatives_per_group=0 for plain DAPO.",
    ),
    "off_policy_mask_threshold": (
        (None,),
        "drops rows of negative advantage as soon as the policy has moved away from them, which is the purpose of a "
        "negative. Leave it at None.",
    ),
    "top_entropy_quantile": (
        (1.0,),
        "keeps only uncertain tokens in the loss, and the tokens of an endless repetition are certain. Set it to 1.0.",
    ),
    "cache_implementation": (
        (None, "dynamic"),
        "compiles the decoding step without the steering hooks' row positions. Leave it at None.",
    ),
}


def check_steering(config: SteeredGRPOConfig) -> None:
    """ValueError for settings of steering where negatives are seeded: whoever gives them means to steer."""
    names = ("steering_layer", "steering_strength", "steering_unit", "window_length")
    given = [name for name in names if getattr(config, name) is not None]
    if config.has_negatives and config.negative == "seeded" and given:
        raise UserValueError(
            f"negative='seeded' copies text and does not steer, so {', '.join(given)} would do nothing. Leave that "
            "out, or give features (negative='feature') or choose negative='random'."
        )


def check_ranges(config: SteeredGRPOConfig) -> None:
    """ValueError for a number out of its range, TypeError for something else than a number."""
    for name, (low, high) in _RANGES.items():
        value: Any = getattr(config, name)
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
    whole = len(numbers) == 2 and 0 <= numbers[0] <= numbers[1] and all(n == int(n) for n in numbers)
    if window is not None and not whole:
        raise UserValueError(
            f"window_start is two whole numbers, the first and the last token to start at; got {window!r}."
        )
    if not isinstance(marks, (list, tuple)) or not all(isinstance(mark, str) and mark for mark in marks):
        raise UserTypeError(f"copy_boundary must be a list of texts, none of them empty; got {marks!r}.")
    if config.soft_overlong_cache is not None and config.soft_overlong_cache > config.completion_limit:
        raise UserValueError(
            f"soft_overlong_cache={config.soft_overlong_cache} is more than "
            f"max_completion_length={config.max_completion_length}, the tokens that it is a part of."
        )


def check_window(config: SteeredGRPOConfig, start: Sequence[int]) -> None:
    """ValueError if a window may start where nothing is left to be generated."""
    if start[1] >= config.completion_limit - 1 and start[1] > 0:
        raise UserValueError(
            f"window_start={list(start)} reaches to the last of max_completion_length={config.max_completion_length} "
            "tokens, so that a negative could be an ordinary row. Start earlier."
        )


def check_compatible(config: SteeredGRPOConfig) -> None:
    """ValueError for a combination of options under which negatives would have no or another effect.

    Without negatives the trainer is TRL's, and only its own traps are refused.
    """
    if config.loss_type == "cispo" and config.epsilon_high is not None and config.epsilon_high < 1:
        raise UserValueError(
            f"loss_type='cispo' takes epsilon_high as the largest weight of a token, not as the width of a clip: "
            f"{config.epsilon_high} would shrink every token. Set epsilon_high to 5 or so, as TRL suggests."
        )
    within_groups = config.multi_objective_aggregation == "sum_then_normalize" and config.scale_rewards != "batch"
    if config.dynamic_sampling and not within_groups:
        raise UserValueError(
            "dynamic_sampling replaces single groups, so advantages must be formed within each group: use "
            "multi_objective_aggregation='sum_then_normalize' and scale_rewards 'group' or 'none'."
        )
    if not config.has_negatives:
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
    if config.loss_type == "vespo":
        raise UserValueError(
            "loss_type='vespo' reshapes the weight of a whole row by its ratio and erases rows far from the policy. "
            "Use 'dapo' (or grpo, bnpo, dr_grpo, cispo, sapo)."
        )
    for name, (harmless, reason) in _ERASING.items():
        if getattr(config, name) not in harmless:
            raise UserValueError(f"{name}={getattr(config, name)!r} {reason}")
    given: Any = config.generation_kwargs
    check_options(given or {}, {"temperature": config.temperature, "max_new_tokens": config.completion_limit})


def check_trainer_arguments(config: SteeredGRPOConfig, arguments: Mapping[str, Any]) -> None:
    """ValueError for arguments of the trainer under which a row of the batch is not one generation."""
    if not (config.has_negatives or config.dynamic_sampling):
        return
    for name in ("tools", "rollout_func", "environment_factory"):
        if arguments.get(name) is not None:
            raise UserValueError(
                f"{name} generates rows in an order or number of its own, so that negatives cannot be distinguished "
                "from ordinary rows. Leave it out, or set negatives_per_group=0 and dynamic_sampling=False."
            )
