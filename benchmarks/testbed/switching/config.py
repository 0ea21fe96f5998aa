"""The methods that the switching task compares (SASFT, its controls, plain SFT), and all settings of the task."""

# ruff: noqa: RUF009 - `option` returns a dataclass field

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from benchmarks.testbed.settings import Method, TaskSettings, option
from qscope_posttrain.errors import UserValueError


@dataclass(frozen=True)
class Arm(Method):
    """One way to fine-tune."""

    WORDS = (*Method.WORDS, "weight", "grid")  # the weight belongs to the run

    penalty: Literal["none", "features", "token", "both"] = "none"
    """none: plain SFT. features: a SASFT penalty. token: -log(1 - P(target tokens)). both: their sum."""
    rows: Literal["sae", "difference_of_means", "gradient", "random"] = "sae"
    """Where the penalized directions come from."""
    layers: int = 1
    """Number of last layers that are penalized."""
    top: int = 1
    """Features per layer, by monolinguality."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `SASFTConfig` beside target, weight, layers and top."""
    token_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of `TokenPenaltyCallback` beside target, weight and tokens."""
    token_scale: float = 1.0
    """Weight of the token penalty per unit of the arm's weight."""
    drop_switched: bool = False
    """Whether SFT data with the habit are left out: the trivial cure, if one knows which they are."""
    weight: float = 0.0
    """Weight of the penalty, as chosen on validation prompts of the generated corpus with `tune`."""
    grid: tuple[float, ...] = ()
    """Weights that `tune` tries, ascending."""

    @property
    def uses_features(self) -> bool:
        """Whether it penalizes a FeatureSet."""
        return self.penalty in ("features", "both")

    @property
    def uses_sae(self) -> bool:
        """Whether it penalizes chosen features of an SAE, rather than random or other directions."""
        return self.uses_features and self.rows == "sae"


PAPER: dict[str, Any] = {"readout": "encoder", "scale": "raw", "combine": "none", "positions": "response"}
STANDARD: dict[str, Any] = {"readout": "decoder", "scale": "std", "combine": "none", "positions": "predicting"}
COMBINED: dict[str, Any] = {**STANDARD, "combine": "effect"}

_ALL = (
    Arm("sft", "SFT", "Plain supervised fine-tuning."),
    Arm(
        "sasft_paper",
        "SASFT, paper",
        "Encoder pre-activations of the top 2 features on each of the last 2 layers, above the language's mean.",
        "features",
        layers=2,
        top=2,
        options=PAPER,
        weight=0.1,
        grid=(0.03, 0.1, 0.2),
    ),
    Arm(
        "sasft_decoder",
        "SASFT, decoder",
        "Projections on the decoder directions of the top 8 features of the last layer, in standard deviations.",
        "features",
        top=8,
        options=STANDARD,
        weight=0.2,
        grid=(0.1, 0.2, 0.3),
    ),
    Arm(
        "sasft_combined",
        "SASFT, combined",
        "One direction: the top 32 decoder directions of the last layer, weighted by their effect on the target's "
        "log-probability.",
        "features",
        top=32,
        options=COMBINED,
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
        "One direction: mean residual of the target minus mean of the others, last layer; no SAE.",
        "features",
        rows="difference_of_means",
        options=STANDARD,
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
        options=STANDARD,
        weight=0.2,
    ),
)

ARMS: Mapping[str, Arm] = MappingProxyType({arm.name: arm for arm in _ALL})
"""The methods by name, in the order of the tables. Those of experiments only are in `benchmarks/experiments`."""
SFT = "sft"
"""The method with which all others are compared."""


