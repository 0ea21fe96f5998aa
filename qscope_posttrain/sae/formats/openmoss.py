"""Llama Scope, lm-saes (version 1) and llamascopium (version 2), all of OpenMOSS.

    Llama Scope   `Llama3_1-8B-Base-L{n}R-8x/{hyperparams.json,checkpoints/final.safetensors}`
    the others    `sae_weights.{safetensors,pt}` or `checkpoints/{pruned,final}.*` with config.json

    version 1     encoder.weight (d_sae, d_model), encoder.bias, decoder.weight (d_model, d_sae), decoder.bias,
                  log_jumprelu_threshold (d_sae,), which Llama Scope replaces by one number in its settings
    version 2     W_E (d_model, d_sae), b_E, W_D (d_sae, d_model), b_D, activation_function.log_jumprelu_threshold
    both          dataset_average_activation_norm.<hook point>, a number, of Llama Scope in its settings

With norm_activation "dataset-wise" the weights expect x * s, s = sqrt(d_model) / that number. With
`sparsity_include_decoder_norm` the activation function sees the pre-activations times the norm of their decoder row.
Both are folded: an activation here is the library's, in raw units, times that norm.

The threshold of Llama Scope was measured after folding to raw units and a decoder of unit norm
(OpenMOSS/Language-Model-SAEs, post_processing at commit 1e710367): it applies to n_j (encoder.weight x + encoder.bias /
s)_j, in raw units, with n_j the norm of column j of decoder.weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.activations import Activation, JumpReLU, ReLU, TopK
from qscope_posttrain.sae.checks import Settings, as_positive
from qscope_posttrain.sae.formats.stored import Fold, Layout, StoredSAE, read_stored
from qscope_posttrain.sae.layout import layer_of_site
from qscope_posttrain.sae.source import LocatedFile
from qscope_posttrain.sae.weights_file import WeightsFile

_NORM = "dataset_average_activation_norm"
_THRESHOLD = "log_jumprelu_threshold"
_VERSION_1 = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_VERSION_2 = ("W_E", "b_E", "W_D", "b_D")


def recognizes(weights: WeightsFile) -> bool:
    if "W_E" in weights and "W_D" in weights:
        return True
    if "encoder.weight" not in weights or "decoder.weight" not in weights:
        return False
    if _THRESHOLD in weights or any(name.startswith(f"{_NORM}.") for name in weights.names):
        return True
    return "version" in weights.metadata or _is_llama_scope(weights)


def open_file(weights: WeightsFile, located: LocatedFile) -> StoredSAE:
    llama_scope = _is_llama_scope(weights)
    settings = weights.required_settings("hyperparams.json" if llama_scope else "config.json")
    layer = _layer(settings)
    layout = _layout(weights, llama_scope)
    layout.check(weights)
    d_model = settings.integer("d_model")
    d_sae = settings.integer("d_sae", None) or d_model * settings.integer("expansion_factor")
    b_enc = weights.tensor(layout.names[1], d_sae)  # before a tensor of the stated length is made
    thresholds: Tensor | None = None
    if llama_scope:
        s = _input_scale(settings, d_model, _average_norm(settings))
        if settings.text("act_fn").lower() == "jumprelu":
            thresholds = torch.full(b_enc.shape, settings.number("jump_relu_threshold"))
    else:
        norm, threshold = f"{_NORM}.{settings.text('hook_point_in')}", layout.optional[1]
        s = _input_scale(settings, d_model, weights.number(norm) if norm in weights else None)
        if threshold in weights:
            thresholds = weights.tensor(threshold, d_sae).float().exp() / s
    has_b_dec = settings.flag("use_decoder_bias", True)
    subtracts = has_b_dec and settings.flag("apply_decoder_bias_to_pre_encoder", True)
    unit_decoder = llama_scope or settings.flag("sparsity_include_decoder_norm", True)
    fold, activation = Fold(s, s, 1 / s, subtracts, unit_decoder), _activation(settings, thresholds)
    return read_stored(weights, located, layout, d_sae, d_model, fold=fold, activation=activation, layer=layer)


def _is_llama_scope(weights: WeightsFile) -> bool:
    return (
        weights.kind == "safetensors"
        and set(_VERSION_1[:3]) <= weights.names
        and _THRESHOLD not in weights
        and weights.settings("hyperparams.json") is not None
    )


def _layout(weights: WeightsFile, llama_scope: bool) -> Layout:
    if llama_scope:
        return Layout("llama_scope", _VERSION_1, "rows, columns", optional=_VERSION_1[3:])
    norms = tuple(name for name in weights.names if name.startswith(f"{_NORM}."))
    if "W_E" in weights:
        optional = ("b_D", f"activation_function.{_THRESHOLD}", *norms)
        return Layout("lm_saes", _VERSION_2, "columns, rows", optional=optional)
    return Layout("lm_saes", _VERSION_1, "rows, columns", optional=("decoder.bias", _THRESHOLD, *norms))


def _layer(settings: Settings) -> int:
    """The layer by the settings; ValueError for what is not an SAE of the residual stream."""
    kind = settings.text("sae_type", "sae")
    if kind != "sae" or settings.flag("use_glu_encoder", False):
        raise UserValueError(f"it is of the type {kind!r}, or has a gated linear encoder: not a sparse autoencoder")
    site = settings.text("hook_point_in")
    if settings.text("hook_point_out", site) != site:
        raise UserValueError(f"it is a transcoder: it reads {site!r} and writes {settings.text('hook_point_out')!r}")
    return layer_of_site(site)


def _average_norm(settings: Settings) -> float | None:
    average = settings.section(_NORM, None)
    if average is None:
        return None
    inner: float = average.positive("in")
    outer = average.positive("out", inner)
    if not math.isclose(outer, inner, rel_tol=1e-3):
        raise UserValueError(f"{_NORM} is {inner} in and {outer} out: a transcoder, not an SAE")
    return inner


def _input_scale(settings: Settings, d_model: int, average_norm: float | None) -> float:
    """s, by which the weights expect x to be multiplied."""
    kind = settings.text("norm_activation", "token-wise")
    if kind == "inference":
        return 1.0
    if kind != "dataset-wise":
        raise UserValueError(
            f"norm_activation {kind!r} depends on the token or batch, and cannot be folded into weights"
        )
    if average_norm is None:
        raise UserValueError(f"norm_activation is 'dataset-wise', but {_NORM} is missing")
    return as_positive(f"sqrt({d_model}) / {_NORM}", math.sqrt(d_model) / as_positive(_NORM, average_norm))


def _activation(settings: Settings, thresholds: Tensor | None) -> Activation:
    name = settings.text("act_fn").lower()
    if name == "jumprelu":
        if thresholds is None:
            raise UserValueError("act_fn is 'jumprelu', but the thresholds are missing")
        return JumpReLU(thresholds)
    if name == "batchtopk":
        raise UserValueError("act_fn 'batchtopk' depends on the batch; convert it to jumprelu with lm-saes first")
    if name == "topk":
        return TopK(settings.integer("top_k"), "relu_before")
    if name == "relu":
        return ReLU()
    raise UserValueError(f"act_fn is {name!r}; known are jumprelu, topk and relu")
