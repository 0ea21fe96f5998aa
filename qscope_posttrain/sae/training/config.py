"""Settings of the training of SAEs: what is learned, how text becomes activations, how a run is logged and kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from qscope_posttrain.errors import UserValueError

ARCHITECTURES = ("topk", "batch_topk", "jumprelu")
ISOLATED, JOINED, SEPARATE = PACKINGS = ("isolated", "joined", "separate")
BUFFER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # Names of dtypes of torch -> bytes of a number


@dataclass(frozen=True)
class SAETrainingConfig:
    """Architecture and optimization; the same for every layer. The defaults suit a d_model of 64 to 256 and about
    100,000 tokens.

    Values that concern activations are in the units of training: activations are centered at their geometric median and
    divided by the root mean square of an element, so that settings carry over between layers and models.

    Example:
        >>> config = qp.SAETrainingConfig(expansion=16, k=32, steps=2000)
        >>> config.latents(d_model=1024)
        16384
    """

    architecture: Literal["topk", "batch_topk", "jumprelu"] = "topk"
    """Which latents fire: topk: the k largest of a token; batch_topk: the k x tokens largest of the whole batch, and
    after training those above one threshold; jumprelu: those above a learned threshold of their own."""
    expansion: int = 8
    """Latents per dimension of the residual stream; ignored if width is given."""
    width: int | None = None
    """Number of latents."""
    k: int = 32
    """Latents that fire on a token: the maximum for topk, the average for batch_topk and jumprelu."""
    k_start: int | None = None
    """k of the first update, from which it changes linearly to k; by default k throughout."""
    k_anneal_steps: int = 0
    """Updates over which k goes from k_start to k."""
    steps: int = 300
    """Number of updates."""
    batch_tokens: int = 1024
    """Tokens per update, of all processes together."""
    learning_rate: float = 3e-3
    """Peak learning rate of Adam."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    beta2: float = 0.999
    """Adam's decay of the mean squared gradient."""
    warmup_steps: int = 30
    """Updates of linear warm-up."""
    decay_start: float = 0.7
    """Share of the steps after which the rate falls linearly."""
    final_rate: float = 0.02
    """Rate at the end, as a share of the peak."""
    auxk_weight: float = 1 / 32
    """Weight of the AuxK loss, averaged over steps; 0 disables it."""
    auxk_every: int = 4
    """AuxK is computed on every n-th step, with n times its weight."""
    auxk_k: int | None = None
    """Maximum number of dead latents that fire on a token in AuxK; by default half of d_model."""
    dead_after: int = 100
    """Updates without firing after which a latent counts as dead."""
    bandwidth: float = 0.3
    """jumprelu: width of the window around a threshold in which its gradient is estimated, in units of a
    pre-activation."""
    l0_weight: float = 1.0
    """jumprelu: weight of (L0 / k - 1)^2 relative to the unexplained share of the variance."""
    threshold_decay: float = 0.9
    """batch_topk: share that the running threshold keeps at each update."""
    seed: int = 0
    """Seed of initialization and order of the tokens; the same for every layer."""

    def __post_init__(self) -> None:
        _check_choice(self, "architecture", ARCHITECTURES)
        _check_integers(self, 1, "expansion", "k", "steps", "batch_tokens", "auxk_every", "dead_after")
        _check_integers(self, 1, "width", "k_start", "auxk_k", optional=True)
        _check(self, lambda v: _whole(v, 0), "0 or more, an integer", "warmup_steps", "k_anneal_steps", "seed")
        _check(self, lambda v: _finite(v) and v > 0, "above 0", "learning_rate", "bandwidth")
        _check(self, lambda v: _finite(v) and v >= 0, "0 or more", "auxk_weight", "l0_weight")
        _check(self, lambda v: 0 <= v <= 1, "a share from 0 to 1", "decay_start", "final_rate")
        _check(self, lambda v: 0 <= v < 1, "from 0 to below 1", "beta1", "beta2", "threshold_decay")
        if (self.k_start is None) != (self.k_anneal_steps == 0):
            raise UserValueError(
                f"k_start={self.k_start} and k_anneal_steps={self.k_anneal_steps}: give both to anneal k, or neither"
            )
        if self.k_anneal_steps >= self.steps:
            raise UserValueError(
                f"k_anneal_steps={self.k_anneal_steps} must be below steps={self.steps}: k would never be reached"
            )

    def latents(self, d_model: int) -> int:
        """Number of latents for a residual stream of width `d_model`. ValueError if fewer than k."""
        width = self.expansion * d_model if self.width is None else self.width
        most = max(self.k, self.k_start or 0)
        if most > width:
            raise UserValueError(f"k={most} latents are to fire, but the dictionary would have only {width}")
        return width

    def rate(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0: warm-up, flat, then linear decay to `final_rate`."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        start = self.decay_start * self.steps
        left = (self.steps - step) / (self.steps - start) if step > start else 1.0
        return self.learning_rate * warm * (self.final_rate + (1 - self.final_rate) * left)

    def k_at(self, step: int) -> int:
        """k of update `step`, counted from 0: linear from `k_start` to `k`, rounded to the nearest integer."""
        if self.k_start is None or step >= self.k_anneal_steps:
            return self.k
        return round(self.k_start + (self.k - self.k_start) * step / self.k_anneal_steps)


@dataclass(frozen=True)
class StreamConfig:
    """How text becomes shuffled activations."""

    context_length: int = 512
    """Tokens per sequence."""
    block_tokens: int = 65536
    """Tokens, of all processes, whose activations are in memory at a time; batches are drawn among these, so this is
    the range of the shuffling. Resuming from a checkpoint may read one block again."""
    forward_tokens: int = 8192
    """Tokens per forward pass of a process."""
    packing: Literal["isolated", "joined", "separate"] = "isolated"
    """Documents per sequence. isolated: several, and none attends to another (checked on the model before the start);
    joined: several, and each attends to those before it; separate: one, the rest is padding, for models whose layers
    carry a state along the sequence."""
    buffer_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the activations in memory."""
    buffer_device: Literal["cpu", "model"] = "cpu"
    """Where the activations are kept: cpu: main memory; model: the device of their layer."""
    max_buffer_gib: float = 8.0
    """Maximum memory of the activations per process, in GiB; a run that needs more is refused before the start."""
    outlier_factor: float = 10.0
    """Leave out tokens whose residual vector is longer than this many times the median."""
    calibration_tokens: int = 16384
    """Tokens at the start of the stream from which the median norm and the units of training are computed."""

    def __post_init__(self) -> None:
        _check_integers(self, 2, "context_length", "block_tokens", "forward_tokens", "calibration_tokens")
        _check_choice(self, "packing", PACKINGS)
        _check_choice(self, "buffer_dtype", tuple(BUFFER_BYTES))
        _check_choice(self, "buffer_device", ("cpu", "model"))
        _check(self, lambda v: math.isfinite(v) and v > 0, "above 0", "max_buffer_gib", "outlier_factor")
        if self.block_tokens < self.context_length:
            raise UserValueError(
                f"block_tokens={self.block_tokens} is less than a sequence of context_length={self.context_length}"
            )

    @property
    def block_sequences(self) -> int:
        """Sequences in memory at a time, of all processes."""
        return self.block_tokens // self.context_length

    def buffer_bytes(self, layers: int, d_model: int, processes: int) -> int:
        """Memory of the activations on a process, with their norms."""
        own = math.ceil(self.block_sequences / processes) * self.context_length
        return own * layers * (d_model * BUFFER_BYTES[self.buffer_dtype] + 4)


@dataclass(frozen=True)
class RunConfig:
    """How a training is logged, measured and checkpointed."""

    log_every: int = 10
    """Updates between two records of the metrics."""
    evaluate_every: int = 0
    """Updates between two measurements on held-out text; 0: only at the end."""
    held_out_documents: int = 32
    """Documents at the start of the text that are not trained on but used to measure the result; 0: no measurement."""
    checkpoint_every: int = 500
    """Updates between two checkpoints; 0: none."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep, the latest ones."""
    resume: bool = True
    """Resume from the latest checkpoint in the output folder, if there is one."""
    report_to: tuple[str, ...] = ()
    """Trackers of accelerate in addition to metrics.jsonl: tensorboard, wandb, mlflow, ..."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "report_to", tuple(name for name in self.report_to if name != "none"))
        _check_integers(self, 1, "log_every", "keep_checkpoints")
        _check_integers(self, 0, "evaluate_every", "held_out_documents", "checkpoint_every")
        if self.evaluate_every and not self.held_out_documents:
            raise UserValueError("evaluate_every needs held_out_documents to measure on")


def _check(config: object, accepts: Any, expected: str, *names: str) -> None:
    for name in names:
        if not accepts(value := getattr(config, name)):
            raise UserValueError(f"{name} must be {expected}, got {value!r}")


def _check_choice(config: object, name: str, choices: tuple[str, ...]) -> None:
    _check(config, lambda value: value in choices, f"one of {', '.join(choices)}", name)


def _check_integers(config: object, least: int, *names: str, optional: bool = False) -> None:
    expected = f"an integer from {least}" + ", or None" * optional
    _check(config, lambda value: _whole(value, least) or (optional and value is None), expected, *names)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _finite(value: float) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
