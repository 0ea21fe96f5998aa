"""The methods that the testbed compares: SASFT in several forms, its controls, and plain SFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune; everything else (data, order, optimiser, sampling) is the same for all."""

    name: str
    """Key in settings and files."""
    title: str
    """Name in tables and plots."""
    description: str
    """One line for the report."""
    penalty: Literal["none", "features", "token"] = "none"
    """none: plain SFT. features: a SASFT penalty. token: -log(1 - P(target-script tokens))."""
    rows: Literal["sae", "difference_of_means", "random"] = "sae"
    """Where the penalised rows come from."""
    layers: int = 1
    """How many of the last layers are penalised."""
    top: int = 1
    """Rows per layer, by monolinguality."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `SASFTConfig` beside target, weight, layers and top."""
    weight: float = 0.0
    """Coefficient, as chosen on validation prompts of the generated corpus with `tune`."""
    grid: tuple[float, ...] = ()
    """Coefficients that `tune` tries, ascending."""

    def to_dict(self) -> dict[str, Any]:
        """What decides how a run comes out, as JSON values: no words, and no weight, which is the run's own."""
        names = ("name", "penalty", "rows", "layers", "top")
        return {**{name: getattr(self, name) for name in names}, "options": dict(self.options)}


_STANDARD: Mapping[str, Any] = MappingProxyType({"readout": "decoder", "scale": "std", "positions": "predicting"})

_ALL = (
    Arm("sft", "SFT", "Plain supervised fine-tuning."),
    Arm(
        "sasft_paper",
        "SASFT, paper",
        "Encoder pre-activations of the top 2 features on each of the last 2 layers, above the language's mean.",
        "features",
        layers=2,
        top=2,
        weight=0.1,
        grid=(0.03, 0.1, 0.2),
    ),
    Arm(
        "sasft_decoder",
        "SASFT, decoder",
        "Projections on the decoder directions of the top 8 features of the last layer, in standard deviations.",
        "features",
        top=8,
        options=_STANDARD,
        weight=0.2,
        grid=(0.1, 0.2, 0.3),
    ),
    Arm(
        "sasft_combined",
        "SASFT, combined",
        "One readout: the top 32 decoder directions of the last layer, weighted by their effect on the target's "
        "log-probability; positions weighted by the probability of switching.",
        "features",
        top=32,
        options={**_STANDARD, "combine": "effect", "position_weight": "risk"},
        weight=0.1,
        grid=(0.05, 0.1, 0.15),
    ),
    Arm(
        "token_penalty",
        "token penalty",
        "-log(1 - P(target-script tokens)) at every response position; no SAE.",
        "token",
        weight=20.0,
        grid=(10.0, 20.0, 30.0),
    ),
    Arm(
        "difference_of_means",
        "difference of means",
        "One readout: mean residual of the target minus mean of the others, last layer; no SAE.",
        "features",
        rows="difference_of_means",
        options=_STANDARD,
        weight=0.14,
        grid=(0.1, 0.14, 0.2),
    ),
    Arm(
        "random_features",
        "random features",
        "Eight random features of the last layer with equal norms, otherwise as SASFT, decoder; new ones each seed.",
        "features",
        rows="random",
        top=8,
        options=_STANDARD,
        weight=0.2,
    ),
)

ARMS: Mapping[str, Arm] = MappingProxyType({arm.name: arm for arm in _ALL})
"""All methods by name, in the order of the tables."""
