"""One file of weights, opened by its content, and the settings beside it."""

from __future__ import annotations

import math
import sys
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qscope_posttrain.errors import UserValueError, listed
from qscope_posttrain.files import check_is_file_with_data
from qscope_posttrain.sae import archives
from qscope_posttrain.sae.checks import Settings, as_number, check_tensor, read_settings

SETTINGS_FILES = ("cfg.json", "config.json", "hyperparams.json", "activation_scaler.json")  # Beside weights

_KINDS = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch", ".npz": "npz"}


@dataclass(frozen=True)
class WeightsFile:
    """The content of a file: names and shapes are known, values are not yet read. Errors do not name the file."""

    path: Path
    kind: str  # "safetensors", "torch" or "npz"
    entries: Mapping[str, object]  # Tensors by name; a torch archive may hold other values among them
    metadata: Mapping[str, str]
    memory_mapped: bool

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def names(self) -> set[str]:
        return set(self.entries)

    def settings(self, name: str) -> Settings | None:
        """A JSON file beside the weights (or above their folder `checkpoints`); None if it is not there."""
        found = read_settings(self.path.parent / name)
        if found is None and self.path.parent.name == "checkpoints":
            found = read_settings(self.path.parent.parent / name)
        return found

    def required_settings(self, name: str) -> Settings:
        found = self.settings(name)
        if found is None:
            raise UserValueError(f"its settings are missing: there is no {name} beside it")
        return found

    def tensor(self, name: str, *shape: int | None) -> Tensor:
        """A float tensor of a shape; None: any length."""
        tensor: Any = self._present(name)
        check_tensor(name, tensor, shape)
        found: Tensor = tensor.detach()
        return found

    def matrix(self, name: str, d_sae: int, d_model: int, features: str) -> Tensor:
        """A float matrix as [d_sae, d_model], from a file whose `features` lie in "rows" or in "columns"."""
        on_disk = (d_sae, d_model) if features == "rows" else (d_model, d_sae)
        tensor = self._present(name)
        if isinstance(tensor, Tensor) and tuple(tensor.shape) == on_disk[::-1] != on_disk:
            raise UserValueError(f"{name} is transposed: it has shape {list(tensor.shape)}, expected {list(on_disk)}")
        found = self.tensor(name, *on_disk)
        return found if features == "rows" else found.t()

    def number(self, name: str) -> float:
        """A tensor of one number that float32 can hold."""
        return as_number(name, self._item(name))

    def integer(self, name: str) -> int:
        """A tensor of one whole number, of whatever dtype."""
        value = self._item(name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserValueError(f"{name} is NaN or infinite, and must be an integer")
        whole = int(value) if isinstance(value, float) and value.is_integer() else value
        if type(whole) is not int:
            raise UserValueError(f"{name} must be an integer, got {whole}")
        return whole

    def only(self, required: Collection[str], optional: Collection[str] = ()) -> None:
        """ValueError unless the file holds the required tensors, and none beyond the optional ones."""
        missing, extra = set(required) - self.names, self.names - {*required, *optional}
        if missing or extra:
            faults = [f"lacks {', '.join(sorted(missing))}"] * bool(missing)
            faults += [f"has extra {listed(sorted(extra))}"] * bool(extra)
            raise UserValueError(f"it {' and '.join(faults)}; expected are {', '.join(sorted(required))}")

    def _item(self, name: str) -> bool | int | float:
        tensor = self._present(name)
        if not isinstance(tensor, Tensor) or tensor.numel() != 1 or tensor.is_complex():
            raise UserValueError(f"{name} must be a tensor of one number")
        return tensor.item()

    def _present(self, name: str) -> object:
        if name not in self.entries:
            raise UserValueError(f"it lacks the tensor {name}; it holds {listed(sorted(self.names))}")
        return self.entries[name]


def open_weights(path: Path) -> WeightsFile:
    """Open a file by its first bytes, or else by its suffix. ValueError names file and fault."""
    size = check_is_file_with_data(path)
    kind = _kind(path)
    entries: Mapping[str, object]
    metadata: dict[str, str] = {}
    if kind == "torch":
        entries = archives.read_torch(path, size)
        inner = entries.get("sae")
        if isinstance(inner, dict) and entries.keys() == {"sae", "version"}:  # lm-saes wraps its state dict
            metadata = {"version": str(entries["version"])[:80]}
            entries = {str(name): value for name, value in inner.items()}
    elif kind == "npz":
        entries = archives.read_npz(path, size)
    else:
        entries, metadata = archives.read_safetensors(path, size)
    mapped = lies_in_a_file(value for value in entries.values() if isinstance(value, Tensor))
    return WeightsFile(path, kind, entries, metadata, mapped)


def _kind(path: Path) -> str:
    by_suffix = _KINDS.get(path.suffix)
    with path.open("rb") as file:
        head = file.read(9)
    if head[:4] == b"PK\x03\x04" and by_suffix != "safetensors":
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except Exception:  # damaged: the reader for its suffix says how
            return by_suffix or "torch"
        if any(name.endswith("data.pkl") for name in names):
            return "torch"
        return "npz" if all(name.endswith(".npy") for name in names) else by_suffix or "torch"
    if by_suffix is None and head[8:9] == b"{":
        return "safetensors"
    if by_suffix is None:
        raise UserValueError(
            f"{path}: no SAE format has the suffix {path.suffix!r}, nor do its first bytes identify it; "
            f"known are {', '.join(_KINDS)}"
        )
    return by_suffix


def lies_in_a_file(tensors: Iterable[Tensor]) -> bool:
    """Whether all tensors are pages of files, so that releasing these loses nothing. True where nothing is released. A
    library is free to read a file in another way: memory of the process, released like this, would be zeroed."""
    if not sys.platform.startswith("linux"):
        return True
    lines = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    of_files = [parts[0].split("-") for parts in lines if len(parts) == 6 and parts[4] != "0"]
    mappings = [(int(begin, 16), int(end, 16)) for begin, end in of_files]
    filled = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel() > 0]
    return all(any(begin <= first and last <= end for begin, end in mappings) for first, last in filled)
