"""Settings that both tasks share. Help texts are made of them, so torch is imported only when needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from qscope_posttrain.errors import UserValueError


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with a help text; a list is copied for each instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Method:
    """One way to train; everything else (data, order, optimizer, sampling) is the same for all methods of a task."""

    name: str
    """Key in settings and files."""
    title: str
    """Name in tables and plots."""
    description: str
    """One line for the report."""

    WORDS: ClassVar[tuple[str, ...]] = ("title", "description")
    """Fields that decide nothing about the result of a run."""

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the result of a run, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name not in self.WORDS}


@dataclass(frozen=True)
class TaskSettings:
    """Fields that the settings of both tasks share."""

    device: str = option("cpu", "Where models are trained and run: cpu, cuda, or auto.")
    workers: int | None = option(None, "Processes that run methods in parallel, one thread each; one per core.")
    cache: str | None = option(None, "Folder of cached artefacts; ~/.cache/qscope_posttrain/testbed by default.")
    no_cache: bool = option(False, "Ignore the cache and make everything again.")

    def torch_device(self) -> str:
        """Resolve `device`: "auto" is cuda if there is one, else the CPU."""
        if self.device != "auto":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def subset(self, names: Sequence[str]) -> dict[str, Any]:
        """Return some settings as JSON values, for the key of an artefact."""
        values = asdict(self)
        return {name: values[name] for name in names}

    def _check(
        self, task: str, known_arms: Mapping[str, Any], shares: Sequence[str], above_zero: Sequence[str]
    ) -> None:
        """Check numbers, arms, seeds and what is declared here; whole numbers are counts, except seeds and zeros."""
        values = asdict(self)
        counts = [f.name for f in fields(self) if type(f.default) is int and f.default and "seed" not in f.name]
        for names, fits, expected in (
            (counts, lambda value: value >= 1, "must be at least 1"),
            (shares, lambda value: 0.0 <= value < 1.0, "is a share in [0, 1)"),
            (above_zero, lambda value: value > 0, "must be above 0"),
        ):
            for name in names:
                if not fits(values[name]):
                    raise UserValueError(f"{task} setting {name} {expected}, got {values[name]}")
        unknown = sorted(set(values["arms"]) - set(known_arms))
        if unknown:
            raise UserValueError(f"unknown methods {unknown}; the {task} task has {', '.join(known_arms)}")
        seeds = values["seeds"]
        if len(set(seeds)) != len(seeds) or not seeds:
            raise UserValueError(f"seeds must be different numbers, at least one; got {seeds}")
        if self.workers is not None and self.workers < 1:
            raise UserValueError(f"workers must be at least 1, got {self.workers}")
        if self.device not in ("cpu", "cuda", "auto"):
            raise UserValueError(f"{task} setting device is cpu, cuda or auto, got {self.device!r}")
        if values["pretraining_batch_size"] % 2:
            raise UserValueError(f"pretraining_batch_size must be even, got {values['pretraining_batch_size']}")
