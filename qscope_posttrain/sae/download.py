"""Download files from the Hugging Face hub: show their sizes first, then resume where an earlier transfer stopped.

Cache and requests are those of huggingface_hub. Only the unfinished file is kept by this module, as
`blobs/<etag>.incomplete`: huggingface_hub (seen in 1.33 and 2.4) deletes or ignores it when a download ends early, so
that a process killed at 2.0 of 2.1 GB would start from nothing.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscope_posttrain.distributed import is_main_process
from qscope_posttrain.errors import UserError, UserFileNotFoundError, UserValueError
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.tables import Table

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ETAG = re.compile(r"[\w-][\w.-]{0,127}")


class Unreachable(UserError, ConnectionError):
    """The connection to the hub broke."""


class NotInRepository(UserFileNotFoundError):
    """The hub answered, and the repository does not hold the file at this revision."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub, and its state on this machine."""

    name: str
    size: int | None  # Bytes; None where the hub does not say
    etag: str  # Name of its content: the sha256 of a large file
    commit: str
    present: int  # Bytes of it on this machine
    is_cached: bool  # The whole file is in the cache

    @property
    def missing(self) -> int:
        """Bytes still to come, as far as known."""
        return max((self.size or 0) - self.present, 0)


def fetch(
    repository: str, files: Sequence[str], revision: str | None = None, *, show: bool | None = None
) -> list[Path]:
    """Paths of files of a hub repository, all of one commit, in the local cache; only what is missing is downloaded.

    The sizes are shown first (`show`; by default on rank 0) and compared with the free disk space. An interrupted
    transfer, even by kill -9, is resumed. Large files are checked against the sha256 that the hub states. Without
    network, files that are in the cache at this revision are taken from there, with a message.

    Raises:
        NotInRepository: the repository does not hold one of the files.
        FileNotFoundError: no such repository or revision, no access to it, or no network and not in the cache.
        ValueError: not enough space, or content that is not what the hub promised.
        ConnectionError: the transfer stopped; what arrived is kept.
    """
    cached = _all_cached(repository, files, revision)
    if cached is not None and revision is not None and _COMMIT.fullmatch(revision):
        return cached
    try:
        remote = describe(repository, files, revision)
    except _NotReachable as error:
        if cached is None:
            raise UserFileNotFoundError(str(error)) from error
        commit = cached[0].relative_to(_cache()).parts[2]  # models--owner--name/snapshots/<commit>/...
        status(f"{error.reason}: taking {repository} as it is in the cache, commit {commit[:12]}")
        return cached
    if any(not file.is_cached for file in remote):
        if is_main_process() if show is None else show:
            from rich.console import Console

            sizes_table(repository, remote).print(Console(stderr=True))
        folder = next(place for place in (_cache(), *_cache().parents) if place.exists())
        needed, free = sum(file.missing for file in remote), shutil.disk_usage(folder).free
        if needed > free:
            raise UserValueError(
                f"{in_words(needed)} are to be downloaded, but the disk of {_cache()} has {in_words(free)} left: take "
                "fewer layers at a time, make room, or set HF_HUB_CACHE to a folder on another disk."
            )
    return [_complete(repository, file, revision) for file in remote]


def describe(repository: str, files: Sequence[str], revision: str | None = None) -> list[RemoteFile]:
    """Size and state of some files, from the hub. Errors as in `fetch`."""
    first = _ask(repository, files[0], revision)
    return [first, *(_ask(repository, name, first.commit) for name in files[1:])]


def sizes_table(repository: str, files: Sequence[RemoteFile]) -> Table:
    """Size and state of each file."""

    def state(file: RemoteFile) -> str:
        if file.is_cached:
            return "in the cache"
        return f"{in_words(file.present)} of it are here" if file.present else "to download"

    rows = [[file.name, in_words(file.size), state(file)] for file in files]
    left = sum(file.missing for file in files)
    caption = f"{in_words(left)} to download into {_cache()}"
    return Table(f"{repository} at {files[0].commit[:12]}", ["file", "size", "state"], rows, caption)


