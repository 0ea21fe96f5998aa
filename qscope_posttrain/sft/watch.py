"""A training whose auxiliary loss does not do what it is for, found in what it logs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from qscope_posttrain.distributed import is_main_process

IDLE_STEPS = 20
"""Optimizer steps with a term or a readout of 0 after which a warning says so"""
LARGE = 1.0
"""Nats per token of a weighted penalty above which it leads the training in place of the loss that it is added to"""
FAR = 0.8
"""Displacement above which features are taken for another model's. A mean at a right angle to theirs is at least 1
away; measured (docs/sasft.md) 0.98 for another seed, and up to 0.72 after fine-tuning that left an SAE most of what it
explains."""


class Watch:
    """Warns on the main process, once of each kind, and never stops a training."""

    def __init__(self, callback: str, weight: float) -> None:
        """`callback` is the name of its class; with weight 0 a term only measures, and may be 0."""
        self._callback, self._weight = callback, weight
        self._steps = 0
        self._acted: set[str] = set()  # Terms and readouts that were above 0
        self._first: dict[str, float] = {}  # Displacements when they were first known
        self._said: set[str] = set()

    def look(self, values: Mapping[str, float], steps: int) -> None:
        """Look at the metrics of `steps` further optimizer steps, by their names without a prefix."""
        self._steps += steps
        self._acted.update(name for name, value in values.items() if value)
        for name in ("penalty", "anchor"):
            if not math.isfinite(values.get(name, 0.0)):
                self._say(
                    "finite",
                    f"its {name} is {values[name]}: hidden states of the model are not finite, and where the loss is "
                    "NaN transformers logs 0. Go back to the last checkpoint with a lower learning_rate or weight; in "
                    "fp16 the scaler may leave such steps out.",
                )
        added = self._weight * values.get("penalty", 0.0)
        if self._steps == steps and LARGE < added < math.inf:  # the first log: later the training itself may do it
            self._say(
                "large",
                f"its penalty times its weight is {added:.3g} nats per token, about as much as the loss of a language "
                "model: training follows it first of all. Lower the weight. A published weight for raw readouts is in "
                "units of its own model's residual stream; standard deviations (the default) are alike on all models.",
            )
        if self._weight and self._steps >= IDLE_STEPS:
            self._look_for_idle(values)
        for name, value in values.items():
            if name.startswith("displacement/"):
                self._look_at_model(name.removeprefix("displacement/"), self._first.setdefault(name, value), value)

    def _look_for_idle(self, values: Mapping[str, float]) -> None:
        idle = [name.removeprefix("excess/") for name in values if name.startswith("excess/")]
        idle = [name for name in idle if f"excess/{name}" not in self._acted]
        if "penalty" not in self._acted:
            self._say(
                "idle",
                f"it has changed nothing in the first {self._steps} steps: its penalty was 0 at every position. Either "
                "all samples are in the target language, or nothing that it penalizes goes above its threshold on this "
                "model. See its metrics in the log, and whether the features were found on this model.",
            )
        elif idle:
            self._say(
                "idle",
                f"of its readouts {', '.join(idle[:8])}{', ...' if idle[8:] else ''} ({len(idle)} in all) were 0 at "
                f"every position in the first {self._steps} steps, and change nothing: they do not fire on this model, "
                "or not on these data. Leave them out (top, layers), or find features on text like the training data.",
            )
        self._said.add("idle")  # what acts once is not idle later

    def _look_at_model(self, layer: str, first: float, now: float) -> None:
        if not now > FAR:
            return
        if first > FAR:
            self._say(
                "model",
                f"the features seem to be another model's. On {layer} the mean residual stream is {now:.2f} of its "
                f"length away from where it was when they were found (0 is equal; limit {FAR}): the penalty acts on "
                "directions that may mean nothing here. Find the features on this model, on text like its training "
                f"data. If that is how they were found, the steps up to this log ({self._steps}, and those before a "
                "checkpoint) have moved the model: lower learning_rate or weight.",
            )
        else:
            self._say(
                "drift",
                f"training has moved the model away from its features. On {layer} the mean residual stream was "
                f"{first:.2f} of its length away from where it was when they were found, and is now {now:.2f} (limit "
                f"{FAR}). Lower learning_rate or weight, or find the features again on the last checkpoint.",
            )

    def _say(self, kind: str, what: str) -> None:
        if kind not in self._said and is_main_process():
            warnings.warn(f"{self._callback}: {what}", stacklevel=2)
        self._said.add(kind)
