"""Settings of DAPO with negative examples, beside those of TRL's GRPO."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers.trainer_pt_utils import AcceleratorConfig
from trl import GRPOConfig

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.rl.checks import check_compatible, check_ranges, check_steering, check_window

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

    epsilon_high: float | None = field(
        default=0.28, metadata={"help": "Upper clip of the ratio; 0.28 is DAPO's. The lower one is `epsilon`."}
    )
    soft_overlong_cache: int | None = field(
        default=None,
        metadata={
            "help": "Tokens at the end of max_completion_length over which a reward falls linearly from 0 to -1 (DAPO, "
            "eq. 13). None: a fifth of max_completion_length, as in DAPO; 0: no such reward."
        },
    )
    mode: Mode = field(
        default="default",
        metadata={"help": "Values of the fields left open: 'default' are the package's, 'paper' the report's."},
    )
    negative: Negative | None = field(
        default=None,
        metadata={
            "help": "How a negative is made: steered by the features (feature), steered by a fresh random direction of "
            "the same length (random), or, without any SAE, by repeating a piece of the row's own text `copies` times "
            "before the model goes on (seeded). None: feature where features are given, else seeded."
        },
    )
    negatives_per_group: int = field(
        default=1, metadata={"help": "Number of negatives per group (its last rows). 0 is plain DAPO."}
    )
    steering_layer: int | None = field(
        default=None, metadata={"help": "Decoder layer, from 0; None: the one recorded with the features."}
    )
    steering_strength: float | None = field(
        default=None, metadata={"help": "Length of the steering vector in steering_unit; None: as recorded."}
    )
    steering_unit: Literal["raw", "norm", "relative"] | None = field(
        default=None,
        metadata={
            "help": "Vector of strength 1: the direction as it is (raw), of length 1 (norm), or of the median norm of "
            "that layer's residual stream (relative). None: as recorded."
        },
    )
    window_start: list[int] | None = field(
        default=None,
        metadata={
            "help": "Steering or copying starts at a generated token drawn per row between these two numbers, both "
            "included. None: as recorded with the features; 0 0 for mode='paper'; the first eighth of the completion "
            "for 'seeded'."
        },
    )
    window_length: int | None = field(
        default=None,
        metadata={
            "help": "Number of steered tokens, after which the model runs free; 0: to the end. None: as recorded."
        },
    )
    gate: Gate | None = field(
        default=None,
        metadata={
            "help": "Treatment of a negative that is no endless repetition: removed from the loss and from its group's "
            "statistics (drop), or treated like any row (keep)."
        },
    )
    negative_tokens: NegativeTokens | None = field(
        default=None,
        metadata={"help": "Tokens of a negative in the loss: all, or tail: the repeats, from the second copy on."},
    )
    negative_weight: float | None = field(default=None, metadata={"help": "Factor on the advantage of a negative."})
    loop_min_copies: int = field(
        default=4, metadata={"help": "Full copies at the end that make an unfinished completion an endless repetition."}
    )
    loop_min_tokens: int = field(
        default=12, metadata={"help": "Minimum number of tokens that those copies cover together."}
    )
    copies: int = field(
        default=2, metadata={"help": "For negative='seeded': copies of the piece before the model goes on by itself."}
    )
    copy_boundary: list[str] = field(
        default_factory=lambda: ["\n", ".", "!", "?", ";", "。", "！", "？", "；"],
        metadata={"help": "For negative='seeded': a token with one of these ends the piece that is copied."},
    )
    copy_length: int = field(
        default=32, metadata={"help": "For negative='seeded': tokens after which a piece ends without a boundary."}
    )
    dynamic_sampling: bool = field(
        default=False,
        metadata={
            "help": "DAPO's dynamic sampling: draw groups again, with other prompts, whose ordinary rows all have the "
            "same reward."
        },
    )
    dynamic_sampling_attempts: int = field(
        default=3, metadata={"help": "Number of redraws; groups that are still without a signal leave the loss."}
    )

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
