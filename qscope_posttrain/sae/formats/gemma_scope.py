"""Gemma Scope, JumpReLU. Version 1: `layer_20/width_16k/average_l0_71/params.npz`, without settings; version 2:
`resid_post/layer_17_width_16k_l0_medium/{config.json,params.safetensors}`, with lower-case names.

    W_enc (d_model, d_sae)    W_dec (d_sae, d_model)    b_enc, threshold (d_sae,)    b_dec (d_model,)

Encoding is x @ W_enc + b_enc, without subtraction of b_dec and without scaling, so nothing has to be folded. Layer and
site are taken from config.json ("model.layers.17.output"), or else from the path: the attention, MLP, transcoder and
embedding SAEs look alike, and transcoders may add an affine skip connection.
"""

from __future__ import annotations

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.activations import JumpReLU
from qscope_posttrain.sae.formats.stored import Layout, StoredSAE, read_stored
from qscope_posttrain.sae.layout import layer_of_site
from qscope_posttrain.sae.source import LocatedFile
from qscope_posttrain.sae.weights_file import WeightsFile

_OTHER_SITES = ("transcoder", "crosscoder", "clt", "embedding", "-att", "-mlp", "attn_out", "mlp_out")


def recognizes(weights: WeightsFile) -> bool:
    return weights.kind == "npz" or (weights.kind == "safetensors" and ("w_enc" in weights or "w_dec" in weights))


def open_file(weights: WeightsFile, located: LocatedFile) -> StoredSAE:
    _refuse_other_sites(located)
    if any("affine" in name for name in weights.names):
        raise UserValueError("it has an affine skip connection: a transcoder, which does not reconstruct what it reads")
    first = weights.kind == "npz"
    # Some files of version 1 write w_enc for W_enc.
    w_enc, w_dec = (
        name if first and (name in weights or name.lower() not in weights) else name.lower()
        for name in ("W_enc", "W_dec")
    )
    layout = Layout(
        "gemma_scope" if first else "gemma_scope_2", (w_enc, "b_enc", w_dec, "b_dec"), "columns, rows", ("threshold",)
    )
    layout.check(weights)
    layer = None if first else _stated_layer(weights)
    activation = JumpReLU(weights.tensor("threshold", None).clone())
    return read_stored(weights, located, layout, activation=activation, layer=layer)


def _stated_layer(weights: WeightsFile) -> int | None:
    settings = weights.settings("config.json")
    if settings is None:
        return None
    architecture = settings.text("architecture", "jump_relu")
    if architecture != "jump_relu" or settings.flag("affine_connection", False):
        raise UserValueError(f"it is {architecture!r}, or has an affine connection; known is 'jump_relu' without one")
    site = settings.text("hf_hook_point_in", None)
    if site is None:
        return None
    if settings.text("hf_hook_point_out", site) != site:
        raise UserValueError(f"it is a transcoder: it reads {site!r} and writes {settings.text('hf_hook_point_out')!r}")
    return layer_of_site(site)


def _refuse_other_sites(located: LocatedFile) -> None:
    """ValueError if the repository or the folders of the file name another site than the residual stream."""
    named = [located.location.rpartition("/")[2], *located.path.parts[-5:-1]]
    other = next((part for part in named for mark in _OTHER_SITES if mark in part.lower()), None)
    if other is not None:
        raise UserValueError(
            f"by {other!r} in its path it does not read the residual stream after a decoder layer, which is all that "
            "this package reads and steers"
        )
