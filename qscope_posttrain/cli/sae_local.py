"""What `qscope sae show` says of a file or folder on this machine: its headers, without reading a matrix."""

from __future__ import annotations

from pathlib import Path

from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae.activations import Activation, BatchTopK, TopK
from qscope_posttrain.sae.download import in_words
from qscope_posttrain.sae.layout import layer_in_path, weights_in
from qscope_posttrain.sae.loading import WITH_K, activation_of, layer_of, open_source


def tables(path: Path, layer: int | None, k: int | None) -> list[Table]:
    """The weights in a folder, and the SAE of `layer`, or the only one."""
    path = path.absolute()
    found = weights_in(path) if path.is_dir() else []
    listing = Table(
        f"SAEs in {path}",
        ["layer", "file", "size"],
        [[layer_in_path(f"{path.as_posix()}/{name}"), name, in_words((path / name).stat().st_size)] for name in found],
    )
    if len(found) > 1 and layer is None:
        return [listing]
    return [*[listing] * (len(found) > 1), _file_table(path, layer, k)]


def _file_table(path: Path, layer: int | None, k: int | None) -> Table:
    located, stored = open_source(path, layer, None, None, None)
    d_sae, d_model = stored.W_enc.shape
    number = layer_of(located, stored)
    try:
        activation = describe_activation(activation_of(located, stored, k))
    except ValueError as error:
        activation = f"not known: {str(error).rpartition(': ')[2]}"
    origin = stored.origin
    rows = [
        ["file", f"{located.path} ({in_words(located.path.stat().st_size)})"],
        ["format", stored.format],
        ["layer", "not stated" if number is None else f"{number}, counted from 0"],
        ["latents", f"{d_sae} for a residual stream of width {d_model} ({d_sae / d_model:.3g} a dimension)"],
        ["activation", activation],
        ["stored as", str(stored.W_enc.dtype).removeprefix("torch.")],
        ["release", located.release.name if located.release else "not stated"],
        ["made from", "not stated" if origin is None else str(origin)],
    ]
    return Table(located.path.name, ["what", "it is"], rows, "Headers only; `qscope sae check` reads and measures it.")


def describe_activation(activation: Activation) -> str:
    """In words: TopK with k=50."""
    if isinstance(activation, WITH_K):
        signed = isinstance(activation, TopK) and activation.variant == "signed"
        return f"{type(activation).__name__}, k {activation.k}" + (", signed" if signed else "")
    if isinstance(activation, BatchTopK):
        return f"BatchTopK, threshold {activation.threshold:.4g}"
    return type(activation).__name__
