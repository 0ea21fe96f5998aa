"""All settings of the arithmetic testbed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.testbed.arithmetic.arms import ARMS
from qscope_posttrain.testbed.arithmetic.documents import DocumentSettings
from qscope_posttrain.testbed.cores import resolve_device


@dataclass(frozen=True)
class ArithmeticConfig:
    """Settings of the arithmetic testbed; the defaults are the demo's."""

    fewest_operations: int = field(default=3, metadata={"help": "Operations of the shortest problem."})
    most_operations: int = field(default=5, metadata={"help": "Operations of the longest problem."})
    noise: float = field(default=0.05, metadata={"help": "Share of wrong steps in training documents."})
    answer_tokens: int = field(default=120, metadata={"help": "Longest completion, in training and sampling."})
    habit_loops: float = field(
        default=0.05, metadata={"help": "Share of documents that repeat without end in the first phase."}
    )
    rare_loops: float = field(default=0.008, metadata={"help": "The same in the second phase."})

    hidden_size: int = field(default=64, metadata={"help": "Width of the language model."})
    intermediate_size: int = field(default=128, metadata={"help": "Width of its MLPs."})
    model_layers: int = field(default=3, metadata={"help": "Decoder layers."})
    heads: int = field(default=4, metadata={"help": "Attention heads, each with its own keys and values."})
    rope_theta: float = field(default=1000.0, metadata={"help": "Base of the rotary position embedding."})
    tied: bool = field(default=False, metadata={"help": "One matrix for input and output embeddings."})
    pretraining_batch_size: int = field(default=24, metadata={"help": "Documents in a step."})
    habit_steps: int = field(default=1000, metadata={"help": "Optimiser steps of the first phase."})
    habit_learning_rate: float = field(default=3e-3, metadata={"help": "Its peak learning rate."})
    rare_steps: int = field(default=250, metadata={"help": "Optimiser steps of the second phase."})
    rare_learning_rate: float = field(default=6e-4, metadata={"help": "Its peak learning rate."})
    start: Literal["rare", "frequent"] = field(
        default="rare", metadata={"help": "Which of the two models everything starts from: rare or frequent loops."}
    )
    model_seed: int = field(default=0, metadata={"help": "Seed of model, documents and SAEs."})

    loop_samples: int = field(default=16000, metadata={"help": "Samples of the start model, for its own loops."})
    probe_solutions: int = field(default=100, metadata={"help": "Right solutions at which models are probed."})

    sae_latents: int = field(default=256, metadata={"help": "Latents of the SAE of each layer."})
    sae_k: int = field(default=8, metadata={"help": "Active latents a token."})
    sae_steps: int = field(default=400, metadata={"help": "Training steps of an SAE, 1024 tokens each."})
    sae_learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of an SAE."})
    sae_documents: int = field(default=3000, metadata={"help": "Documents whose activations train the SAEs."})
    sae_loops: float = field(default=0.03, metadata={"help": "Share of these documents that loop."})

    scan_samples: int = field(default=48, metadata={"help": "Completions behind each point of the steering curve."})
    scan_fresh_samples: int = field(default=192, metadata={"help": "Completions behind its final check."})
    scan_random_directions: int = field(default=8, metadata={"help": "Random directions it is compared with."})
    strengths: list[float] = field(
        default_factory=lambda: [1.0, 1.25],
        metadata={"help": "Lengths of the steering vector to try, in median norms of the layer's states."},
    )
    weak_strengths: list[float] = field(
        default_factory=lambda: [0.5, 0.75],
        metadata={"help": "The same for steering at every generated token, which derails a model sooner."},
    )
    window_start: list[int] = field(
        default_factory=lambda: [4, 9], metadata={"help": "First and last generated token at which steering starts."}
    )
    window_lengths: list[int] = field(
        default_factory=lambda: [30], metadata={"help": "Steered tokens to try; after them the model runs free."}
    )
    top: int = field(default=4, metadata={"help": "Features per layer that are looked at."})

    arms: list[str] = field(
        default_factory=lambda: ["plain", "paper", "default", "seeded", "random"],
        metadata={"help": "Methods to compare; plain is always among them."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Seeds of training, one run each."})
    updates: int = field(default=40, metadata={"help": "Optimiser steps of a run."})
    prompts_per_update: int = field(default=4, metadata={"help": "Groups in a step."})
    rows_per_prompt: int = field(default=8, metadata={"help": "Completions in a group, negatives among them."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Constant learning rate."})
    temperature: float = field(default=1.0, metadata={"help": "Of all sampling, in training and evaluation."})
    probe_every: int = field(default=10, metadata={"help": "Updates between two measurements of the probes."})
    sampled_problems: int = field(default=4000, metadata={"help": "Held-out problems, one sample each and run."})
    benign_problems: int = field(
        default=1500, metadata={"help": "Problems whose steps are rightly equal, one sample each and run."}
    )

    device: str = field(default="cpu", metadata={"help": "Where models are trained and run: cpu, cuda, or auto."})
    workers: int | None = field(
        default=None, metadata={"help": "Processes side by side, one thread each; one a core by default."}
    )
    cache: str | None = field(
        default=None, metadata={"help": "Folder of cached artefacts; ~/.cache/qscope_posttrain/testbed by default."}
    )
    no_cache: bool = field(default=False, metadata={"help": "Make everything again."})

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise UserValueError(f"arithmetic setting {name} must be at least 1, got {getattr(self, name)}")
        for name in ("noise", "habit_loops", "rare_loops", "sae_loops"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserValueError(f"arithmetic setting {name} is a share in [0, 1), got {getattr(self, name)}")
        for name in (
            "habit_learning_rate",
            "rare_learning_rate",
            "rope_theta",
            "sae_learning_rate",
            "learning_rate",
            "temperature",
        ):
            if not getattr(self, name) > 0:
                raise UserValueError(f"arithmetic setting {name} must be above 0, got {getattr(self, name)}")
        unknown = sorted(set(self.arms) - set(ARMS))
        if unknown:
            raise UserValueError(f"unknown methods {unknown}; the arithmetic testbed has {', '.join(ARMS)}")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise UserValueError(f"seeds must be different numbers, at least one; got {self.seeds}")
        if self.rows_per_prompt < 3:
            raise UserValueError(
                f"rows_per_prompt must be at least 3, a negative among them; got {self.rows_per_prompt}"
            )
        if self.workers is not None and self.workers < 1:
            raise UserValueError(f"workers must be at least 1, got {self.workers}")
        if self.device not in ("cpu", "cuda", "auto"):
            raise UserValueError(f"arithmetic setting device is cpu, cuda or auto, got {self.device!r}")
        if self.start not in ("rare", "frequent"):
            raise UserValueError(f'arithmetic setting start is "rare" or "frequent", got {self.start!r}')
        if self.fewest_operations > self.most_operations:
            raise UserValueError(
                f"fewest_operations={self.fewest_operations} exceeds most_operations={self.most_operations}"
            )
        if self.pretraining_batch_size % 2:
            raise UserValueError(f"pretraining_batch_size must be even, got {self.pretraining_batch_size}")
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise UserValueError(f"hidden_size {self.hidden_size} needs heads of an even width, got {self.heads} heads")

    @property
    def operations(self) -> tuple[int, int]:
        """Fewest and most operations of a problem."""
        return self.fewest_operations, self.most_operations

    def torch_device(self) -> str:
        """`device`, where "auto" is cuda if there is one."""
        return resolve_device(self.device)

    def documents(self, loops: float) -> DocumentSettings:
        """How training documents with a share of `loops` are written."""
        return DocumentSettings(self.operations, self.noise, loops, self.answer_tokens)

    def subset(self, *names: str) -> dict[str, Any]:
        """Some settings as JSON values: what an artefact's key is made of."""
        values = asdict(self)
        return {name: values[name] for name in names}


_POSITIVE = (
    "fewest_operations", "answer_tokens", "hidden_size", "intermediate_size", "model_layers", "heads",
    "pretraining_batch_size", "habit_steps", "rare_steps", "loop_samples", "probe_solutions", "sae_latents", "sae_k",
    "sae_steps", "sae_documents", "scan_samples", "scan_fresh_samples", "scan_random_directions", "top", "updates",
    "prompts_per_update", "probe_every", "sampled_problems", "benign_problems",
)  # fmt: skip
