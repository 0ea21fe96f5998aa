"""Gemma Scope 2: `resid_post/layer_17_width_16k_l0_medium/{config.json,params.safetensors}`, JumpReLU.

    w_enc (d_model, d_sae)    w_dec (d_sae, d_model)    b_enc, threshold (d_sae,)    b_dec (d_model,)

As Gemma Scope 1, with lower-case names. config.json, where there is one, names the site ("model.layers.17.output").
Transcoders of the same layout may add an affine skip connection; they are refused.
"""

from __future__ import annotations

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.containers.json_file import Settings
from qscope_posttrain.sae.containers.weights_file import WeightsFile
from qscope_posttrain.sae.formats.gemma_scope import KEYS, read_jumprelu, refuse_other_sites
from qscope_posttrain.sae.formats.stored import StoredSAE
from qscope_posttrain.sae.layout import layer_of_site
from qscope_posttrain.sae.source import LocatedFile

FORMAT = "gemma_scope_2"


def recognizes(weights: WeightsFile) -> bool:
    return weights.kind == "safetensors" and ("w_enc" in weights or "w_dec" in weights)


def open_file(weights: WeightsFile, located: LocatedFile, input_scale: float | None) -> StoredSAE:
    refuse_other_sites(weights.path, located)
    if any("affine" in name for name in weights.names):
        raise UserValueError("it has an affine skip connection: a transcoder, which does not reconstruct what it reads")
    names = {name: name.lower() for name in KEYS}
    weights.only(set(names.values()))
    settings = weights.settings("config.json")
    return read_jumprelu(weights, FORMAT, names, None if settings is None else _layer(settings))


def _layer(settings: Settings) -> int | None:
    architecture = settings.text("architecture", "jump_relu")
    if architecture != "jump_relu" or settings.flag("affine_connection", False):
        raise UserValueError(f"it is {architecture!r}, or has an affine connection; known is 'jump_relu' without one")
    site = settings.text("hf_hook_point_in", None)
    if site is None:
        return None
    if settings.text("hf_hook_point_out", site) != site:
        raise UserValueError(f"it is a transcoder: it reads {site!r} and writes {settings.text('hf_hook_point_out')!r}")
    return layer_of_site(site)
