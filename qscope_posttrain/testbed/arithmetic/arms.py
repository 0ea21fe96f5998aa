"""The methods that the arithmetic testbed compares: DAPO, its steered forms, and controls without the feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way to train; prompts, rewards, optimiser and number of generated rows are the same for all."""

    name: str
    """Key in settings and files."""
    title: str
    """Name in tables and plots."""
    description: str
    """One line for the report."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SteeredGRPOConfig` beside those that are the same for all."""
    steering: str = "window"
    """For which way to steer layer, rows and strength were chosen: "window", "to_end" or, along the difference of means
    in place of features, "window_means"."""
    rewards: tuple[str, ...] = ()
    """Reward functions beside the right answer, by the names of `rl.rewards.reward_function`, each with weight 1."""

    def to_dict(self) -> dict[str, Any]:
        """What decides how a run comes out, as JSON values: no words."""
        return {
            "name": self.name,
            "overrides": dict(self.overrides),
            "steering": self.steering,
            "rewards": list(self.rewards),
        }


_ALL_TOKENS: Mapping[str, Any] = MappingProxyType({"negative_tokens": "all"})
_SEEDED: Mapping[str, Any] = MappingProxyType({"negative": "seeded", "window_start": [0, 40]})

_ALL = (
    Arm(
        "plain",
        "DAPO",
        "No negative: every row of a group is ordinary. As in all arms, DAPO's soft overlong punishment takes up "
        "to 1 from rows in the last fifth of the length, loops among them.",
        {"negatives_per_group": 0},
    ),
    Arm(
        "paper",
        "steered, paper",
        "The report's method as written: steered at every token, kept whether it loops or not, all tokens, weight 1. "
        "Layer and strength are those that make most rows so steered repeat, in whatever way.",
        {"mode": "paper"},
        steering="to_end",
    ),
    Arm(
        "default",
        "steered, default",
        "The default with features: steered in a window, dropped unless it loops, only the repeats in the loss.",
    ),
    Arm(
        "seeded",
        "seeded, default",
        "No SAE: two copies of a piece of the row's own text, then the model goes on; else as the default.",
        _SEEDED,
    ),
    Arm(
        "random",
        "random, default",
        "A fresh random direction for each negative, of the feature's layer, strength and window; else as the default.",
        {"negative": "random"},
    ),
    Arm(
        "difference_of_means",
        "difference of means, default",
        "No SAE: steered along the mean residual inside loops minus that of ordinary text, with a layer and a strength "
        "of its own from the same curve; else as the default.",
        steering="window_means",
    ),
    Arm(
        "copied_default",
        "copied, default, 0.25",
        "No SAE: a piece of the row's own text copied to the end; only the repeats in the loss, weight 0.25, since "
        "every such row loops, however seldom the model still would.",
        {**_SEEDED, "copies": 1000, "negative_weight": 0.25},
    ),
    Arm(
        "reward_penalty",
        "DAPO, repetition penalty",
        "No negative: a reward beside the right answer takes up to 1 from a row for the share of it that is a repeated "
        "tail, on top of the overlong punishment.",
        {"negatives_per_group": 0},
        rewards=("repetition_penalty",),
    ),
    Arm(
        "plain_right",
        "DAPO, right answers only",
        "No negative and no overlong punishment: the reward is 1 for the right answer and 0 for any other row.",
        {"negatives_per_group": 0, "soft_overlong_cache": 0},
    ),
    Arm(
        "default_right",
        "steered, right answers only",
        "The package's default without the overlong punishment.",
        {"soft_overlong_cache": 0},
    ),
    Arm(
        "paper_window",
        "steered, ungated",
        "The report's method with a window: kept whether it loops or not, all tokens, weight 1.",
        {**_ALL_TOKENS, "gate": "keep"},
    ),
    Arm(
        "gate_quarter",
        "steered, all tokens, 0.25",
        "Steered in a window, dropped unless it loops, all tokens, weight 0.25.",
        {**_ALL_TOKENS, "negative_weight": 0.25},
    ),
    Arm(
        "gate_full",
        "steered, all tokens, 1",
        "Steered in a window, dropped unless it loops, all tokens, weight 1.",
        _ALL_TOKENS,
    ),
    Arm(
        "tail_four",
        "steered, weight 4",
        "The package's default with weight 4.",
        {"negative_weight": 4.0},
    ),
    Arm(
        "tail_two",
        "steered, weight 2",
        "The package's default with weight 2.",
        {"negative_weight": 2.0},
    ),
    Arm(
        "tail_half",
        "steered, weight 0.5",
        "The package's default with weight 0.5.",
        {"negative_weight": 0.5},
    ),
    Arm(
        "strong",
        "steered, strength 1.5",
        "The package's default with a push of one and a half median residual norms, whatever the curve chose.",
        {"steering_strength": 1.5},
    ),
    Arm(
        "two_negatives",
        "steered, two a group",
        "The package's default with two negatives in each group, and so one ordinary row less.",
        {"negatives_per_group": 2},
    ),
    Arm(
        "seeded_half",
        "seeded, weight 0.5",
        "As the seeded default, with weight 0.5.",
        {**_SEEDED, "negative_weight": 0.5},
    ),
    Arm(
        "seeded_quarter",
        "seeded, all tokens, 0.25",
        "No SAE: two copies of a piece of the row's own text, then the model goes on; kept, all tokens, weight 0.25.",
        {**_SEEDED, "gate": "keep", **_ALL_TOKENS, "negative_weight": 0.25},
    ),
    Arm(
        "random_quarter",
        "random, all tokens, 0.25",
        "A fresh random direction for each negative, dropped unless it loops, all tokens, weight 0.25.",
        {"negative": "random", **_ALL_TOKENS, "negative_weight": 0.25},
    ),
)

ARMS: Mapping[str, Arm] = MappingProxyType({arm.name: arm for arm in _ALL})
"""All methods by name, in the order of the tables."""
