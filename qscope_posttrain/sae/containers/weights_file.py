"""One file of weights, opened by what it is, and the settings beside it."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import check_is_file_with_data
from qscope_posttrain.sae.checks import as_number, check_tensor
from qscope_posttrain.sae.containers import json_file, numpy_archive, safetensors_file, torch_archive
from qscope_posttrain.sae.containers.json_file import Settings
from qscope_posttrain.sae.mapped import lies_in_a_file

SETTINGS_FILES = ("cfg.json", "config.json", "hyperparams.json", "activation_scaler.json")
"""Names of the settings that some format keeps beside its weights."""

WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".npz")


@dataclass(frozen=True)
class WeightsFile:
    """What a file holds: names and shapes are known, values are not yet read. Errors do not name the file."""

    path: Path
    kind: str
    """"safetensors", "torch" or "npz"."""
    entries: Mapping[str, object]
    """Tensors by name; a torch archive may hold other values among them."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    memory_mapped: bool = True

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    @property
    def names(self) -> set[str]:
        return set(self.entries)

    def settings(self, name: str) -> Settings | None:
        """A JSON file beside the weights (or above their folder `checkpoints`); None if it is not there."""
        found = json_file.read(self.path.parent / name)
        if found is None and self.path.parent.name == "checkpoints":
            found = json_file.read(self.path.parent.parent / name)
        return found

    def required_settings(self, name: str) -> Settings:
        found = self.settings(name)
        if found is None:
            raise UserValueError(f"its settings are missing: there is no {name} beside it")
        return found

    def vector(self, name: str, length: int | None = None) -> Tensor:
        """A float tensor [length]."""
        return self._tensor(name, (length,))

    def scalar(self, name: str) -> float:
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

    def any_matrix(self, name: str) -> Tensor:
        """A float matrix of any shape, as it lies in the file."""
        return self._tensor(name, (None, None))

    def matrix(self, name: str, d_sae: int, d_model: int, features: str) -> Tensor:
        """A float matrix as [d_sae, d_model], from a file whose `features` lie in "rows" or in "columns"."""
        on_disk = (d_sae, d_model) if features == "rows" else (d_model, d_sae)
        tensor = self._present(name)
        if isinstance(tensor, Tensor) and tuple(tensor.shape) == on_disk[::-1] != on_disk:
            raise UserValueError(f"{name} is transposed: it has shape {list(tensor.shape)}, expected {list(on_disk)}")
        tensor = self._tensor(name, on_disk)
        return tensor if features == "rows" else tensor.t()

    def only(self, required: set[str], optional: Collection[str] = ()) -> None:
        """ValueError unless the file holds the required tensors, and none beyond the optional ones."""
        missing, extra = required - self.names, self.names - required - set(optional)
        if missing or extra:
            faults = [f"lacks {', '.join(sorted(missing))}"] * bool(missing)
            faults += [f"has extra {_listed(extra)}"] * bool(extra)
            raise UserValueError(f"it {' and '.join(faults)}; expected are {', '.join(sorted(required))}")

    def _tensor(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        tensor = self._present(name)
        check_tensor(name, tensor, shape)
        return cast(Tensor, tensor).detach()

    def _item(self, name: str) -> bool | int | float:
        tensor = self._present(name)
        if not isinstance(tensor, Tensor) or tensor.numel() != 1 or tensor.is_complex():
            raise UserValueError(f"{name} must be a tensor of one number")
        return tensor.item()

    def _present(self, name: str) -> object:
        if name not in self.entries:
            raise UserValueError(f"it lacks the tensor {name}; it holds {_listed(self.names)}")
        return self.entries[name]


def open_weights(path: Path) -> WeightsFile:
    """Open a file by its first bytes (and, where these say nothing, by its suffix). ValueError names file and fault."""
    size = check_is_file_with_data(path)
    kind = _kind(path)
    if kind == "torch":
        entries = torch_archive.read(path, size)
        inner = entries.get("sae")
        if isinstance(inner, dict) and entries.keys() == {"sae", "version"}:  # lm-saes wraps its state dict
            inner = {str(name): value for name, value in inner.items()}
            return WeightsFile(path, kind, inner, {"version": str(entries["version"])[:80]}, _mapped(inner))
        return WeightsFile(path, kind, entries, memory_mapped=_mapped(entries))
    if kind == "npz":
        arrays = numpy_archive.read(path, size)
        return WeightsFile(path, kind, arrays, memory_mapped=_mapped(arrays))
    tensors, metadata = safetensors_file.read(path, size)
    return WeightsFile(path, kind, tensors, metadata, _mapped(tensors))


def _mapped(entries: Mapping[str, object]) -> bool:
    return lies_in_a_file(value for value in entries.values() if isinstance(value, Tensor))


def _kind(path: Path) -> str:
    by_suffix = {".safetensors": "safetensors", ".npz": "npz", ".pt": "torch", ".pth": "torch"}.get(path.suffix)
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
            f"{path}: no SAE format has the suffix {path.suffix!r}, nor do its first bytes tell what it is; "
            f"known are {', '.join(WEIGHTS_SUFFIXES)}"
        )
    return by_suffix


def _listed(names: set[str]) -> str:
    shown = sorted(name[:80] for name in names)
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
