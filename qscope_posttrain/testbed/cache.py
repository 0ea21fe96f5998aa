"""Artefacts under a name that says everything they depend on, so that a second run is quick and never stale.

The key of an artefact is a hash of its settings, of the keys of what it was made from, and of the source code that
makes it. A folder appears under its key only when it is complete.
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
from typing import Any, Protocol

import qscope_posttrain
from qscope_posttrain.errors import UserFileNotFoundError
from qscope_posttrain.provenance import package_versions
from qscope_posttrain.report.progress import status

_VERSIONS = ("torch", "transformers", "tokenizers", "trl")
"""Packages whose version may change a result."""


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/qscope_posttrain/testbed`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "qscope_posttrain" / "testbed"


def source_fingerprint(*packages: str) -> str:
    """Hash of the source files of parts of this package, such as "sae" or "testbed/windows.py".

    Raises:
        FileNotFoundError: no such part.
    """
    root = Path(qscope_posttrain.__file__).parent
    digest = hashlib.sha256()
    for package in packages:
        path = root / package
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        if not files:
            raise UserFileNotFoundError(f"no source under {path}")
        for file in files:
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """Builds artefacts in folders under `root`, or finds them there."""

    root: Path
    """Where artefacts lie."""
    enabled: bool = True
    """False: everything is built again (and then replaces what lies there)."""

    def key(self, settings: Mapping[str, Any], sources: Sequence[str], inputs: Sequence[str] = ()) -> str:
        """The key of an artefact made from `inputs` (other keys) with `settings` by the code in `sources`."""
        versions = {name: version for name, version in package_versions().items() if name in _VERSIONS}
        content = json.dumps(
            {
                "settings": dict(settings),
                "inputs": list(inputs),
                "source": source_fingerprint(*sources),
                "versions": versions,
            },
            sort_keys=True,
            ensure_ascii=True,
        )
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def folder(self, kind: str, key: str, build: Callable[[Path], None]) -> Path:
        """The folder of artefact `key`; if it is not there, `build(folder)` fills it first.

        Two processes that build the same key do the work twice and agree: the first to finish stays.
        """
        final = self.root / f"{kind}-{key}"
        if final.is_dir():
            if self.enabled:
                status(f"{kind}: from the cache, {final}")
                return final
            shutil.rmtree(final)
        self.root.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=self.root))
        try:
            build(unfinished)
            unfinished.chmod(0o755)  # a temporary folder is for its owner's eyes only
            try:
                unfinished.rename(final)
            except OSError:
                if not final.is_dir():
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return final


class CacheSettings(Protocol):
    """Settings of a testbed that say where artefacts are kept."""

    @property
    def cache(self) -> str | None:
        """Folder; None for the default one."""

    @property
    def no_cache(self) -> bool:
        """Whether everything is made again."""


def open_cache(settings: CacheSettings) -> Cache:
    """The cache that the settings ask for."""
    return Cache(Path(settings.cache) if settings.cache else default_cache_folder(), enabled=not settings.no_cache)
