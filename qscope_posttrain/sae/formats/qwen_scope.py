"""Qwen-Scope: `layer{n}.sae.pt`, a pickled dict of four tensors.

    W_enc (d_sae, d_model)    W_dec (d_model, d_sae)    b_enc (d_sae,)    b_dec (d_model,)

The direction of a feature is a *column* of W_dec. Encoding is topk(x @ W_enc.T + b_enc), without subtraction of b_dec
and without input scaling, so nothing has to be folded. k is not in the file: it is part of the release's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import replacing
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.formats.stored import Layout, StoredSAE, read_stored, unshared
from qscope_posttrain.sae.source import LocatedFile, Release
from qscope_posttrain.sae.weights_file import WeightsFile

if TYPE_CHECKING:
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder

LAYOUT = Layout("qwen_scope", ("W_enc", "b_enc", "W_dec", "b_dec"), "rows, columns")
_FOREIGN = ("encoder.weight", "W_E", "W_D", "log_jumprelu_threshold", "r_mag", "group_sizes")
"""Tensors in torch archives of other libraries."""


def recognizes(weights: WeightsFile) -> bool:
    if weights.kind != "torch" or weights.metadata or any(name in weights for name in _FOREIGN):
        return False
    return "threshold" not in weights or weights.settings("config.json") is None


def open_file(weights: WeightsFile, located: LocatedFile) -> StoredSAE:
    LAYOUT.check(weights)
    d_sae = _checked_width(weights)
    if located.release is not None and located.release.d_sae != d_sae:
        raise UserValueError(
            f"it holds {d_sae} latents, but its release {located.release.name} has {located.release.d_sae}"
        )
    return read_stored(weights, located, LAYOUT, layer=located.layer)


def write_file(path: Path, sae: SparseAutoencoder) -> Path:
    """`path` is the file, or its folder; the folder must be named after width and k, since the file holds neither."""
    activation = sae.activation
    if not isinstance(activation, TopK) or activation.variant == "signed":
        raise UserValueError(f"a Qwen-Scope file is read as relu(topk(...)), it cannot express {activation}")
    if sae.layer is None:
        raise UserValueError(
            "a Qwen-Scope file is named after its layer, and this SAE knows none: set it with replace()"
        )
    if sae.d_sae == sae.d_model:
        raise UserValueError(f"the orientation of a Qwen-Scope file of {sae.d_sae} x {sae.d_sae} would be ambiguous")
    name = f"layer{sae.layer}.sae.pt"
    file = path if path.suffix == ".pt" else path / name
    if file.name != name:
        raise UserValueError(f"this SAE is of layer {sae.layer}: its Qwen-Scope file is named {name}, got {file.name}")
    folder = file.absolute().parent.name
    release = Release.parse(folder)
    thousands, rest = divmod(sae.d_sae, 1024)
    if rest:
        raise UserValueError(f"Qwen-Scope states the width in units of 1024, which {sae.d_sae} latents are not")
    if release is None or (release.d_sae, release.k) != (sae.d_sae, activation.k):
        raise UserValueError(
            f"the folder's name states width and k, and must be SAE-Res-<model>-W{thousands}K-L0_{activation.k}, "
            f"got {folder!r}"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, sae)
    return file


def write_tensors(file: Path, sae: SparseAutoencoder) -> None:
    """Write the four tensors of a Qwen-Scope file, whatever the names of file and folder say."""
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec.t(), "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    with replacing(file) as unfinished:
        torch.save(unshared(tensors), unfinished)


def _checked_width(weights: WeightsFile) -> int:
    """d_sae, or a ValueError that says how the shapes are wrong."""
    shapes = {name: tuple(weights.tensor(name, None, None).shape) for name in ("W_enc", "W_dec")}
    (d_sae,), (d_model,) = (weights.tensor(name, None).shape for name in ("b_enc", "b_dec"))
    upright, transposed = (d_sae, d_model), (d_model, d_sae)
    found = (shapes["W_enc"], shapes["W_dec"])
    if d_sae == d_model and found == (upright, upright):
        raise UserValueError(
            f"all matrices are {d_sae} x {d_sae}, so that the shapes do not show their orientation and "
            "a swapped file would pass unnoticed. No Qwen-Scope release is square; if you know the orientation, build "
            "SparseAutoencoder(...) yourself and save() it"
        )
    if found == (upright, transposed):
        return d_sae
    faults: dict[tuple[tuple[int, ...], ...], str] = {
        (transposed, upright): "W_enc and W_dec (or b_enc and b_dec) are swapped",
        (upright, upright): "W_dec is transposed",
        (transposed, transposed): "W_enc is transposed",
    }
    raise UserValueError(
        f"{faults.get(found, 'the shapes do not belong together')}: found W_enc {list(found[0])}, W_dec "
        f"{list(found[1])}, b_enc [{d_sae}], b_dec [{d_model}]. "
        "Qwen-Scope has W_enc [d_sae, d_model], W_dec [d_model, d_sae], b_enc [d_sae], b_dec [d_model]"
    )
