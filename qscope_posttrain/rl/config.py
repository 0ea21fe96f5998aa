"""Settings of DAPO with negative examples, beside those of TRL's GRPO."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, get_args

from transformers.trainer_pt_utils import AcceleratorConfig
from trl import GRPOConfig

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.rl.rollouts.options import check_options
from qscope_posttrain.rl.rollouts.vllm_options import check_vllm_settings

Mode = Literal["default", "paper"]
Negative = Literal["feature", "random", "seeded"]
Gate = Literal["drop", "keep"]
NegativeTokens = Literal["all", "tail"]

PRESETS: dict[str, dict[str, Any]] = {
    "default": {"gate": "drop", "negative_tokens": "tail", "negative_weight": 1.0},
    "paper": {
        "window_start": [0, 0],
        "window_length": 0,
        "gate": "keep",
        "negative_tokens": "all",
        "negative_weight": 1.0,
    },
}
"""Values that each mode gives to the fields that are None"""
_ONLY_IN_PAPER = {"negative": "feature", "negatives_per_group": 1, "dynamic_sampling": False}
_CHOICES: dict[str, tuple[str, ...]] = {
    "negative": get_args(Negative),
    "gate": get_args(Gate),
    "negative_tokens": get_args(NegativeTokens),
    "steering_unit": ("raw", "norm", "relative"),
}

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


@dataclass
class SteeredGRPOConfig(GRPOConfig):
    """`GRPOConfig` with DAPO's defaults, and a negative example in each group.

    DAPO (arXiv 2503.14476): token-level loss, clip 0.2 below and 0.28 above, no KL term, soft overlong punishment.

    `mode` fills in the fields that are None below. "paper" is Algorithm 1 of the Qwen-Scope report (section 8): the
    last row of each group is steered at every generated token, and enters its group's statistics and the loss whole.
    "default" differs where our experiments say so (docs/results/dapo.md): the steering stops
    after a window; a row that did not end up in a loop is dropped; of one that did, only the repeats are in the loss.
    There a seeded negative, which needs no SAE, left far fewer loops than a steered one at about the same accuracy; it
    is the default of a trainer without features.

    Raises:
        ValueError: a value out of range, a combination that would silently erase the negatives, or a field that
            contradicts mode="paper".

    Example:
        >>> config = qp.SteeredGRPOConfig(folder, num_generations=4, max_completion_length=256, bf16=False)
        >>> config.negatives_per_group, config.negative_tokens
        (1, 'tail')
    """

    epsilon_high: float | None = 0.28
    """Upper clip of the ratio; 0.28 is DAPO's. The lower one is `epsilon`."""
    soft_overlong_cache: int | None = None
    """Tokens at the end of max_completion_length over which a reward falls linearly from 0 to -1 (DAPO, eq. 13). None:
    a fifth of max_completion_length, as in DAPO; 0: no such reward."""
    mode: Mode = "default"
    """Values of the fields left open: 'default' are the package's, 'paper' the report's."""
    negative: Negative | None = None
    """How a negative is made: steered by the features (feature), steered by a fresh random direction of the same length
    (random), or, without any SAE, by repeating a piece of the row's own text `copies` times before the model goes on
    (seeded). None: feature where features are given, else seeded."""
    negatives_per_group: int = 1
    """Number of negatives per group (its last rows). 0 is plain DAPO."""
    steering_layer: int | None = None
    """Decoder layer, from 0; None: the one recorded with the features."""
    steering_strength: float | None = None
    """Length of the steering vector in steering_unit; None: as recorded."""
    steering_unit: Literal["raw", "norm", "relative"] | None = None
    """Vector of strength 1: the direction as it is (raw), of length 1 (norm), or of the median norm of that layer's
    residual stream (relative). None: as recorded."""
    window_start: list[int] | None = None
    """Steering or copying starts at a generated token drawn per row between these two numbers, both included. None: as
    recorded with the features; 0 0 for mode='paper'; the first eighth of the completion for 'seeded'."""
    window_length: int | None = None
    """Number of steered tokens, after which the model runs free; 0: to the end. None: as recorded."""
    gate: Gate | None = None
    """Treatment of a negative that is no endless repetition: removed from the loss and from its group's statistics
    (drop), or treated like any row (keep)."""
    negative_tokens: NegativeTokens | None = None
    """Tokens of a negative in the loss: all, or tail: the repeats, from the second copy on."""
    negative_weight: float | None = None
    """Factor on the advantage of a negative."""
    loop_min_copies: int = 4
    """Full copies at the end that make an unfinished completion an endless repetition."""
    loop_min_tokens: int = 12
    """Minimum number of tokens that those copies cover together."""
    copies: int = 2
    """For negative='seeded': copies of the piece before the model goes on by itself."""
    copy_boundary: list[str] = field(default_factory=lambda: ["\n", ".", "!", "?", ";", "。", "！", "？", "；"])
    """For negative='seeded': a token with one of these ends the piece that is copied."""
    copy_length: int = 32
    """For negative='seeded': tokens after which a piece ends without a boundary."""
    dynamic_sampling: bool = False
    """DAPO's dynamic sampling: draw groups again, with other prompts, whose ordinary rows all have the same reward."""
    dynamic_sampling_attempts: int = 3
    """Number of redraws; groups that are still without a signal leave the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_mode()
        if self.mode == "paper":
            self.negative = "feature"
        for name, value in PRESETS[self.mode].items():
            if getattr(self, name) is None:
                setattr(self, name, list(value) if isinstance(value, list) else value)
        if self.soft_overlong_cache is None:
            self.soft_overlong_cache = self.completion_limit // 5
        self._check_values()

    def settled(self, has_features: bool) -> SteeredGRPOConfig:
        """A copy in which `negative` is decided; this config stays as it is.

        The copy shares no list or dictionary with this one: the trainer works on it, and trainers write into their
        settings.

        Raises:
            ValueError: features that the negatives make no use of, or lack; and whatever the class refuses.
        """
        if has_features and self.has_negatives and self.negative == "seeded":
            raise UserValueError(
                "negative='seeded' makes negatives without features, and features were given. Leave the features out, "
                "or leave negative open to steer by them."
            )
        settled = copy.copy(self)
        vars(settled).update({name: _unshared(value) for name, value in vars(self).items()})
        settled._check_mode()  # a field may have been set since the config was made
        if settled.negative is None:
            settled.negative = "feature" if has_features or self.mode == "paper" else "seeded"
        if settled.has_negatives and settled.negative == "feature" and not has_features:
            raise UserValueError(
                "negative='feature' needs features: pass features=FeatureSet (see `qscope features find-repetition`), "
                "or choose negative='seeded', which needs none."
            )
        check_steering(settled)
        settled._check_values()
        return settled

    @property
    def has_negatives(self) -> bool:
        """Whether any group can hold a negative."""
        return self.negatives_per_group > 0

    @property
    def is_steered(self) -> bool:
        """Whether negatives come from steering, as opposed to copying; see `settled`."""
        return self.has_negatives and self.negative in ("feature", "random")

    @property
    def generations(self) -> int:
        """Rows in a group."""
        if self.num_generations is None:
            raise UserValueError("num_generations must be a number.")
        return self.num_generations

    @property
    def completion_limit(self) -> int:
        """Maximum number of tokens of a completion."""
        if self.max_completion_length is None:
            raise UserValueError(
                "max_completion_length must be a number: an endless repetition has to be cut somewhere."
            )
        return self.max_completion_length

    def _check_mode(self) -> None:
        """mode='paper' is one method: a field that says otherwise is a mistake, not an option."""
        if self.mode not in PRESETS:
            raise UserValueError(f"mode must be one of {', '.join(PRESETS)}; got {self.mode!r}.")
        if self.mode != "paper":
            return
        for name, value in {**PRESETS["paper"], **_ONLY_IN_PAPER}.items():
            given = getattr(self, name)
            if given is not None and given != value:
                raise UserValueError(
                    f"mode='paper' is the report's method as written, with {name}={value!r}; got {given!r}. Leave it "
                    "out, or use mode='default' and set every field that you want. A config fills in what is left open "
                    "when it is made: give mode='paper' then, not later."
                )

    def _check_values(self) -> None:
        """Check all fields, and fill in the window of seeded negatives, which no features record."""
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UserValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
        check_ranges(self)
        if self.has_negatives and self.negative == "seeded" and self.window_start is None:
            self.window_start = [0, self.completion_limit // 8]
        if self.has_negatives and self.window_start is not None:
            check_window(self, self.window_start)
        check_compatible(self)


def _unshared(value: Any) -> Any:
    """The same settings in containers of their own; what they hold is shared."""
    if type(value) is dict:
        return {key: _unshared(entry) for key, entry in value.items()}
    if type(value) is list:
        return [_unshared(entry) for entry in value]
    return copy.copy(value) if isinstance(value, AcceleratorConfig) else value


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
    if config.use_vllm:
        check_vllm_settings(config)
        return
    given: Any = config.generation_kwargs
    check_options(given or {}, {"temperature": config.temperature, "max_new_tokens": config.completion_limit})
