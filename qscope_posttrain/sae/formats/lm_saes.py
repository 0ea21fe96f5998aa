"""lm-saes (version 1) and llamascopium (version 2): `sae_weights.{safetensors,pt}` or `checkpoints/{pruned,final}.*`
with config.json.

    version 1    encoder.weight (d_sae, d_model), encoder.bias, decoder.weight (d_model, d_sae), decoder.bias,
                 log_jumprelu_threshold (d_sae,)
    version 2    W_E (d_model, d_sae), b_E, W_D (d_sae, d_model), b_D, activation_function.log_jumprelu_threshold
    both         dataset_average_activation_norm.<hook point>, a number

With norm_activation "dataset-wise" the weights expect x * s, s = sqrt(d_model) / that number. With
`sparsity_include_decoder_norm` the activation function sees the pre-activations times the norm of their decoder row.
Both are folded: an activation here is the library's, in raw units, times that norm.
"""

from __future__ import annotations

import torch

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.activations import Activation, JumpReLU, ReLU, TopK
from qscope_posttrain.sae.containers.json_file import Settings
from qscope_posttrain.sae.containers.weights_file import WeightsFile
from qscope_posttrain.sae.folding import Fold
from qscope_posttrain.sae.formats.llama_scope import check_settings, normalisation, subtracts_b_dec
from qscope_posttrain.sae.formats.stored import StoredSAE
from qscope_posttrain.sae.source import LocatedFile

FORMAT = "lm_saes"

_NORM = "dataset_average_activation_norm."
_THRESHOLD = "log_jumprelu_threshold"
_VERSIONS = {
    # encoder and where its features lie, its bias, decoder and where its features lie, its bias, threshold
    1: ("encoder.weight", "rows", "encoder.bias", "decoder.weight", "columns", "decoder.bias", _THRESHOLD),
    2: ("W_E", "columns", "b_E", "W_D", "rows", "b_D", f"activation_function.{_THRESHOLD}"),
}


def recognises(weights: WeightsFile) -> bool:
    if "W_E" in weights and "W_D" in weights:
        return True
    if "encoder.weight" not in weights or "decoder.weight" not in weights:
        return False
    if _THRESHOLD in weights or any(name.startswith(_NORM) for name in weights.names):
        return True
    return "version" in weights.metadata and weights.settings("hyperparams.json") is None


def open_file(weights: WeightsFile, located: LocatedFile, input_scale: float | None) -> StoredSAE:
    settings = weights.required_settings("config.json")
    layer = check_settings(settings)
    encoder, encoder_lies, b_enc, decoder, decoder_lies, b_dec, threshold = _VERSIONS[2 if "W_E" in weights else 1]
    d_model = settings.integer("d_model")
    d_sae = settings.integer("d_sae", None) or d_model * settings.integer("expansion_factor")
    norms = {name for name in weights.names if name.startswith(_NORM)}
    weights.only({encoder, b_enc, decoder}, norms | {b_dec, threshold})
    norm_name = _NORM + settings.text("hook_point_in")
    s = normalisation(settings, d_model, weights.scalar(norm_name) if norm_name in weights else None)
    thresholds = weights.vector(threshold, d_sae).float().exp() / s if threshold in weights else None
    return StoredSAE(
        weights.path,
        FORMAT,
        weights.matrix(encoder, d_sae, d_model, encoder_lies),
        weights.vector(b_enc, d_sae),
        weights.matrix(decoder, d_sae, d_model, decoder_lies),
        weights.vector(b_dec, d_model) if b_dec in weights else torch.zeros(d_model),
        weights.memory_mapped,
        fold=Fold(
            s,
            s,
            1 / s,
            subtracts_b_dec(settings),
            unit_decoder=settings.flag("sparsity_include_decoder_norm", True),
        ),
        activation=_activation(settings, thresholds),
        layer=layer,
    )


def _activation(settings: Settings, thresholds: torch.Tensor | None) -> Activation:
    name = settings.text("act_fn").lower()
    if name == "jumprelu":
        if thresholds is None:
            raise UserValueError("act_fn is 'jumprelu', but the thresholds are missing")
        return JumpReLU(thresholds)
    if name == "topk":
        return TopK(settings.integer("top_k"), "relu_before")
    if name == "relu":
        return ReLU()
    if name == "batchtopk":
        raise UserValueError("act_fn 'batchtopk' depends on the batch; convert it to jumprelu with lm-saes first")
    raise UserValueError(f"act_fn is {name!r}; known are jumprelu, topk and relu")
