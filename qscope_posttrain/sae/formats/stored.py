"""What every format reader returns, and the checks that come before any reader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qscope_posttrain.sae.activations import Activation
from qscope_posttrain.sae.source import SAESource


@dataclass(frozen=True)
class StoredSAE:
    """A dictionary on disk, in canonical orientation: structure checked, values not yet read."""

    path: Path
    format: str
    W_enc: Tensor
    """[d_sae, d_model]"""
    b_enc: Tensor
    """[d_sae]"""
    W_dec: Tensor
    """[d_sae, d_model]; a transposed view where the file stores the directions as columns."""
    b_dec: Tensor
    """[d_model]"""
    memory_mapped: bool
    """The tensors are pages of the file, never written to: reading rows may hand such pages back to the kernel."""
    activation: Activation | None = None
    """None where the file does not say it."""
    layer: int | None = None
    """Layer recorded inside the file."""
    origin: SAESource | None = None


def check_is_file_with_data(path: Path) -> int:
    """Size of the file in bytes. Errors for what is often found in place of the weights."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes): the download or copy failed, fetch it again")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
    return size
