"""Gemma Scope (1): `layer_20/width_16k/average_l0_71/params.npz`, JumpReLU, no settings.

    W_enc (d_model, d_sae)    W_dec (d_sae, d_model)    b_enc, threshold (d_sae,)    b_dec (d_model,)

Encoding is x @ W_enc + b_enc, without subtraction of b_dec and without scaling, so nothing has to be folded. Layer and
site are not in the file: they are taken from its path. Its attention, MLP, transcoder and embedding SAEs look alike.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.activations import JumpReLU
from qscope_posttrain.sae.containers.weights_file import WeightsFile
from qscope_posttrain.sae.formats.stored import StoredSAE, read_stored
from qscope_posttrain.sae.source import LocatedFile

FORMAT = "gemma_scope"
KEYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")

_OTHER_SITES = ("transcoder", "crosscoder", "clt", "embedding", "-att", "-mlp", "attn_out", "mlp_out")


def recognizes(weights: WeightsFile) -> bool:
    return weights.kind == "npz"


def open_file(weights: WeightsFile, located: LocatedFile, input_scale: float | None) -> StoredSAE:
    refuse_other_sites(weights.path, located)
    # Some files write w_enc for W_enc.
    names = {name: name if name in weights or name.lower() not in weights else name.lower() for name in KEYS}
    weights.only(set(names.values()))
    return read_jumprelu(weights, FORMAT, names, located.layer)


def read_jumprelu(weights: WeightsFile, format: str, names: dict[str, str], layer: int | None) -> StoredSAE:
    """The SAE of tensors in the layout of Gemma Scope; `names` has their names in the file."""
    encoder, decoder, b_enc, b_dec = (names[name] for name in KEYS[:4])
    stored = read_stored(weights, format, (encoder, b_enc, decoder, b_dec), "columns, rows", layer=layer)
    return replace(stored, activation=JumpReLU(weights.vector(names["threshold"], stored.d_sae).clone()))


def refuse_other_sites(path: Path, located: LocatedFile) -> None:
    """ValueError if the repository or the folders of the file name another site than the residual stream."""
    named = [located.location.rpartition("/")[2], *path.parts[-5:-1]]
    other = next((part for part in named for mark in _OTHER_SITES if mark in part.lower()), None)
    if other is not None:
        raise UserValueError(
            f"by {other!r} in its path it does not read the residual stream after a decoder layer, which is all that "
            "this package reads and steers"
        )
