"""Where a dictionary comes from: a file, a folder of layer files, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qscope_posttrain.provenance import file_sha256

LAYER_FILE = re.compile(r"layer(?P<layer>\d{1,6})\.sae\.(?:pt|safetensors)")
"""Name of one layer's file: `layer{n}.sae.pt` in Qwen-Scope, `layer{n}.sae.safetensors` in the package's own format."""

_RELEASE = re.compile(r"SAE-Res-(?P<model>.+)-W(?P<width>\d{1,6})K-L0_(?P<k>\d{1,6})")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class SAESource:
    """Origin of a dictionary, kept with it and with everything made from it."""

    location: str
    """Hub repository id, absolute folder, or words such as "trained in memory"."""
    revision: str | None = None
    """Commit of the hub repository."""
    file: str | None = None
    """File name inside `location`."""
    sha256: str | None = None
    """Digest of the file. Full loads record it; row reads leave it None until `with_sha256` is asked."""
    format: str = "memory"
    """"qwen_scope", "native" or "memory"."""
    release: str | None = None
    """Published release, for example SAE-Res-Qwen3-1.7B-Base-W32K-L0_50."""
    origin: SAESource | None = None
    """For a file written by this package: where the dictionary came from before that."""

    def __str__(self) -> str:
        place = self.location if self.file is None else f"{self.location}/{self.file}"
        return place if self.revision is None else f"{place}@{self.revision[:12]}"

    @classmethod
    def from_dict(cls, values: Any) -> SAESource:
        """Inverse of `dataclasses.asdict`. ValueError for anything else."""
        if not isinstance(values, dict) or not values.keys() <= {field.name for field in fields(cls)}:
            raise ValueError(f"not a description of an SAE source: {values!r}")
        texts = {key: value for key, value in values.items() if key != "origin"}
        if not isinstance(texts.get("location"), str) or any(not isinstance(v, str | None) for v in texts.values()):
            raise ValueError(f"not a description of an SAE source: {values!r}")
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
    """Layer by file name, else the one the caller gave, else None."""
    release: Release | None
    revision: str | None = None

    def describe(self, format: str, sha256: str | None, origin: SAESource | None = None) -> SAESource:
        """The `SAESource` of this file."""
        release = self.release.name if self.release else (origin.release if origin else None)
        return SAESource(self.location, self.revision, self.path.name, sha256, format, release, origin)


def locate(source: str | Path, layer: int | None = None, revision: str | None = None) -> LocatedFile:
    """Find the file of one layer.

    Args:
        source: A file, a folder that holds `layer{n}.sae.pt` or `layer{n}.sae.safetensors`, or a hub repository id
            ("Qwen/SAE-Res-..."), from which only that layer's file is downloaded (with huggingface_hub's progress bar
            and cache). What exists on disk goes before the hub.
        layer: Layer number from 0. May be left out where there is only one.
        revision: Branch, tag or commit; only for a hub repository.

    Raises:
        FileNotFoundError: `source` is neither on disk nor on the hub, or holds no layer file.
        ValueError: the layer is missing, ambiguous, or contradicts the file's name.
    """
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
        raise ValueError(f"layer must be an integer from 0, got {layer!r}")
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision {revision!r} is only for hub repositories, but {path} is on this machine")
        if path.is_dir():
            path = path / choose_layer_file((entry.name for entry in path.iterdir()), layer, str(path))
        return _local_file(path.absolute(), layer)
    if not _HUB_ID.fullmatch(str(source)) or LAYER_FILE.fullmatch(path.name):
        raise FileNotFoundError(f"no SAE at {source}: no such file or folder, and not a hub repository id (owner/name)")
    return _download(str(source), layer, revision)


def choose_layer_file(names: Iterable[str], layer: int | None, where: str) -> str:
    """The file of `layer` among `names`; with `layer` None, the only one."""
    by_layer: dict[int, list[str]] = {}
    for name in sorted(names):
        if match := LAYER_FILE.fullmatch(name):
            by_layer.setdefault(int(match["layer"]), []).append(name)
    if not by_layer:
        raise FileNotFoundError(f"{where} holds no file named layer<n>.sae.pt or layer<n>.sae.safetensors")
    if layer is None and len(by_layer) > 1:
        raise ValueError(f"{where} holds layers {_ranges(by_layer)}: say which one with layer=...")
    wanted = next(iter(by_layer)) if layer is None else layer
    if wanted not in by_layer:
        raise ValueError(f"{where} has no layer {wanted}; it holds layers {_ranges(by_layer)} (counted from 0)")
    if len(by_layer[wanted]) > 1:
        raise ValueError(f"{where} holds layer {wanted} more than once ({', '.join(by_layer[wanted])}): give the file")
    return by_layer[wanted][0]


def with_sha256(source: SAESource) -> SAESource:
    """`source` with the digest of its file, computed now if it is not known (about a second per gigabyte).

    Raises ValueError where there is no file, FileNotFoundError where it is gone.
    """
    if source.sha256 is not None:
        return source
    if source.file is None:
        raise ValueError(f"the SAE source {source} is not a file, so it has no sha256")
    path = Path(source.location) / source.file
    if source.revision is not None:
        path = _hub_file(source.location, source.file, source.revision)
    return replace(source, sha256=file_sha256(path))


def _local_file(path: Path, layer: int | None) -> LocatedFile:
    match = LAYER_FILE.fullmatch(path.name)
    if match and layer is not None and int(match["layer"]) != layer:
        raise ValueError(f"layer {layer} was asked for, but by its name {path} holds layer {int(match['layer'])}")
    named = (Release.parse(folder.name) for folder in path.parents)
    release = next((release for release in named if release), None)
    return LocatedFile(path, str(path.parent), int(match["layer"]) if match else layer, release)


def _download(repository: str, layer: int | None, revision: str | None) -> LocatedFile:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name = f"layer{layer}.sae.pt"
    try:
        if layer is None:
            name = choose_layer_file(_hub_listing(repository, revision), layer, f"hub repository {repository}")
        path = _hub_file(repository, name, revision)
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(_unreachable(repository, name, error)) from error
    except EntryNotFoundError:
        name = choose_layer_file(_hub_listing(repository, revision), layer, f"hub repository {repository}")
        path = _hub_file(repository, name, revision)
    match = LAYER_FILE.fullmatch(name)
    # The cache keeps a file under snapshots/<commit>/: that commit is what a branch name stood for today.
    commit = path.parent.name if path.parent.parent.name == "snapshots" else revision
    return LocatedFile(path, repository, int(match["layer"]) if match else layer, Release.parse(repository), commit)


def _hub_file(repository: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(_unreachable(repository, name, error)) from error


def _hub_listing(repository: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(repository, revision=revision)
    except Exception as error:  # the HTTP library under huggingface_hub, and so its errors, differ by version
        raise FileNotFoundError(_unreachable(repository, "its list of files", error)) from error


def _unreachable(repository: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return (
        f"{repository} is not a path on this machine, and {name} could not be had from the Hugging Face hub "
        f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}). Check the name, the revision, "
        "the network and your access, or give a local file or folder."
    )


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0..2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)
