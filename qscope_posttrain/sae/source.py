"""Where an SAE comes from: a file, a folder, a name of the catalog, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.sae import catalog, download
from qscope_posttrain.sae.layout import choose, is_safe, is_weights, layer_in_path, weights_in
from qscope_posttrain.sae.weights_file import SETTINGS_FILES

_RELEASE = re.compile(r"SAE-Res-(?P<model>.+)-W(?P<width>\d{1,6})K-L0_(?P<k>\d{1,6})")
_HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<inside>.+))?")


@dataclass(frozen=True)
class SAESource:
    """Origin of an SAE, kept with it and with everything made from it."""

    location: str  # Hub repository id, absolute folder, or words such as "trained in memory"
    revision: str | None = None  # Commit of the hub repository
    file: str | None = None  # Path of the file in `location`
    sha256: str | None = None  # Digest of the file; None where only rows were read
    format: str = "memory"
    """"native", "qwen_scope", "gemma_scope", "gemma_scope_2", "llama_scope", "lm_saes", "sae_lens", "sparsify",
    "dictionary_learning", or "memory"."""
    release: str | None = None  # Published release, for example SAE-Res-Qwen3-1.7B-Base-W32K-L0_50, or catalog name
    origin: SAESource | None = None  # For a file written by this package: the source of the SAE before that

    def __str__(self) -> str:
        place = self.location if self.file is None else f"{self.location}/{self.file}"
        return place if self.revision is None else f"{place}@{self.revision[:12]}"

    @classmethod
    def from_dict(cls, values: Any) -> SAESource:
        """Inverse of `dataclasses.asdict`. ValueError for anything else."""
        if not isinstance(values, dict) or not values.keys() <= {field.name for field in fields(cls)}:
            raise UserValueError(f"not a description of an SAE source: {values!r}")
        texts = {key: value for key, value in values.items() if key != "origin"}
        if not isinstance(texts.get("location"), str) or any(not isinstance(v, str | None) for v in texts.values()):
            raise UserValueError(f"not a description of an SAE source: {values!r}")
        origin = values.get("origin")
        return cls(**texts, origin=None if origin is None else cls.from_dict(origin))


@dataclass(frozen=True)
class Release:
    """Facts in the name of a Qwen-Scope release: SAE-Res-<model>-W{width / 1024}K-L0_{k}."""

    name: str
    model: str
    d_sae: int
    k: int

    @classmethod
    def parse(cls, text: str) -> Release | None:
        """The release named in `text` (a repository id or one folder name), or None."""
        match = _RELEASE.search(text)
        if match is None:
            return None
        return cls(match.group(), match["model"], 1024 * int(match["width"]), int(match["k"]))


@dataclass(frozen=True)
class LocatedFile:
    """One SAE file on this machine, and what its location implies."""

    path: Path
    location: str
    layer: int | None  # Layer by its path, else the one the caller gave, else None
    release: Release | None = None
    revision: str | None = None
    file: str | None = None  # Path in `location`; the file name if None
    entry: catalog.CatalogEntry | None = None  # The release of the catalog by whose name it was requested

    def describe(self, format: str, sha256: str | None, origin: SAESource | None = None) -> SAESource:
        """The `SAESource` of this file."""
        release = self.release.name if self.release else origin.release if origin else None
        if release is None and self.entry is not None:
            release = self.entry.name
        return SAESource(self.location, self.revision, self.file or self.path.name, sha256, format, release, origin)


def locate(source: str | Path, layer: int | None = None, revision: str | None = None) -> LocatedFile:
    """Find the file of one layer: on disk first, then in the catalog, then on the hub.

    Args:
        source: A file; a folder with weights of a known layout in it or below it; a name of the catalog; or a hub
            repository id, followed by a folder or file in it where there are several
            ("google/gemma-scope-2b-pt-res/layer_20/width_16k"). From the hub only that layer's files are downloaded.
        layer: Layer number from 0. May be left out where there is only one.
        revision: Branch, tag or commit; only for a hub repository.
    """
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
        raise UserValueError(f"layer must be an integer from 0, got {layer!r}")
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise UserValueError(f"revision {revision!r} is only for hub repositories, but {path} is on this machine")
        return _local(path.absolute(), layer)
    entry = catalog.find(str(source))
    if entry is not None:
        if layer is None and len(entry.layers) > 1:
            raise UserValueError(f"{entry.name} has {len(entry.layers)} layers: say which one with layer=...")
        layer = entry.layers[0] if layer is None else layer
        return _fetched(entry.repository, entry.files_of(layer), layer, revision, entry)
    match = _HUB_ID.fullmatch(str(source).rstrip("/"))
    if match is None or is_weights(match["repository"]) or not is_safe(match["inside"] or "x"):
        close = catalog.suggestions(str(source))
        hint = f". Did you mean {' or '.join(close)}?" if close else ""
        raise UserFileNotFoundError(
            f"no SAE at {source}: no such file or folder, no name of the catalog, and not a hub repository id "
            f"(owner/name){hint}"
        )
    return _from_hub(match["repository"], match["inside"] or "", layer, revision)


def _local(path: Path, layer: int | None) -> LocatedFile:
    if path.is_dir() and not is_weights(path.name):
        path = path / choose(weights_in(path), layer, str(path), path.as_posix())
    releases = (Release.parse(folder.name) for folder in path.parents)
    release = next((release for release in releases if release), None)
    return LocatedFile(path, str(path.parent), _agreed(path.as_posix(), layer), release)


def _from_hub(repository: str, inside: str, layer: int | None, revision: str | None) -> LocatedFile:
    if layer is not None and not inside:  # the file name in Qwen-Scope; saves requesting the list of all files
        try:
            return _fetched(repository, [f"layer{layer}.sae.pt"], layer, revision)
        except download.NotInRepository:
            pass
    every = {name for name in download.list_files(repository, revision) if is_safe(name)}
    name = inside
    if inside not in every:
        below = f"{inside}/" if inside else ""
        where = f"hub repository {repository}" + (f", folder {inside}" if inside else "")
        names = [file.removeprefix(below) for file in every if file.startswith(below)]
        name = below + choose(names, layer, where, f"{repository}/{inside}")
    layer = _agreed(f"{repository}/{name}", layer)
    folder = name.rpartition("/")[0]
    places = [folder] + [folder.rpartition("/")[0]] * (folder.rpartition("/")[2] == "checkpoints")
    settings = [f"{place}/{file}".lstrip("/") for place in places for file in SETTINGS_FILES]
    return _fetched(repository, [name, *(file for file in settings if file in every)], layer, revision)


def _fetched(
    repository: str,
    files: list[str] | tuple[str, ...],
    layer: int | None,
    revision: str | None,
    entry: catalog.CatalogEntry | None = None,
) -> LocatedFile:
    """The first of `files` on this machine, once all of them are."""
    path = download.fetch(repository, files, revision)[0]
    parts = path.parts  # the hub's cache keeps a file under snapshots/<commit>/: what a branch name stood for today
    commit = next((parts[i + 1] for i in reversed(range(len(parts) - 2)) if parts[i] == "snapshots"), None)
    return LocatedFile(path, repository, layer, Release.parse(repository), commit or revision, files[0], entry)


def _agreed(path: str, layer: int | None) -> int | None:
    """The layer by the path, else the given one. ValueError if they differ."""
    named = layer_in_path(path)
    if None not in (named, layer) and named != layer:
        raise UserValueError(f"layer {layer} was asked for, but by its name {path} holds layer {named}")
    return layer if named is None else named
