"""Where a dictionary comes from: a file, a folder, a name of the catalogue, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.provenance import file_sha256
from qscope_posttrain.sae import catalog
from qscope_posttrain.sae.catalog_entry import CatalogEntry
from qscope_posttrain.sae.containers.weights_file import SETTINGS_FILES
from qscope_posttrain.sae.layout import choose, is_safe, is_weights, layer_in_path, weights_in

_RELEASE = re.compile(r"SAE-Res-(?P<model>.+)-W(?P<width>\d{1,6})K-L0_(?P<k>\d{1,6})")
_HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<inside>.+))?")


@dataclass(frozen=True)
class SAESource:
    """Origin of a dictionary, kept with it and with everything made from it."""

    location: str
    """Hub repository id, absolute folder, or words such as "trained in memory"."""
    revision: str | None = None
    """Commit of the hub repository."""
    file: str | None = None
    """Path of the file inside `location`."""
    sha256: str | None = None
    """Digest of the file. Full loads record it; row reads leave it None until `with_sha256` is asked."""
    format: str = "memory"
    """"native", "qwen_scope", "gemma_scope", "gemma_scope_2", "llama_scope", "lm_saes", "sae_lens", "sparsify",
    "dictionary_learning", or "memory"."""
    release: str | None = None
    """Published release, for example SAE-Res-Qwen3-1.7B-Base-W32K-L0_50, or a name of the catalogue."""
    origin: SAESource | None = None
    """For a file written by this package: where the dictionary came from before that."""

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
    """What the name of a Qwen-Scope release says: SAE-Res-<model>-W{width / 1024}K-L0_{k}."""

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
    """One dictionary file on this machine, and what its place says about it."""

    path: Path
    location: str
    layer: int | None
    """Layer by its path, else the one the caller gave, else None."""
    release: Release | None = None
    revision: str | None = None
    file: str | None = None
    """Path inside `location`; the file name if None."""
    entry: CatalogEntry | None = None
    """The release of the catalogue that it was asked for as."""

    def describe(self, format: str, sha256: str | None, origin: SAESource | None = None) -> SAESource:
        """The `SAESource` of this file."""
        release = self.release.name if self.release else (origin.release if origin else None)
        if release is None and self.entry is not None:
            release = self.entry.name
        return SAESource(self.location, self.revision, self.file or self.path.name, sha256, format, release, origin)


def locate(source: str | Path, layer: int | None = None, revision: str | None = None) -> LocatedFile:
    """Find the file of one layer. What exists on disk goes before the catalogue, and that before the hub.

    Args:
        source: A file; a folder with the weights of some layout in it or below it; a name of the catalogue; or a hub
            repository id, with a folder or file of it behind where there are several ("google/gemma-scope-2b-pt-res/
            layer_20/width_16k"). From the hub only that layer's files are downloaded.
        layer: Layer number from 0. May be left out where there is only one.
        revision: Branch, tag or commit; only for a hub repository.

    Raises:
        FileNotFoundError: `source` is neither on disk nor on the hub, or holds no weights.
        ValueError: the layer is missing or contradicts the path, or there are several candidates, which are listed.
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
        return _from_catalogue(entry, layer, revision)
    match = _HUB_ID.fullmatch(str(source).rstrip("/"))
    if match is None or is_weights(match["repository"]) or not is_safe(match["inside"] or "x"):
        close = catalog.suggestions(str(source))
        hint = f". Did you mean {' or '.join(close)}?" if close else ""
        raise UserFileNotFoundError(
            f"no SAE at {source}: no such file or folder, no name of the catalogue, and not a hub repository id "
            f"(owner/name){hint}"
        )
    return _from_hub(match["repository"], match["inside"] or "", layer, revision)


def with_sha256(source: SAESource) -> SAESource:
    """`source` with the digest of its file, computed now if it is not known (about a second per gigabyte).

    Raises ValueError where there is no file, FileNotFoundError where it is gone.
    """
    if source.sha256 is not None:
        return source
    if source.file is None:
        raise UserValueError(f"the SAE source {source} is not a file, so it has no sha256")
    path = Path(source.location) / source.file
    if source.revision is not None:
        path = _fetch(source.location, [source.file], source.revision)
    return replace(source, sha256=file_sha256(path))


def _local(path: Path, layer: int | None) -> LocatedFile:
    if path.is_dir() and not is_weights(path.name):
        path = path / choose(weights_in(path), layer, str(path), path.as_posix())
    named = layer_in_path(path.as_posix())
    if None not in (named, layer) and named != layer:
        raise UserValueError(f"layer {layer} was asked for, but by its name {path} holds layer {named}")
    releases = (Release.parse(folder.name) for folder in path.parents)
    release = next((release for release in releases if release), None)
    return LocatedFile(path, str(path.parent), layer if named is None else named, release)


def _from_catalogue(entry: CatalogEntry, layer: int | None, revision: str | None) -> LocatedFile:
    if layer is None:
        if len(entry.layers) > 1:
            raise UserValueError(f"{entry.name} has {len(entry.layers)} layers: say which one with layer=...")
        layer = entry.layers[0]
    files = entry.files_of(layer)
    path = _fetch(entry.repository, files, revision)
    release = Release.parse(entry.repository)
    return LocatedFile(path, entry.repository, layer, release, _commit(path) or revision, files[0], entry)


def _from_hub(repository: str, inside: str, layer: int | None, revision: str | None) -> LocatedFile:
    from qscope_posttrain.sae.download import NotInRepository

    release = Release.parse(repository)
    if layer is not None and not inside:  # what Qwen-Scope names its files; saves asking for the list of all
        name = f"layer{layer}.sae.pt"
        try:
            path = _fetch(repository, [name], revision)
            return LocatedFile(path, repository, layer, release, _commit(path) or revision, name)
        except NotInRepository:
            pass
    every = _listing(repository, revision)
    name = inside
    if inside not in every:
        below = f"{inside}/" if inside else ""
        where = f"hub repository {repository}" + (f", folder {inside}" if inside else "")
        names = [file.removeprefix(below) for file in every if file.startswith(below)]
        name = below + choose(names, layer, where, f"{repository}/{inside}")
    named = layer_in_path(f"{repository}/{name}")
    if None not in (named, layer) and named != layer:
        raise UserValueError(f"layer {layer} was asked for, but by its name {repository}/{name} holds layer {named}")
    path = _fetch(repository, [name, *_settings_of(name, every)], revision)
    layer = layer if named is None else named
    return LocatedFile(path, repository, layer, release, _commit(path) or revision, name)


def _settings_of(name: str, every: set[str]) -> list[str]:
    folder = name.rpartition("/")[0]
    places = [folder] + [folder.rpartition("/")[0]] * (folder.rpartition("/")[2] == "checkpoints")
    wanted = (f"{place}/{settings}".lstrip("/") for place in places for settings in SETTINGS_FILES)
    return [file for file in wanted if file in every]


def _fetch(repository: str, files: Sequence[str], revision: str | None) -> Path:
    """Path of the first of `files` on this machine, once all of them are."""
    from qscope_posttrain.sae.download import fetch

    return fetch(repository, files, revision)[0]


def _commit(path: Path) -> str | None:
    """The hub's cache keeps a file under snapshots/<commit>/: what a branch name stood for today."""
    parts = path.parts
    return next((parts[i + 1] for i in reversed(range(len(parts) - 2)) if parts[i] == "snapshots"), None)


def _listing(repository: str, revision: str | None) -> set[str]:
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(repository, revision=revision)
    except Exception as error:  # the HTTP library under huggingface_hub, and so its errors, differ by version
        reason = str(error).strip().splitlines()
        raise UserFileNotFoundError(
            f"{repository} is not a path on this machine, and the list of its files could not be had from the Hugging "
            f"Face hub ({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Check the name, the "
            "revision, the network and your access, or give a local file or folder."
        ) from error
    return {name for name in names if is_safe(name)}
