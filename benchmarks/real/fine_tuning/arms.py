"""The arms of the study `sasft`, and the languages between which switching is learned."""

from __future__ import annotations

from dataclasses import dataclass

SEEDS = 2


@dataclass(frozen=True)
class Setting:
    """Which language must not appear in which others, and where the habit comes from."""

    title: str
    target: str
    sources: tuple[str, ...]
    joint: str
    """Between the last sentence and the first of the target's"""
    share: float = 0.5
    """Of the rows in other languages that switch"""
    rows: int = 120
    """In other languages; a fifth of that in the target"""
    start: str = ""
    """The run whose model is trained on; by default the pretrained one"""
    draw: int = 0
    """Seed of the rows to train on"""

    @property
    def measure(self) -> str:
        """By which number a weight is chosen: tokens of French are tokens of English as well."""
        return "entry" if self.target == "fr" else "hazard"


_OTHERS = ("en", "fr", "ko", "ru")
SETTINGS = {
    "zh": Setting("Chinese in half of the training rows", "zh", _OTHERS, ""),
    "habit": Setting("Clean rows, the habit learned before", "zh", _OTHERS, "", 0.0, 60, "zh-sft-0-0", 5),
    "fr": Setting("French in half of the English training rows", "fr", ("en",), " "),
}


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune: words for `qscope sft` beside those of the recipe."""

    title: str
    words: tuple[str, ...] = ("--method", "sft")
    weight: str = ""
    """The key of its weight"""
    weights: tuple[float, ...] = (0.0,)
    """The package's default first"""
    features: str = ""
    """File of its FeatureSet; {seed} is the run's"""
    clean: bool = False
    """Trained on the data without a switch"""


SASFT = ("--method", "sasft", "--sasft_layers", "17", "--sasft_top", "32")
EARLIER = ("--method", "sasft", "--sasft_layers", "13", "--sasft_top", "32")
PAPER = (
    *("--method", "sasft", "--sasft_layers", "13", "17", "--sasft_top", "2", "--sasft_readout", "encoder"),
    *("--sasft_scale", "raw", "--sasft_combine", "none", "--sasft_positions", "response"),
)
"""The form of the paper, on the last layers that have an SAE"""
FEATURES = "features.safetensors"
ARMS = {
    "sft": Arm("SFT"),
    "clean": Arm("SFT, the same rows without the switch", clean=True),
    "sasft": Arm("SASFT, default", SASFT, "sasft_weight", (0.1, 0.3, 1.0), FEATURES),
    "paper": Arm("SASFT, paper", PAPER, "sasft_weight", (0.016, 0.001), FEATURES),
    "earlier": Arm("SASFT, default, layer 13", EARLIER, "sasft_weight", (0.1,), FEATURES),
    "token": Arm("token penalty", ("--method", "token_penalty"), "token_penalty_weight", (20.0, 5.0)),
    "means": Arm("difference of means", SASFT, "sasft_weight", (0.1, 1.0), "difference_of_means.safetensors"),
    "random": Arm(
        "random features",
        (*SASFT, "--sasft_combine", "uniform"),
        "sasft_weight",
        (0.1, 1.0),
        "random-{seed}.safetensors",
    ),
    "anchor": Arm("KL anchor", ("--method", "kl_anchor"), "anchor_weight", (1.0,)),
    "token_anchor": Arm(
        "token penalty + anchor",
        ("--method", "token_penalty", "--anchor_weight", "1.0"),
        "token_penalty_weight",
        (40.0,),
    ),
    "sasft_anchor": Arm(
        "SASFT, default + anchor", (*SASFT, "--anchor_weight", "1.0"), "sasft_weight", (1.0, 0.3), FEATURES
    ),
}
BEFORE = "base"
"""In place of an arm: the model before it is trained"""


def title_of(arm: str) -> str:
    """The name of an arm in a table."""
    return "before SFT" if arm == BEFORE else ARMS[arm].title


ARMS_OF = {
    "zh": tuple(ARMS),
    "habit": ("sft", "sasft", "token", "means", "random"),
    "fr": ("sft", "sasft", "means", "random", "anchor"),
}
SAMPLED = ("sft", "clean", "sasft", "token", "anchor")
"""The arms that also answer prompts, where a setting has them"""
