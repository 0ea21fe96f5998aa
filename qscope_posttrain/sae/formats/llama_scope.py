"""Llama Scope: `Llama3_1-8B-Base-L{n}R-8x/{hyperparams.json,checkpoints/final.safetensors}`.

    encoder.weight (d_sae, d_model)    decoder.weight (d_model, d_sae)
    encoder.bias (d_sae,)              decoder.bias (d_model,)

The weights expect x * s, s = sqrt(d_model) / dataset_average_activation_norm.in. The one `jump_relu_threshold` was
measured after folding to raw units and a decoder of unit norm (OpenMOSS/Language-Model-SAEs, post_processing at commit
1e710367), so that, with n_j the norm of column j of decoder.weight, in raw units

    pre_j = n_j (encoder.weight x + encoder.bias / s)_j,    f_j = pre_j where pre_j > jump_relu_threshold
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.activations import Activation, JumpReLU, ReLU, TopK
from qscope_posttrain.sae.checks import as_positive
from qscope_posttrain.sae.containers.json_file import Settings
from qscope_posttrain.sae.containers.weights_file import WeightsFile
from qscope_posttrain.sae.formats.stored import Fold, StoredSAE, read_stored
from qscope_posttrain.sae.layout import layer_of_site
from qscope_posttrain.sae.source import LocatedFile

FORMAT = "llama_scope"
KEYS = ("encoder.weight", "encoder.bias", "decoder.weight")


def recognizes(weights: WeightsFile) -> bool:
    return (
        weights.kind == "safetensors"
        and set(KEYS) <= weights.names
        and "log_jumprelu_threshold" not in weights
        and weights.settings("hyperparams.json") is not None
    )


def open_file(weights: WeightsFile, located: LocatedFile, input_scale: float | None) -> StoredSAE:
    settings = weights.required_settings("hyperparams.json")
    weights.only(set(KEYS), {"decoder.bias"})
    layer = check_settings(settings)
    d_model, d_sae = settings.integer("d_model"), settings.integer("d_sae")
    average = settings.section("dataset_average_activation_norm", None)
    inner = None if average is None else average.positive("in")
    outer = inner if average is None else average.positive("out", inner)
    s = normalization(settings, d_model, inner)
    if inner is not None and outer is not None and not math.isclose(outer, inner, rel_tol=1e-3):
        raise UserValueError(f"dataset_average_activation_norm is {inner} in and {outer} out: a transcoder, not an SAE")
    b_enc = weights.vector("encoder.bias", d_sae)  # before a tensor of the stated length is made
    return read_stored(
        weights,
        FORMAT,
        (*KEYS, "decoder.bias"),
        "rows, columns",
        d_sae,
        d_model,
        fold=Fold(s, s, 1 / s, subtracts_b_dec(settings), unit_decoder=True),
        activation=activation_of(settings, lambda: torch.full(b_enc.shape, settings.number("jump_relu_threshold"))),
        layer=layer,
    )


def check_settings(settings: Settings) -> int:
    """The layer by the settings of an SAE of the OpenMOSS libraries. ValueError for what is not one of the stream."""
    kind = settings.text("sae_type", "sae")
    if kind != "sae" or settings.flag("use_glu_encoder", False):
        raise UserValueError(f"it is of the type {kind!r}, or has a gated linear encoder: not a sparse autoencoder")
    site = settings.text("hook_point_in")
    if settings.text("hook_point_out", site) != site:
        raise UserValueError(f"it is a transcoder: it reads {site!r} and writes {settings.text('hook_point_out')!r}")
    return layer_of_site(site)


def normalization(settings: Settings, d_model: int, average_norm: float | None) -> float:
    """s, by which the weights expect x to be multiplied."""
    kind = settings.text("norm_activation", "token-wise")
    if kind == "inference":
        return 1.0
    if kind != "dataset-wise":
        raise UserValueError(
            f"norm_activation {kind!r} depends on the token or batch, and cannot be folded into weights"
        )
    if average_norm is None:
        raise UserValueError("norm_activation is 'dataset-wise', but dataset_average_activation_norm is missing")
    s = math.sqrt(d_model) / as_positive("dataset_average_activation_norm", average_norm)
    return as_positive(f"sqrt({d_model}) / dataset_average_activation_norm", s)


def subtracts_b_dec(settings: Settings) -> bool:
    has_bias: bool = settings.flag("use_decoder_bias", True)
    return has_bias and settings.flag("apply_decoder_bias_to_pre_encoder", True)


def activation_of(settings: Settings, thresholds: Callable[[], Tensor | None]) -> Activation:
    name = settings.text("act_fn").lower()
    if name == "jumprelu":
        found = thresholds()
        if found is None:
            raise UserValueError("act_fn is 'jumprelu', but the thresholds are missing")
        return JumpReLU(found)
    if name == "batchtopk":
        raise UserValueError("act_fn 'batchtopk' depends on the batch; convert it to jumprelu with lm-saes first")
    if name == "topk":
        return TopK(settings.integer("top_k"), "relu_before")
    if name == "relu":
        return ReLU()
    raise UserValueError(f"act_fn is {name!r}; known are jumprelu, topk and relu")
