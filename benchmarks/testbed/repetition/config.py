"""The methods that the repetition task compares (DAPO, with negatives, controls), and all settings of the task."""

# ruff: noqa: RUF009 - `option` returns a dataclass field

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from benchmarks.testbed.repetition.task import DocumentSettings
from benchmarks.testbed.settings import Method, TaskSettings, option
from qscope_posttrain.errors import UserValueError


@dataclass(frozen=True)
class Arm(Method):
    """One way to train; the number of generated rows is the same for all, too."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SteeredGRPOConfig` beside those that are the same for all."""
    steering: str = "window"
    """Way to steer (see `features.WAYS`) for which layer, rows and strength were chosen."""
    rewards: tuple[str, ...] = ()
    """Reward functions beside the right answer, by the names of `rl.rewards.reward_function`, each with weight 1."""

    @property
    def steers(self) -> bool:
        """Whether it pushes the residual stream, along features, means or random directions."""
        has_negatives = self.overrides.get("negatives_per_group", 1) > 0
        return has_negatives and self.overrides.get("negative", "feature") in ("feature", "random")


SEEDED: dict[str, Any] = {"negative": "seeded", "window_start": [0, 40]}

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
        SEEDED,
    ),
    Arm(
        "random",
        "random, default",
        "A fresh random direction for each negative, of the feature's layer, strength and window; else as the default.",
        {"negative": "random"},
    ),
)

ARMS: Mapping[str, Arm] = MappingProxyType({arm.name: arm for arm in _ALL})
"""The methods by name, in the order of the tables. Those of experiments only are in `benchmarks/experiments`."""
PLAIN = "plain"
"""The method with which all others are compared."""


@dataclass(frozen=True)
class RepetitionConfig(TaskSettings):
    """Settings of the repetition task. The defaults are those of `qscope demo --full`."""

    fewest_operations: int = option(3, "Number of operations of the shortest problem.")
    most_operations: int = option(5, "Number of operations of the longest problem.")
    noise: float = option(0.05, "Share of wrong steps in training documents.")
    answer_tokens: int = option(120, "Maximum length of a completion, in tokens, in training and sampling.")
    habit_loops: float = option(0.05, "Share of documents that repeat without end in the first phase of pretraining.")
    rare_loops: float = option(0.008, "Share of documents that repeat without end in the second phase.")

    hidden_size: int = option(64, "Width of the language model.")
    intermediate_size: int = option(128, "Width of the MLPs.")
    model_layers: int = option(3, "Decoder layers.")
    heads: int = option(4, "Attention heads, each with its own keys and values.")
    rope_theta: float = option(1000.0, "Base of the rotary position embedding.")
    tied: bool = option(False, "Use one matrix for input and output embeddings.")
    pretraining_batch_size: int = option(24, "Documents per pretraining step.")
    habit_steps: int = option(1000, "Optimizer steps of the first phase.")
    habit_learning_rate: float = option(3e-3, "Peak learning rate of the first phase.")
    rare_steps: int = option(250, "Optimizer steps of the second phase.")
    rare_learning_rate: float = option(6e-4, "Peak learning rate of the second phase.")
    start: Literal["rare", "frequent"] = option(
        "rare", "Model from which training starts: after the second phase (rare loops) or the first (frequent)."
    )
    model_seed: int = option(0, "Seed of model, documents and SAEs.")

    loop_samples: int = option(16000, "Number of samples of the start model among which its own loops are sought.")

    sae_latents: int = option(256, "Width of the SAE of each layer, in latents.")
    sae_k: int = option(8, "Active latents per token.")
    sae_steps: int = option(400, "Training steps of an SAE, 1024 tokens each.")
    sae_learning_rate: float = option(2e-3, "Peak learning rate of an SAE.")
    sae_documents: int = option(3000, "Number of documents whose activations train the SAEs.")
    sae_loops: float = option(0.03, "Share of these documents that loop.")

    scan_samples: int = option(48, "Completions per point of the steering curve.")
    scan_fresh_samples: int = option(192, "Completions of the curve's final check.")
    scan_random_directions: int = option(8, "Number of random directions with which the curve is compared.")
    strengths: list[float] = option(
        [1.0, 1.25], "Lengths of the steering vector to try, in median norms of the layer's states."
    )
    weak_strengths: list[float] = option(
        [0.5, 0.75], "Lengths to try for steering at every generated token, which derails a model sooner."
    )
    window_start: list[int] = option([4, 9], "First and last generated token at which steering starts.")
    window_lengths: list[int] = option(
        [30], "Window lengths to try, in tokens; after the window the model is not steered."
    )
    top: int = option(4, "Number of candidate features per layer.")

    arms: list[str] = option(list(ARMS), "Methods to compare; plain is always among them.")
    seeds: list[int] = option([0, 1], "Seeds of training; one run per seed and method.")
    updates: int = option(40, "Optimizer steps of a run.")
    prompts_per_update: int = option(4, "Groups per step.")
    rows_per_prompt: int = option(8, "Completions per group, including negatives.")
    learning_rate: float = option(2e-4, "Constant learning rate.")
    temperature: float = option(1.0, "Sampling temperature, in training and evaluation.")
    sampled_problems: int = option(4000, "Number of held-out test problems; one sample per problem and run.")
    benign_problems: int = option(
        1500, "Number of test problems whose steps are rightly equal; one sample per problem and run."
    )

    def __post_init__(self) -> None:
        self._check("repetition", ARMS, _SHARES, _ABOVE_ZERO)
        if self.rows_per_prompt < 3:
            raise UserValueError(
                f"rows_per_prompt must be at least 3, a negative among them; got {self.rows_per_prompt}"
            )
        if self.start not in ("rare", "frequent"):
            raise UserValueError(f'start is "rare" or "frequent", got {self.start!r}')
        if self.fewest_operations > self.most_operations:
            raise UserValueError(
                f"fewest_operations={self.fewest_operations} exceeds most_operations={self.most_operations}"
            )
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise UserValueError(f"hidden_size {self.hidden_size} needs heads of an even width, got {self.heads} heads")

    @property
    def operations(self) -> tuple[int, int]:
        """Fewest and most operations of a problem."""
        return self.fewest_operations, self.most_operations

    def documents(self, loops: float) -> DocumentSettings:
        """Return how training documents with a share of `loops` are written."""
        return DocumentSettings(self.operations, self.noise, loops, self.answer_tokens)


_SHARES = ("noise", "habit_loops", "rare_loops", "sae_loops")
_ABOVE_ZERO = (
    "habit_learning_rate", "rare_learning_rate", "rope_theta", "sae_learning_rate", "learning_rate", "temperature",
)  # fmt: skip
