"""All settings of the testbed: corpus, language model, SAEs, fine-tuning, evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qscope_posttrain.testbed.arms import ARMS


def _setting(default: Any, text: str) -> Any:
    """A dataclass field with a help text, as parsers of recipes read it."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TestbedConfig:
    """Settings of the testbed. The defaults are the demo's: under ten minutes on two CPU cores."""

    __test__ = False  # its name begins like a test's

    corpus: str | None = _setting(None, "Folder of <language>.txt; without one the package's generator writes it.")
    languages: list[str] | None = _setting(None, "Languages to read from the folder; all that are there by default.")
    target: str = _setting("zh", "Language into which the model switches.")
    corpus_scale: float = _setting(1.5, "Size of the generated corpus; 1 is about 2 MB in all.")
    vocabulary: int = _setting(2000, "Entries of the byte-level BPE tokenizer.")
    window: int = _setting(96, "Tokens in a window of text.")
    prompt: int = _setting(32, "Prompt tokens in a dialogue window; <sep> and the response follow.")

    hidden_size: int = _setting(128, "Width of the language model.")
    model_layers: int = _setting(4, "Decoder layers of the language model.")
    heads: int = _setting(4, "Attention heads; half as many for keys and values.")
    pretraining_steps: int = _setting(1200, "Optimiser steps of pretraining.")
    pretraining_batch_size: int = _setting(16, "Windows in a step; more steps serve better than larger ones.")
    pretraining_learning_rate: float = _setting(2e-3, "Peak learning rate; cosine to 3 per cent.")
    switch: float = _setting(0.15, "Share of the other languages' windows that turn into the target: the habit.")
    model_seed: int = _setting(0, "Seed of model, pretraining data and SAEs.")

    sae_layers: int = _setting(2, "How many of the last decoder layers get an SAE.")
    sae_expansion: int = _setting(8, "Latents over hidden size.")
    sae_k: int = _setting(32, "Active latents a token.")
    sae_steps: int = _setting(200, "Training steps of an SAE, 1024 tokens each.")
    sae_windows: int = _setting(1200, "Windows whose activations train the SAEs.")

    feature_windows: int = _setting(400, "Windows of the sft split on which features and thresholds are measured.")
    top: int = _setting(32, "Features kept per language and layer, by monolinguality.")

    arms: list[str] = _setting(list(ARMS), "Methods to compare; sft is always among them.")
    seeds: list[int] = _setting([101, 102], "Seeds of SFT data, their order and sampling, one run each.")
    sft_windows: int = _setting(800, "SFT windows a seed; each is seen once.")
    sft_batch_size: int = _setting(16, "Windows in an SFT step.")
    sft_learning_rate: float = _setting(2e-4, "Peak learning rate of SFT.")
    sft_switch: float = _setting(0.0, "Share of SFT windows with the habit; 0 is clean data.")
    tune: bool = _setting(False, "Choose each method's weight on validation prompts instead of taking the recorded one.")
    tune_seed: int = _setting(7, "Seed of the SFT data on which weights are chosen.")
    tune_budget: float = _setting(0.015, "Largest rise of masked perplexity over SFT that a chosen weight may cost.")

    evaluation_windows: int = _setting(250, "Teacher-forced test windows, all languages.")
    sampled_prompts: int = _setting(240, "Test prompts in other languages, one sample each and seed.")
    sampled_tokens: int = _setting(60, "Length of a sample.")
    temperature: float = _setting(1.0, "Sampling temperature; no top-k, no top-p.")
    workers: int | None = _setting(None, "Processes that run methods side by side, one thread each; one a core by default.")
    cache: str | None = _setting(None, "Folder of cached artefacts; ~/.cache/qscope_posttrain/testbed by default.")
    no_cache: bool = _setting(False, "Make everything again.")

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"testbed setting {name} must be at least 1, got {getattr(self, name)}")
        for name in ("switch", "sft_switch"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"testbed setting {name} is a share in [0, 1), got {getattr(self, name)}")
        for name in ("corpus_scale", "pretraining_learning_rate", "sft_learning_rate", "temperature", "tune_budget"):
            if not getattr(self, name) > 0:
                raise ValueError(f"testbed setting {name} must be above 0, got {getattr(self, name)}")
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown:
            raise ValueError(f"unknown methods {unknown}; the testbed has {', '.join(ARMS)}")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds must be different numbers, at least one; got {self.seeds}")
        if self.sae_layers > self.model_layers:
            raise ValueError(f"sae_layers={self.sae_layers} exceeds the model's {self.model_layers} layers")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """The decoder layers with an SAE, from 0."""
        return tuple(range(self.model_layers - self.sae_layers, self.model_layers))

    def subset(self, *names: str) -> dict[str, Any]:
        """Some settings as JSON values: what an artefact's key is made of."""
        values = asdict(self)
        return {name: values[name] for name in names}


_POSITIVE = (
    "vocabulary", "window", "prompt", "hidden_size", "model_layers", "heads", "pretraining_steps",
    "pretraining_batch_size", "sae_layers", "sae_expansion", "sae_k", "sae_steps", "sae_windows", "feature_windows",
    "top", "sft_windows", "sft_batch_size", "evaluation_windows", "sampled_prompts", "sampled_tokens",
)  # fmt: skip
