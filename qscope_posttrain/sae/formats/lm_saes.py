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

from qscope_posttrain.sae.containers.weights_file import WeightsFile
from qscope_posttrain.sae.formats.llama_scope import activation_of, check_settings, normalization, subtracts_b_dec
from qscope_posttrain.sae.formats.stored import Fold, StoredSAE, read_stored
from qscope_posttrain.sae.source import LocatedFile

FORMAT = "lm_saes"

_NORM = "dataset_average_activation_norm."
_THRESHOLD = "log_jumprelu_threshold"
_VERSIONS = {
    # encoder, its bias, decoder, its bias; where the features lie; thresholds
    1: (("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"), "rows, columns", _THRESHOLD),
    2: (("W_E", "b_E", "W_D", "b_D"), "columns, rows", f"activation_function.{_THRESHOLD}"),
}


def recognizes(weights: WeightsFile) -> bool:
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
    names, features_in, threshold = _VERSIONS[2 if "W_E" in weights else 1]
    d_model = settings.integer("d_model")
    d_sae = settings.integer("d_sae", None) or d_model * settings.integer("expansion_factor")
    norms = {name for name in weights.names if name.startswith(_NORM)}
    weights.only(set(names[:3]), norms | {names[3], threshold})
    norm_name = _NORM + settings.text("hook_point_in")
    s = normalization(settings, d_model, weights.scalar(norm_name) if norm_name in weights else None)
    thresholds = weights.vector(threshold, d_sae).float().exp() / s if threshold in weights else None
    unit_decoder = settings.flag("sparsity_include_decoder_norm", True)
    return read_stored(
        weights,
        FORMAT,
        names,
        features_in,
        d_sae,
        d_model,
        fold=Fold(s, s, 1 / s, subtracts_b_dec(settings), unit_decoder),
        activation=activation_of(settings, lambda: thresholds),
        layer=layer,
    )
