"""Artefacts under a name that says everything they depend on, so that a second run is quick and never stale.

The key of an artefact is a hash of its settings, of the keys of what it was made from, and of the code that makes it
with everything that this code imports. A folder appears under its key only when it is complete.
"""

from __future__ import annotations

import ast
import functools
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

_ROOT = Path(qscope_posttrain.__file__).parent
_VERSIONS = ("torch", "transformers", "tokenizers", "trl")
"""Packages whose version may change a result."""


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/qscope_posttrain/testbed`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "qscope_posttrain" / "testbed"


def source_fingerprint(*parts: str) -> str:
    """Hash of the code of parts of this package, such as "sae" or "testbed/windows.py", and of all that they import.

    Comments, docstrings and layout do not count: a Python file is hashed by its syntax tree, a C file by its bytes.

    Raises:
        FileNotFoundError: no such part.
    """
    waiting, files = [file for part in parts for file in _files_of(part)], set[str]()
    while waiting:
        file = waiting.pop()
        if file not in files:
            files.add(file)
            waiting += _imported(file)
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file} {_code_hash(file)}\n".encode())
    return digest.hexdigest()


def _files_of(part: str) -> list[str]:
    path = _ROOT / part
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.is_file()
    if not files:
        raise UserFileNotFoundError(f"no source under {path}")
    return [file.relative_to(_ROOT).as_posix() for file in files]


@functools.cache
def _tree(file: str) -> ast.Module:
    return ast.parse((_ROOT / file).read_bytes())


@functools.cache
def _imported(file: str) -> tuple[str, ...]:
    """Files of this package that a file imports, at any depth of its code, and the C files beside it."""
    names: set[str] = set()
    for node in ast.walk(_tree(file)) if file.endswith(".py") else ():
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is imported from a package may be a module of it.
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    found = [path for path in (_ROOT / file).parent.glob("*.c") if file.endswith(".py")]
    for name in names:
        first, *rest = name.split(".")
        if first == _ROOT.name:
            place = _ROOT.joinpath(*rest)
            found += [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
    return tuple(path.relative_to(_ROOT).as_posix() for path in found)


@functools.cache
def _code_hash(file: str) -> str:
    if not file.endswith(".py"):
        return hashlib.sha256((_ROOT / file).read_bytes()).hexdigest()
    tree = ast.parse((_ROOT / file).read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # A bare string is a docstring, of a field too.
            node.body = [line for line in body if not _is_text(line)] or [ast.Pass()]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


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
        if final.is_dir() and self.enabled:
            status(f"{kind}: from the cache, {final}")
            return final
        self.root.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=self.root))
        try:
            build(unfinished)
            unfinished.chmod(0o755)  # a temporary folder is for its owner's eyes only
            if not self.enabled and final.is_dir():
                shutil.rmtree(final)
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
