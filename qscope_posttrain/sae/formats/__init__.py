"""One file per on-disk format. Each opens a file as a memory-mapped `StoredSAE` in canonical orientation."""

from __future__ import annotations

from qscope_posttrain.sae.formats import native, qwen_scope
from qscope_posttrain.sae.formats.stored import StoredSAE
from qscope_posttrain.sae.source import LocatedFile

_OPENERS = {".pt": qwen_scope.open_file, ".safetensors": native.open_file}


def open_stored(located: LocatedFile) -> StoredSAE:
    """Open a located file by its suffix, checking its structure but reading none of its matrices."""
    opener = _OPENERS.get(located.path.suffix)
    if opener is None:
        raise ValueError(
            f"{located.path}: no SAE format has the suffix {located.path.suffix!r}; "
            "known are .pt (Qwen-Scope) and .safetensors (this package's own)"
        )
    return opener(located)
