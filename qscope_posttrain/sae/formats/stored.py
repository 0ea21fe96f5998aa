"""What every format reader returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from qscope_posttrain.sae.activations import Activation
from qscope_posttrain.sae.folding import Fold
from qscope_posttrain.sae.source import SAESource


@dataclass(frozen=True)
class StoredSAE:
    """A dictionary on disk, in canonical orientation: structure checked, values not yet read."""

    path: Path
    format: str
    W_enc: Tensor
    """[d_sae, d_model]; a transposed view where the file stores the features as columns."""
    b_enc: Tensor
    """[d_sae]"""
    W_dec: Tensor
    """[d_sae, d_model]; a transposed view where the file stores the directions as columns."""
    b_dec: Tensor
    """[d_model]"""
    memory_mapped: bool
    """The tensors are pages of the file, never written to: reading rows may hand such pages back to the kernel."""
    fold: Fold = field(default_factory=Fold)
    """What has to be folded into these four."""
    activation: Activation | None = None
    """In units after folding; None where the file does not say it."""
    layer: int | None = None
    """Layer recorded in the file or its settings."""
    origin: SAESource | None = None
