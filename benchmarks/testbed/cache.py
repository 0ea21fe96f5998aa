"""Artefacts in folders that are named after everything they depend on, so that a second run is quick.

The key of an artefact is a hash of its kind, of its maker's VERSION, of the settings it depends on, of the keys of what
it was made from, and of the versions of the libraries below. Code is not part of the key: **raise the VERSION of a
maker whenever the same settings would give other content**, also where the change is in code that the maker calls
(kernels, SAE training, a trainer, text generation). Renaming or moving code needs no new version.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from benchmarks.testbed.processes import run_in_parallel
from benchmarks.testbed.settings import TaskSettings
from qscope_posttrain.provenance import package_versions
from qscope_posttrain.report.progress import progress, status

_LIBRARIES = ("torch", "transformers", "tokenizers", "trl")
"""Packages whose version may change a result."""


Job = TypeVar("Job")


class Artefact(NamedTuple):
    """A folder in the cache and its key; the folder exists once the artefact is made."""

    folder: Path
    key: str


@dataclass(frozen=True)
class Cache:
    """Makes artefacts in folders under `root`, or finds them there."""

    root: Path
    enabled: bool = True
    """False: everything is made again and replaces what is there."""

    def place(self, kind: str, version: str, settings: Mapping[str, Any], inputs: Sequence[str] = ()) -> Artefact:
        """Return where an artefact lies that is made from `inputs` (keys of others) with `settings`."""
        libraries = {name: version for name, version in package_versions().items() if name in _LIBRARIES}
        content = {
            "kind": kind,
            "version": version,
            "settings": dict(settings),
            "inputs": list(inputs),
            "libraries": libraries,
        }
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        return Artefact(self.root / f"{kind}-{key}", key)

    def has(self, artefact: Artefact) -> bool:
        """Return whether it exists and may be used."""
        return self.enabled and artefact.folder.is_dir()

    def fill(self, artefact: Artefact, build: Callable[[Path], object]) -> Artefact:
        """Make the artefact unless it is there: `build(folder)` fills a folder that is moved into place when complete.

        If two processes make the same artefact at the same time, the folder of the first to finish is kept.
        """
        kind, final = artefact.folder.name.rpartition("-")[0], artefact.folder
        if self.has(artefact):
            status(f"{kind}: from the cache, {final}")
            return artefact
        self.root.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=self.root))
        try:
            build(unfinished)
            unfinished.chmod(0o755)  # mkdtemp makes folders that only their owner may read
            if not self.enabled and final.is_dir():
                shutil.rmtree(final)
            try:
                unfinished.rename(final)
            except OSError:
                if not final.is_dir():
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return artefact

    def make(
        self,
        kind: str,
        version: str,
        settings: Mapping[str, Any],
        build: Callable[[Path], object],
        inputs: Sequence[str] = (),
    ) -> Artefact:
        """Return the artefact at `place`, made first if it is not there."""
        return self.fill(self.place(kind, version, settings, inputs), build)


def run_missing(
    cache: Cache,
    jobs: Mapping[Artefact, Job],
    work: Callable[[tuple[Artefact, Job]], object],
    workers: int | None,
    description: str,
) -> None:
    """Call `work` on the jobs whose results are not in the cache, with their places, in up to `workers` processes."""
    missing = [(place, job) for place, job in jobs.items() if not cache.has(place)]
    for _ in progress(run_in_parallel(work, missing, workers), total=len(missing), description=description):
        pass


def default_cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/qscope_posttrain/testbed`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "qscope_posttrain" / "testbed"


def open_cache(settings: TaskSettings) -> Cache:
    """Return the cache that the settings ask for."""
    return Cache(Path(settings.cache) if settings.cache else default_cache_folder(), enabled=not settings.no_cache)
