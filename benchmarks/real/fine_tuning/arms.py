"""The arms of the study `sasft`, and the languages between which switching is learned."""

from __future__ import annotations

from dataclasses import dataclass

SEEDS = 2


@dataclass(frozen=True)
class Pair:
    """Which language must not appear in which others."""

    target: str
    sources: tuple[str, ...]
    joint: str
    """Between the last sentence and the first of the target's"""


PAIRS = {"zh": Pair("zh", ("en", "fr", "ko", "ru"), ""), "fr": Pair("fr", ("en",), " ")}
"""Chinese, which has a script of its own, and French in English text, which has not"""


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
    "clean": Arm("SFT, rows that switch left as they were", clean=True),
    "sasft": Arm("SASFT, default", SASFT, "sasft_weight", (0.1, 0.3, 1.0), FEATURES),
    "paper": Arm("SASFT, paper", PAPER, "sasft_weight", (0.016, 0.16), FEATURES),
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
OF_PAIR = {"zh": tuple(ARMS), "fr": ("sft", "clean", "sasft", "means", "random", "anchor")}
