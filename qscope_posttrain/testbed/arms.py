"""The methods that the testbed compares: SASFT in several forms, its controls, and plain SFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from qscope_posttrain.sft.config import PAPER


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune; everything else (data, order, optimiser, sampling) is the same for all."""

    name: str
    """Key in settings and files."""
    title: str
    """Name in tables and plots."""
    description: str
    """One line for the report."""
    penalty: Literal["none", "features", "token", "both"] = "none"
    """none: plain SFT. features: a SASFT penalty. token: -log(1 - P(target tokens)). both: the sum of these two."""
    rows: Literal["sae", "difference_of_means", "gradient", "random"] = "sae"
    """Where the penalised rows come from."""
    layers: int = 1
    """How many of the last layers are penalised."""
    top: int = 1
    """Rows per layer, by monolinguality."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `SASFTConfig` beside target, weight, layers and top."""
    token_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `TokenPenaltyCallback` beside target, weight and tokens."""
    token_scale: float = 1.0
    """The token penalty's coefficient per unit of the arm's weight."""
    drop_switched: bool = False
    """Whether SFT data that hold the habit are left out: the trivial cure, where one knows which they are."""
    weight: float = 0.0
    """Coefficient, as chosen on validation prompts of the generated corpus with `tune`."""
    grid: tuple[float, ...] = ()
    """Coefficients that `tune` tries, ascending."""

    def to_dict(self) -> dict[str, Any]:
        """What decides how a run comes out, as JSON values: no words, and no weight, which is the run's own."""
        names = ("name", "penalty", "rows", "layers", "top", "token_scale", "drop_switched")
        options = {"options": dict(self.options), "token_options": dict(self.token_options)}
        return {**{name: getattr(self, name) for name in names}, **options}

    @property
    def uses_features(self) -> bool:
        """Whether it penalises readouts of a FeatureSet."""
        return self.penalty in ("features", "both")

    @property
    def uses_sae(self) -> bool:
        """Whether these readouts are an SAE's features, chosen and not random."""
        return self.uses_features and self.rows == "sae"


_PAPER: dict[str, Any] = {name: value for name, value in PAPER.items() if name != "weight"}
_STANDARD: dict[str, Any] = {"readout": "decoder", "scale": "std", "combine": "none", "positions": "predicting"}
_COMBINED: dict[str, Any] = {**_STANDARD, "combine": "effect"}

_ALL = (
    Arm("sft", "SFT", "Plain supervised fine-tuning."),
    Arm(
        "sasft_paper",
        "SASFT, paper",
        "Encoder pre-activations of the top 2 features on each of the last 2 layers, above the language's mean.",
        "features",
        layers=2,
        top=2,
        options=_PAPER,
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
        "log-probability.",
        "features",
        top=32,
        options=_COMBINED,
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
    Arm(
        "sasft_one_readout",
        "SASFT, one readout",
        "One readout: the top 32 decoder directions of the last layer, weighted by monolinguality; no list of tokens.",
        "features",
        top=32,
        options={**_STANDARD, "combine": "monolinguality"},
        weight=0.15,
        grid=(0.05, 0.15, 0.3),
    ),
    Arm(
        "sasft_anchor",
        "SASFT, combined + anchor",
        "SASFT, combined, with a KL anchor of weight 1 to the model before SFT on all but the target's tokens.",
        "features",
        top=32,
        options={**_COMBINED, "anchor_weight": 1.0},
        weight=0.2,
        grid=(0.1, 0.2, 0.4),
    ),
    Arm(
        "sasft_token",
        "SASFT, combined + token",
        "SASFT, combined, and the token penalty at 150 times its coefficient.",
        "both",
        top=32,
        options=_COMBINED,
        token_scale=150.0,
        weight=0.05,
        grid=(0.025, 0.05, 0.1),
    ),
    Arm(
        "token_anchor",
        "token penalty + anchor",
        "The token penalty with a KL anchor of weight 1 to the model before SFT on all but the target's tokens.",
        "token",
        token_options={"anchor_weight": 1.0},
        weight=20.0,
        grid=(10.0, 20.0, 40.0),
    ),
    Arm(
        "gradient",
        "gradient direction",
        "One readout: the mean gradient of the target's log-probability at the last layer; no SAE.",
        "features",
        rows="gradient",
        options=_STANDARD,
        weight=0.15,
        grid=(0.05, 0.15, 0.3),
    ),
    Arm(
        "token_everywhere",
        "token penalty, every position",
        "The token penalty also where the label itself is one of the target's tokens.",
        "token",
        token_options={"skip_target_labels": False},
        weight=3.0,
        grid=(1.0, 3.0, 8.0),
    ),
    Arm(
        "sft_dropped",
        "SFT, switched rows dropped",
        "Plain SFT without the rows that hold the habit.",
        drop_switched=True,
    ),
    Arm(
        "token_dropped",
        "token penalty, switched rows dropped",
        "The token penalty without the rows that hold the habit.",
        "token",
        drop_switched=True,
        weight=20.0,
        grid=(10.0, 20.0, 30.0),
    ),
    Arm(
        "sasft_dropped",
        "SASFT, combined, switched rows dropped",
        "SASFT, combined, without the rows that hold the habit.",
        "features",
        top=32,
        options=_COMBINED,
        drop_switched=True,
        weight=0.1,
        grid=(0.05, 0.1, 0.15),
    ),
)

DEMO_ARMS = (
    "sft", "sasft_paper", "sasft_decoder", "sasft_combined", "token_penalty", "difference_of_means", "random_features",
)  # fmt: skip
"""The arms that the demo compares."""

ARMS: Mapping[str, Arm] = MappingProxyType({arm.name: arm for arm in _ALL})
"""All methods by name, in the order of the tables."""