def list_files(repository: str, revision: str | None = None) -> list[str]:
    """Names of all files of a repository. FileNotFoundError, with the reason, if the hub does not give the list."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(repository, revision=revision)
    except Exception as error:  # the HTTP library under huggingface_hub, and so its errors, differ by version
        raise UserFileNotFoundError(
            f"{repository} is not a path on this machine, and the list of its files could not be had from the Hugging "
            f"Face hub ({_first_line(error)}). Check the name, the revision, the network and your access, or give a "
            "local file or folder."
        ) from error


def in_words(size: int | None) -> str:
    """A number of bytes in three digits: 2.15 GB, 537 MB."""
    if size is None:
        return "unknown"
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


class _NotReachable(UserFileNotFoundError):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _ask(repository: str, name: str, revision: str | None) -> RemoteFile:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        answer = get_hf_file_metadata(hf_hub_url(repository, name, revision=revision))
    except Exception as error:  # the HTTP library under huggingface_hub, and so its errors, differ by version
        raise _explained(repository, name, revision, error) from error
    etag, commit = answer.etag or "", answer.commit_hash or ""
    # Both become names of files in the cache.
    if not _ETAG.fullmatch(etag) or not _COMMIT.fullmatch(commit):
        raise UserValueError(
            f"the hub describes {repository}/{name} with etag {etag!r} and commit {commit!r}: not a hub?"
        )
    blob = _blob(repository, etag)
    if blob.exists():
        return RemoteFile(name, blob.stat().st_size, etag, commit, blob.stat().st_size, is_cached=True)
    return RemoteFile(name, answer.size, etag, commit, _size(_part(blob)), is_cached=False)


def _complete(repository: str, file: RemoteFile, revision: str | None) -> Path:
    """Complete the blob in the cache, and let huggingface_hub link it into its snapshot."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import WeakFileLock

    if not file.is_cached:
        blob = _blob(repository, file.etag)
        lock = _cache() / ".locks" / blob.parent.parent.name / f"{file.etag}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # the lock that huggingface_hub takes for this blob
            if not blob.exists():
                _transfer(repository, file, _part(blob))
                _part(blob).replace(blob)
    try:
        return Path(hf_hub_download(repository, file.name, revision=revision))
    except Exception as error:
        raise _explained(repository, file.name, revision, error) from error


def _transfer(repository: str, file: RemoteFile, part: Path) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    from qscope_posttrain.provenance import file_sha256

    if file.size is None or _size(part) > file.size:
        part.unlink(missing_ok=True)
    url = hf_hub_url(repository, file.name, revision=file.commit)
    shown: dict[str, Any] = {"expected_size": file.size, "displayed_filename": file.name}
    try:
        with part.open("ab") as unfinished:
            http_get(url, unfinished, resume_size=unfinished.tell(), headers=build_hf_headers(), **shown)
    except Exception as error:
        raise Unreachable(
            f"the download of {repository}/{file.name} stopped after {in_words(_size(part))} of {in_words(file.size)} "
            f"({_first_line(error)}). Run the same command again: it goes on from there."
        ) from error
    if _SHA256.fullmatch(file.etag) and (found := file_sha256(part)) != file.etag:
        part.unlink()
        raise UserValueError(
            f"{repository}/{file.name} arrived with sha256 {found[:16]}..., but the hub promised {file.etag[:16]}...: "
            "it was deleted; download it again."
        )


def _all_cached(repository: str, files: Sequence[str], revision: str | None) -> list[Path] | None:
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(repository, name, cache_dir=_cache(), revision=revision) for name in files]
    paths = [Path(path) for path in found if isinstance(path, str)]
    return paths if len(paths) == len(files) else None


def _explained(repository: str, name: str, revision: str | None, error: Exception) -> FileNotFoundError:
    from huggingface_hub import constants, errors

    place = f"{repository} at {revision or 'its main branch'}"
    if isinstance(error, errors.GatedRepoError):
        return UserFileNotFoundError(
            f"{repository} is gated: accept its terms at {constants.ENDPOINT}/{repository}, then `hf auth login`."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserFileNotFoundError(
            f"no repository {repository} on {constants.ENDPOINT}, or it is private: check the name, or `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserFileNotFoundError(
            f"{repository} has no revision {revision!r}: give one of its branches, tags or commits."
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return NotInRepository(f"{place} holds no file {name}.")
    reason, advice = f"no answer from {constants.ENDPOINT} ({_first_line(error)})", "Check the network and HF_ENDPOINT"
    if isinstance(error, errors.OfflineModeIsEnabled):
        reason, advice = "HF_HUB_OFFLINE is set", "Unset it"
    return _NotReachable(
        reason,
        f"{reason}, and {name} of {place} is not in the cache {_cache()}. {advice}, or fetch it where there is a "
        f"network (`hf download {repository} {name}`) and copy the cache, or give a local file or folder.",
    )


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _blob(repository: str, etag: str) -> Path:
    return _cache() / f"models--{repository.replace('/', '--')}" / "blobs" / etag


def _part(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