@dataclass(frozen=True)
class SwitchingConfig(TaskSettings):
    """Settings of the switching task. The defaults are those of `qscope demo --full`."""

    corpus: str | None = option(None, "Folder of <language>.txt; by default text from the package's generator.")
    languages: list[str] | None = option(None, "Languages to read from the folder; by default all.")
    texts: list[str] | None = option(
        None, "Instead of a folder: NAME=FILE per language or register; FILE.jsonl:FIELD for JSONL."
    )
    target: str = option("zh", "Language or register into which the model switches.")
    identify: Literal["script", "words"] = option(
        "script", "How a switch is detected: by the target's own script, or by its words if it has none."
    )
    corpus_scale: float = option(1.5, "Size of the generated corpus; 1 is about 2 MB.")
    vocabulary: int = option(2000, "Vocabulary size of the byte-level BPE tokenizer.")
    window: int = option(96, "Window length, in tokens.")
    prompt: int = option(32, "Prompt length in a dialogue window, in tokens; <sep> and the response follow.")

    hidden_size: int = option(128, "Width of the language model.")
    model_layers: int = option(4, "Decoder layers of the language model.")
    heads: int = option(4, "Attention heads; half as many for keys and values.")
    pretraining_steps: int = option(1200, "Optimizer steps of pretraining.")
    pretraining_batch_size: int = option(16, "Windows per pretraining step; more steps help more than larger ones.")
    pretraining_learning_rate: float = option(
        2e-3, "Peak learning rate of pretraining; cosine down to 3 percent of it."
    )
    switch: float = option(
        0.15, "Share of the other languages' windows that switch to the target in pretraining: the habit."
    )
    model_seed: int = option(0, "Seed of model, pretraining data and SAEs.")

    sae_layers: int = option(2, "Number of last decoder layers with an SAE.")
    sae_expansion: int = option(8, "Latents per unit of hidden size.")
    sae_k: int = option(32, "Active latents per token.")
    sae_steps: int = option(200, "Training steps of an SAE, 1024 tokens each.")
    sae_windows: int = option(1200, "Windows whose activations train the SAEs.")

    feature_windows: int = option(400, "Windows of the sft split from which features and thresholds are measured.")
    top: int = option(32, "Number of features kept per language and layer, by monolinguality.")

    arms: list[str] = option(list(ARMS), "Methods to compare; sft is always among them.")
    seeds: list[int] = option([101, 102], "Seeds of SFT data, their order and sampling; one run per seed and method.")
    sft_windows: int = option(800, "SFT windows per seed; each is seen once.")
    sft_batch_size: int = option(16, "Windows per SFT step.")
    sft_learning_rate: float = option(2e-4, "Peak learning rate of SFT.")
    sft_switch: float = option(0.0, "Share of SFT windows that switch; 0 is clean data.")
    prior_windows: int = option(
        0, "Windows of plain SFT before a method starts; features come from the model before it."
    )
    penalised: list[str] | None = option(None, "Languages in which a method acts; by default all but the target.")
    tune: bool = option(False, "Choose each method's weight on validation prompts instead of taking the recorded one.")
    tune_seed: int = option(7, "Seed of the SFT data on which weights are chosen.")
    tune_budget: float = option(
        0.006, "Largest rise of masked perplexity over SFT that a chosen weight may cause, as a share."
    )

    evaluation_windows: int = option(250, "Number of teacher-forced test windows, all languages together.")
    sampled_prompts: int = option(320, "Number of test prompts in other languages; one sample per prompt and seed.")
    sampled_tokens: int = option(60, "Length of a sample, in tokens.")
    temperature: float = option(1.0, "Sampling temperature; no top-k, no top-p.")

    def __post_init__(self) -> None:
        self._check("switching", ARMS, _SHARES, _ABOVE_ZERO)
        if self.sae_layers > self.model_layers:
            raise UserValueError(f"sae_layers={self.sae_layers} exceeds the model's {self.model_layers} layers")
        if self.prior_windows < 0:
            raise UserValueError(f"prior_windows must be at least 0, got {self.prior_windows}")
        if self.identify not in ("script", "words"):
            raise UserValueError(f'identify is "script" or "words", got {self.identify!r}')
        if self.corpus is not None and self.texts is not None:
            raise UserValueError("give a folder (corpus) or single files (texts), not both")
        self.text_files()

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """The decoder layers with an SAE, from 0."""
        return tuple(range(self.model_layers - self.sae_layers, self.model_layers))

    def text_files(self) -> dict[str, str] | None:
        """`texts` as a mapping from name to file.

        Raises:
            ValueError: an entry that is not NAME=FILE, or a name given twice.
        """
        if self.texts is None:
            return None
        pairs = [entry.partition("=") for entry in self.texts]
        files = {name: place for name, _, place in pairs}
        if len(files) != len(pairs) or not all(name and place for name, place in files.items()):
            raise UserValueError(f"texts are NAME=FILE with different names, got {self.texts}")
        return files


_SHARES = ("switch", "sft_switch")
_ABOVE_ZERO = (
    "corpus_scale", "pretraining_learning_rate", "sft_learning_rate", "temperature", "tune_budget"
)  # fmt: skip
