"""All settings of the testbed: corpus, language model, SAEs, fine-tuning, evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.testbed.arms import ARMS, DEMO_ARMS
from qscope_posttrain.testbed.cores import resolve_device


@dataclass(frozen=True)
class TestbedConfig:
    """Settings of the testbed. The defaults are the demo's: under ten minutes on two CPU cores."""

    __test__ = False  # its name begins like a test's

    corpus: str | None = field(
        default=None, metadata={"help": "Folder of <language>.txt; without one the package's generator writes it."}
    )
    languages: list[str] | None = field(
        default=None, metadata={"help": "Languages to read from the folder; all that are there by default."}
    )
    texts: list[str] | None = field(
        default=None,
        metadata={"help": "Instead of a folder: NAME=FILE for each language or register, FILE.jsonl:FIELD for JSONL."},
    )
    target: str = field(default="zh", metadata={"help": "Language or register into which the model switches."})
    identify: Literal["script", "words"] = field(
        default="script",
        metadata={"help": "How a switch is seen: by the target's own script, or by its words where it has none."},
    )
    corpus_scale: float = field(default=1.5, metadata={"help": "Size of the generated corpus; 1 is about 2 MB in all."})
    vocabulary: int = field(default=2000, metadata={"help": "Entries of the byte-level BPE tokenizer."})
    window: int = field(default=96, metadata={"help": "Tokens in a window of text."})
    prompt: int = field(
        default=32, metadata={"help": "Prompt tokens in a dialogue window; <sep> and the response follow."}
    )

    hidden_size: int = field(default=128, metadata={"help": "Width of the language model."})
    model_layers: int = field(default=4, metadata={"help": "Decoder layers of the language model."})
    heads: int = field(default=4, metadata={"help": "Attention heads; half as many for keys and values."})
    pretraining_steps: int = field(default=1200, metadata={"help": "Optimiser steps of pretraining."})
    pretraining_batch_size: int = field(
        default=16, metadata={"help": "Windows in a step; more steps serve better than larger ones."}
    )
    pretraining_learning_rate: float = field(
        default=2e-3, metadata={"help": "Peak learning rate; cosine to 3 per cent."}
    )
    switch: float = field(
        default=0.15, metadata={"help": "Share of the other languages' windows that turn into the target: the habit."}
    )
    model_seed: int = field(default=0, metadata={"help": "Seed of model, pretraining data and SAEs."})

    sae_layers: int = field(default=2, metadata={"help": "How many of the last decoder layers get an SAE."})
    sae_expansion: int = field(default=8, metadata={"help": "Latents over hidden size."})
    sae_k: int = field(default=32, metadata={"help": "Active latents a token."})
    sae_steps: int = field(default=200, metadata={"help": "Training steps of an SAE, 1024 tokens each."})
    sae_windows: int = field(default=1200, metadata={"help": "Windows whose activations train the SAEs."})

    feature_windows: int = field(
        default=400, metadata={"help": "Windows of the sft split on which features and thresholds are measured."}
    )
    top: int = field(default=32, metadata={"help": "Features kept per language and layer, by monolinguality."})

    arms: list[str] = field(
        default_factory=lambda: list(DEMO_ARMS), metadata={"help": "Methods to compare; sft is always among them."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [101, 102],
        metadata={"help": "Seeds of SFT data, their order and sampling, one run each."},
    )
    sft_windows: int = field(default=800, metadata={"help": "SFT windows a seed; each is seen once."})
    sft_batch_size: int = field(default=16, metadata={"help": "Windows in an SFT step."})
    sft_learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of SFT."})
    sft_switch: float = field(default=0.0, metadata={"help": "Share of SFT windows with the habit; 0 is clean data."})
    prior_windows: int = field(
        default=0,
        metadata={"help": "Windows of plain SFT before a method begins, on a model for which no features were sought."},
    )
    penalised: list[str] | None = field(
        default=None, metadata={"help": "Languages in which a method acts; all but the target by default."}
    )
    tune: bool = field(
        default=False,
        metadata={"help": "Choose each method's weight on validation prompts instead of taking the recorded one."},
    )
    tune_seed: int = field(default=7, metadata={"help": "Seed of the SFT data on which weights are chosen."})
    tune_budget: float = field(
        default=0.006, metadata={"help": "Largest rise of masked perplexity over SFT that a chosen weight may cost."}
    )

    evaluation_windows: int = field(default=250, metadata={"help": "Teacher-forced test windows, all languages."})
    sampled_prompts: int = field(
        default=320, metadata={"help": "Test prompts in other languages, one sample each and seed."}
    )
    sampled_tokens: int = field(default=60, metadata={"help": "Length of a sample."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; no top-k, no top-p."})
    device: str = field(default="cpu", metadata={"help": "Where models are trained and run: cpu, cuda, or auto."})
    workers: int | None = field(
        default=None,
        metadata={"help": "Processes that run methods side by side, one thread each; one a core by default."},
    )
    cache: str | None = field(
        default=None, metadata={"help": "Folder of cached artefacts; ~/.cache/qscope_posttrain/testbed by default."}
    )
    no_cache: bool = field(default=False, metadata={"help": "Make everything again."})

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise UserValueError(f"testbed setting {name} must be at least 1, got {getattr(self, name)}")
        for name in ("switch", "sft_switch"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserValueError(f"testbed setting {name} is a share in [0, 1), got {getattr(self, name)}")
        for name in ("corpus_scale", "pretraining_learning_rate", "sft_learning_rate", "temperature", "tune_budget"):
            if not getattr(self, name) > 0:
                raise UserValueError(f"testbed setting {name} must be above 0, got {getattr(self, name)}")
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown:
            raise UserValueError(f"unknown methods {unknown}; the testbed has {', '.join(ARMS)}")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise UserValueError(f"seeds must be different numbers, at least one; got {self.seeds}")
        if self.pretraining_batch_size % 2:
            raise UserValueError(f"pretraining_batch_size must be even, got {self.pretraining_batch_size}")
        if self.sae_layers > self.model_layers:
            raise UserValueError(f"sae_layers={self.sae_layers} exceeds the model's {self.model_layers} layers")
        if self.prior_windows < 0:
            raise UserValueError(f"prior_windows must be at least 0, got {self.prior_windows}")
        if self.workers is not None and self.workers < 1:
            raise UserValueError(f"workers must be at least 1, got {self.workers}")
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

    def torch_device(self) -> str:
        """`device`, where "auto" is cuda if there is one."""
        return resolve_device(self.device)

    def subset(self, *names: str) -> dict[str, Any]:
        """Some settings as JSON values: what an artefact's key is made of."""
        values = asdict(self)
        return {name: values[name] for name in names}


_POSITIVE = (
    "vocabulary", "window", "prompt", "hidden_size", "model_layers", "heads", "pretraining_steps",
    "pretraining_batch_size", "sae_layers", "sae_expansion", "sae_k", "sae_steps", "sae_windows", "feature_windows",
    "top", "sft_windows", "sft_batch_size", "evaluation_windows", "sampled_prompts", "sampled_tokens",
)  # fmt: skip
