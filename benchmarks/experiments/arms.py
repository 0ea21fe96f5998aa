"""Methods that only experiments run, beside those of the demo: ablations and further controls of both tasks."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from benchmarks.testbed.repetition.config import ARMS as DEMO_REPETITION_ARMS
from benchmarks.testbed.repetition.config import SEEDED
from benchmarks.testbed.repetition.config import Arm as RepetitionArm
from benchmarks.testbed.switching.config import ARMS as DEMO_SWITCHING_ARMS
from benchmarks.testbed.switching.config import COMBINED, STANDARD
from benchmarks.testbed.switching.config import Arm as SwitchingArm

_ALL_TOKENS: dict[str, Any] = {"negative_tokens": "all"}

_SWITCHING = (
    SwitchingArm(
        "sasft_one_readout",
        "SASFT, one readout",
        "One readout: the top 32 decoder directions of the last layer, weighted by monolinguality; no list of tokens.",
        "features",
        top=32,
        options={**STANDARD, "combine": "monolinguality"},
        weight=0.15,
        grid=(0.05, 0.15, 0.3),
    ),
    SwitchingArm(
        "sasft_anchor",
        "SASFT, combined + anchor",
        "SASFT, combined, with a KL anchor of weight 1 to the model before SFT on all but the target's tokens.",
        "features",
        top=32,
        options={**COMBINED, "anchor_weight": 1.0},
        weight=0.2,
        grid=(0.1, 0.2, 0.4),
    ),
    SwitchingArm(
        "sasft_token",
        "SASFT, combined + token",
        "SASFT, combined, and the token penalty at 150 times its coefficient.",
        "both",
        top=32,
        options=COMBINED,
        token_scale=150.0,
        weight=0.05,
        grid=(0.025, 0.05, 0.1),
    ),
    SwitchingArm(
        "token_anchor",
        "token penalty + anchor",
        "The token penalty with a KL anchor of weight 1 to the model before SFT on all but the target's tokens.",
        "token",
        token_options={"anchor_weight": 1.0},
        weight=20.0,
        grid=(10.0, 20.0, 40.0),
    ),
    SwitchingArm(
        "gradient",
        "gradient direction",
        "One readout: the mean gradient of the target's log-probability at the last layer; no SAE.",
        "features",
        rows="gradient",
        options=STANDARD,
        weight=0.15,
        grid=(0.05, 0.15, 0.3),
    ),
    SwitchingArm(
        "token_everywhere",
        "token penalty, every position",
        "The token penalty also where the label itself is one of the target's tokens.",
        "token",
        token_options={"skip_target_labels": False},
        weight=3.0,
        grid=(1.0, 3.0, 8.0),
    ),
    SwitchingArm(
        "sft_dropped",
        "SFT, switched rows dropped",
        "Plain SFT without the rows that hold the habit.",
        drop_switched=True,
    ),
    SwitchingArm(
        "token_dropped",
        "token penalty, switched rows dropped",
        "The token penalty without the rows that hold the habit.",
        "token",
        drop_switched=True,
        weight=20.0,
        grid=(10.0, 20.0, 30.0),
    ),
    SwitchingArm(
        "sasft_dropped",
        "SASFT, combined, switched rows dropped",
        "SASFT, combined, without the rows that hold the habit.",
        "features",
        top=32,
        options=COMBINED,
        drop_switched=True,
        weight=0.1,
        grid=(0.05, 0.1, 0.15),
    ),
)

_REPETITION = (
    RepetitionArm(
        "difference_of_means",
        "difference of means, default",
        "No SAE: steered along the mean residual inside loops minus that of ordinary text, with a layer and a strength "
        "of its own from the same curve; else as the default.",
        steering="window_means",
    ),
    RepetitionArm(
        "copied_default",
        "copied, default, 0.25",
        "No SAE: a piece of the row's own text copied to the end; only the repeats in the loss, weight 0.25, since "
        "every such row loops, however seldom the model still would.",
        {**SEEDED, "copies": 1000, "negative_weight": 0.25},
    ),
    RepetitionArm(
        "reward_penalty",
        "DAPO, repetition penalty",
        "No negative: a reward beside the right answer takes up to 1 from a row for the share of it that is a repeated "
        "tail, on top of the overlong punishment.",
        {"negatives_per_group": 0},
        rewards=("repetition_penalty",),
    ),
    RepetitionArm(
        "plain_right",
        "DAPO, right answers only",
        "No negative and no overlong punishment: the reward is 1 for the right answer and 0 for any other row.",
        {"negatives_per_group": 0, "soft_overlong_cache": 0},
    ),
    RepetitionArm(
        "default_right",
        "steered, right answers only",
        "The package's default without the overlong punishment.",
        {"soft_overlong_cache": 0},
    ),
    RepetitionArm(
        "paper_window",
        "steered, ungated",
        "The report's method with a window: kept whether it loops or not, all tokens, weight 1.",
        {**_ALL_TOKENS, "gate": "keep"},
    ),
    RepetitionArm(
        "gate_quarter",
        "steered, all tokens, 0.25",
        "Steered in a window, dropped unless it loops, all tokens, weight 0.25.",
        {**_ALL_TOKENS, "negative_weight": 0.25},
    ),
    RepetitionArm(
        "gate_full",
        "steered, all tokens, 1",
        "Steered in a window, dropped unless it loops, all tokens, weight 1.",
        _ALL_TOKENS,
    ),
    RepetitionArm("tail_four", "steered, weight 4", "The package's default with weight 4.", {"negative_weight": 4.0}),
    RepetitionArm("tail_two", "steered, weight 2", "The package's default with weight 2.", {"negative_weight": 2.0}),
    RepetitionArm(
        "tail_half", "steered, weight 0.5", "The package's default with weight 0.5.", {"negative_weight": 0.5}
    ),
    RepetitionArm(
        "strong",
        "steered, strength 1.5",
        "The package's default with a push of one and a half median residual norms, whatever the curve chose.",
        {"steering_strength": 1.5},
    ),
    RepetitionArm(
        "two_negatives",
        "steered, two a group",
        "The package's default with two negatives in each group, and so one ordinary row less.",
        {"negatives_per_group": 2},
    ),
    RepetitionArm(
        "seeded_half",
        "seeded, weight 0.5",
        "As the seeded default, with weight 0.5.",
        {**SEEDED, "negative_weight": 0.5},
    ),
    RepetitionArm(
        "seeded_quarter",
        "seeded, all tokens, 0.25",
        "No SAE: two copies of a piece of the row's own text, then the model goes on; kept, all tokens, weight 0.25.",
        {**SEEDED, "gate": "keep", **_ALL_TOKENS, "negative_weight": 0.25},
    ),
    RepetitionArm(
        "random_quarter",
        "random, all tokens, 0.25",
        "A fresh random direction for each negative, dropped unless it loops, all tokens, weight 0.25.",
        {"negative": "random", **_ALL_TOKENS, "negative_weight": 0.25},
    ),
)

SWITCHING_ARMS: Mapping[str, SwitchingArm] = MappingProxyType(
    {**DEMO_SWITCHING_ARMS, **{arm.name: arm for arm in _SWITCHING}}
)
REPETITION_ARMS: Mapping[str, RepetitionArm] = MappingProxyType(
    {**DEMO_REPETITION_ARMS, **{arm.name: arm for arm in _REPETITION}}
)
"""All methods of a task by name, those of the demo first."""
