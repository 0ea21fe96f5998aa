"""Settings of steered-negative DAPO, beside those of TRL's GRPO."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers.trainer_pt_utils import AcceleratorConfig
from trl import GRPOConfig

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.rl.checks import COPYING, check_compatible, check_ranges, check_steering

Mode = Literal["default", "paper"]
Negative = Literal["feature", "random", "seeded", "copied"]
Gate = Literal["drop", "keep"]
NegativeTokens = Literal["all", "tail", "likely"]
OldLogps = Literal["policy", "behaviour"]
Baseline = Literal["include", "exclude"]

PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "gate": "drop",
        "negative_tokens": "tail",
        "negative_weight": 1.0,
        "old_logps": "policy",
        "baseline": "include",
    },
    "paper": {
        "window_start": [0, 0],
        "window_length": 0,
        "gate": "keep",
        "negative_tokens": "all",
        "negative_weight": 1.0,
        "old_logps": "policy",
        "baseline": "include",
    },
}
"""What each mode says about the fields that are None."""

_ONLY_IN_PAPER = {
    "negative": "feature", "negatives_per_group": 1, "negative_share": 1.0, "negative_decay_steps": 0,
    "stop_below": 0.0, "dynamic_sampling": False,
}  # fmt: skip


@dataclass(frozen=True)
class NegativeSettings:
    """What becomes of negatives in the loss, as the mode and the fields of a config say together."""

    gate: Gate
    tokens: NegativeTokens
    weight: float
    old_logps: OldLogps
    baseline: Baseline


@dataclass
class SteeredGRPOConfig(GRPOConfig):
    """`GRPOConfig` with DAPO's defaults, and one steered negative in each group.

    DAPO (arXiv 2503.14476): token-level loss, clip 0.2 below and 0.28 above, no KL term (the three are TRL's defaults
    but for 0.28), soft overlong punishment. Dynamic sampling is an option.

    `mode` chooses a set of values for the fields that are None below. "paper" is Algorithm 1 of the Qwen-Scope report
    (section 8) as written: the last row of each group is steered at every generated token, scored by the same rewards,
    part of its group's statistics, and enters the loss whole, weighted by the unsteered policy. "default" deviates from
    it where our own measurements say so (docs/results/dapo.md): the steering stops after a window, so that the model
    goes on by itself; a row that did not end up in a loop is dropped; of one that did, only the repeats are in the
    loss. In those experiments a seeded negative, which needs no SAE, left far fewer loops than a
    steered one at about the same accuracy; it is what a trainer without features makes.

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
        metadata={
            "help": "What the fields left open mean: 'default' is the package's choice, 'paper' the report's method as "
            "written."
        },
    )
    negative: Negative | None = field(
        default=None,
        metadata={
            "help": "How a negative is made: steered by the features (feature), by a fresh random direction of the "
            "same length (random), or without any SAE: a piece of the row's own text is repeated `copies` times and "
            "the model goes on (seeded), or is repeated to the end (copied). None: feature where features are given, "
            "else seeded, which left the fewest loops in our experiments."
        },
    )
    negatives_per_group: int = field(
        default=1, metadata={"help": "The last so many rows of each group are negatives; 0 is plain DAPO."}
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
            "help": "What strength 1 means: the direction as it is (raw), a vector of length 1 (norm), the median norm "
            "of that layer's residual stream (relative). None: as recorded."
        },
    )
    window_start: list[int] | None = field(
        default=None,
        metadata={
            "help": "Steering (or copying) starts at a generated token drawn for each row between these two numbers, "
            "both included. None: as recorded with the features; 0 0 for mode='paper'."
        },
    )
    window_length: int | None = field(
        default=None,
        metadata={"help": "Steered tokens, after which the model runs free; 0: to the end. None: as recorded."},
    )
    gate: Gate | None = field(
        default=None,
        metadata={
            "help": "What becomes of a negative that is no endless repetition: out of the loss and of its group's "
            "statistics (drop), or treated like any row (keep)."
        },
    )
    negative_tokens: NegativeTokens | None = field(
        default=None,
        metadata={
            "help": "Tokens of a negative in the loss: all; tail: the repeats, from the second copy on; likely: "
            "those to which the policy gives at least probability_floor."
        },
    )
    probability_floor: float = field(
        default=1e-3, metadata={"help": "For negative_tokens='likely', and for the metric negative/unlikely_tokens."}
    )
    negative_weight: float | None = field(default=None, metadata={"help": "Factor on the advantage of a negative."})
    old_logps: OldLogps | None = field(
        default=None,
        metadata={
            "help": "Denominator of the ratio of a negative: the unsteered policy, so that it starts at 1 (policy), or "
            "the steered distribution it was drawn from (behaviour), which clips away exactly what steering caused."
        },
    )
    baseline: Baseline | None = field(
        default=None,
        metadata={
            "help": "Whether negatives are part of their group's mean and standard deviation (include), or are "
            "compared with the ordinary rows alone: A = (G - 1) / sqrt(G) * clamp(R - mean, -1, 1) (exclude)."
        },
    )
    negative_share: float = field(default=1.0, metadata={"help": "Share of the groups that hold negatives."})
    negative_decay_steps: int = field(
        default=0, metadata={"help": "The share falls linearly to 0 over so many optimiser steps; 0: it does not fall."}
    )
    stop_below: float = field(
        default=0.0,
        metadata={
            "help": "Negatives end for good when the share of them that loop falls below this, over the last "
            "stop_window of them: the policy has unlearnt what steering provokes. 0: never."
        },
    )
    stop_window: int = field(default=64, metadata={"help": "Negatives over which stop_below is judged."})
    loop_min_copies: int = field(
        default=4, metadata={"help": "Full copies at the end that make an unfinished completion an endless repetition."}
    )
    loop_min_tokens: int = field(
        default=12, metadata={"help": "Tokens that those copies must cover together at least."}
    )
    copies: int = field(
        default=2, metadata={"help": "For negative='seeded': copies of the piece before the model goes on by itself."}
    )
    copy_boundary: list[str] = field(
        default_factory=lambda: ["\n", ".", "!", "?", ";", "。", "！", "？", "；"],
        metadata={"help": "For 'seeded' and 'copied': a token with one of these ends the piece that is copied."},
    )
    copy_length: int = field(
        default=32, metadata={"help": "For 'seeded' and 'copied': tokens after which a piece ends without a boundary."}
    )
    dynamic_sampling: bool = field(
        default=False,
        metadata={
            "help": "DAPO's dynamic sampling: groups whose ORDINARY rows all have the same reward are drawn again with "
            "other prompts."
        },
    )
    dynamic_sampling_attempts: int = field(
        default=3, metadata={"help": "Times that dead groups are drawn again; those still dead leave the loss."}
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
        if self.negative is not None:
            self._fill_window()
        check_compatible(self)

    def settled(self, has_features: bool) -> SteeredGRPOConfig:
        """A copy that says how negatives are made, where `negative` was left open; this config stays as it is.

        The copy shares no list or dictionary with this one: the trainer works on it, and trainers write into their
        settings.

        Raises:
            ValueError: features that the negatives make no use of, or lack; what the class refuses, too.
        """
        if has_features and self.has_negatives and self.negative in COPYING:
            raise UserValueError(
                f"negative={self.negative!r} makes negatives without features, and features were given. Leave the "
                "features out, or leave negative open to steer by them."
            )
        settled = copy.copy(self)
        vars(settled).update({name: _unshared(value) for name, value in vars(self).items()})
        # A field may have been set since the config was made.
        settled._check_mode()
        if settled.negative is None:
            settled.negative = "feature" if has_features or self.mode == "paper" else "seeded"
        if settled.has_negatives and settled.negative == "feature" and not has_features:
            raise UserValueError(
                "negative='feature' needs features: pass features=FeatureSet (see `qscope features find-repetition`), "
                "or choose negative='seeded', which needs none."
            )
        check_steering(settled)
        settled._check_values()
        settled._fill_window()
        check_compatible(settled)
        return settled

    @property
    def has_negatives(self) -> bool:
        """Whether any group can hold a negative."""
        return self.negatives_per_group > 0

    @property
    def generations(self) -> int:
        """Rows in a group."""
        if self.num_generations is None:
            raise UserValueError("num_generations must be a number.")
        return self.num_generations

    @property
    def completion_limit(self) -> int:
        """Tokens of a completion at most."""
        if self.max_completion_length is None:
            raise UserValueError(
                "max_completion_length must be a number: an endless repetition has to be cut somewhere."
            )
        return self.max_completion_length

    @property
    def is_steered(self) -> bool:
        """Whether negatives come from steering, as opposed to copying; see `settled`."""
        return self.has_negatives and self.negative in ("feature", "random")

    @property
    def negative_settings(self) -> NegativeSettings:
        """The fields that `mode` may have filled in."""
        chosen = {name: getattr(self, name) for name in PRESETS["default"]}
        return NegativeSettings(
            gate=chosen["gate"],
            tokens=chosen["negative_tokens"],
            weight=chosen["negative_weight"],
            old_logps=chosen["old_logps"],
            baseline=chosen["baseline"],
        )

    def check_window(self, start: Sequence[int]) -> None:
        """ValueError if a window may start where nothing is left to be said."""
        if start[1] >= self.completion_limit - 1 and start[1] > 0:
            raise UserValueError(
                f"window_start={list(start)} reaches to the last of max_completion_length="
                f"{self.max_completion_length} tokens, so that a negative could be an ordinary row. Start earlier."
            )

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
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UserValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
        check_ranges(self)
        if self.soft_overlong_cache is not None and self.soft_overlong_cache > self.completion_limit:
            raise UserValueError(
                f"soft_overlong_cache={self.soft_overlong_cache} is more than "
                f"max_completion_length={self.max_completion_length}, the tokens that it is a part of."
            )
        if self.has_negatives and self.window_start is not None:
            self.check_window(self.window_start)

    def _fill_window(self) -> None:
        """A copied piece needs no features that say where it may begin."""
        if self.has_negatives and self.negative in COPYING and self.window_start is None:
            self.window_start = [0, self.completion_limit // 8]
            self.check_window(self.window_start)


def _unshared(value: Any) -> Any:
    """The same settings in containers of their own; what they hold is shared."""
    if type(value) is dict:
        return {key: _unshared(entry) for key, entry in value.items()}
    if type(value) is list:
        return [_unshared(entry) for entry in value]
    return copy.copy(value) if isinstance(value, AcceleratorConfig) else value


_CHOICES: dict[str, tuple[str, ...]] = {
    "negative": get_args(Negative), "gate": get_args(Gate), "negative_tokens": get_args(NegativeTokens),
    "old_logps": get_args(OldLogps), "baseline": get_args(Baseline), "steering_unit": ("raw", "norm", "relative"),
}  # fmt: skip
