"""SAELens: `{cfg.json,sae_weights.safetensors}`, from version 6 and before.

    W_enc (d_in, d_sae)    W_dec (d_sae, d_in)    b_dec (d_in,)    b_enc (d_sae,) but for gated SAEs
    jumprelu: threshold (d_sae,)    gated: b_gate, b_mag, r_mag (d_sae,)    old ones: scaling_factor (d_sae,)

`apply_b_dec_to_input`, `rescale_acts_by_decoder_norm`, the scaling factors of finetuning and the normalisation
"expected_average_only_in" are folded; the factor of the latter is not in the file, but in activation_scaler.json of a
training checkpoint. A gated SAE is a JumpReLU: see `dictionary_learning`.
"""

from __future__ import annotations

from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.activations import AbsTopK, Activation, JumpReLU, ReLU, TopK
from qscope_posttrain.sae.checks import as_positive
from qscope_posttrain.sae.containers.json_file import Settings
from qscope_posttrain.sae.containers.weights_file import WeightsFile
from qscope_posttrain.sae.folding import Fold
from qscope_posttrain.sae.formats.sae_lens_settings import SAELensSettings, parse_settings
from qscope_posttrain.sae.formats.stored import StoredSAE
from qscope_posttrain.sae.source import LocatedFile

FORMAT = "sae_lens"

_GATED = ("b_gate", "b_mag", "r_mag")


def recognises(weights: WeightsFile) -> bool:
    if weights.kind != "safetensors" or "W_dec" not in weights or weights.metadata.keys() - {"format"}:
        return False
    settings = weights.settings("cfg.json")
    return settings is not None and "d_in" in settings.values and "d_sae" in settings.values


def open_file(weights: WeightsFile, located: LocatedFile, input_scale: float | None) -> StoredSAE:
    settings = parse_settings(weights.required_settings("cfg.json"))
    d_sae, d_model = settings.d_sae, settings.d_in
    own = {"gated": set(_GATED), "jumprelu": {"b_enc", "threshold"}}.get(settings.architecture, {"b_enc"})
    weights.only({"W_enc", "W_dec", "b_dec"} | own, {"scaling_factor", "finetuning_scaling_factor"})
    scale = _input_scale(settings, weights.settings("activation_scaler.json"), input_scale)
    b_enc = weights.vector("b_mag" if settings.architecture == "gated" else "b_enc", d_sae)
    activation, gain = _activation(weights, settings, b_enc)
    return StoredSAE(
        weights.path,
        FORMAT,
        weights.matrix("W_enc", d_sae, d_model, "columns"),
        b_enc,
        weights.matrix("W_dec", d_sae, d_model, "rows"),
        weights.vector("b_dec", d_model),
        weights.memory_mapped,
        fold=Fold(
            input_scale=scale,
            output_scale=scale,
            subtract_b_dec=settings.apply_b_dec_to_input,
            unit_decoder=settings.rescale_acts_by_decoder_norm,
            encoder_scale=gain,
            decoder_scale=_finetuning(weights, settings),
        ),
        activation=activation,
        layer=settings.layer,
    )


def _activation(weights: WeightsFile, settings: SAELensSettings, b_enc: Tensor) -> tuple[Activation, Tensor | None]:
    """(activation, factor on the encoder rows)"""
    if settings.architecture == "gated":
        gain = weights.vector("r_mag", settings.d_sae).float().exp()
        gate = weights.vector("b_gate", settings.d_sae).float()
        return JumpReLU(b_enc.float() - gain * gate), gain
    if settings.architecture == "jumprelu":
        return JumpReLU(weights.vector("threshold", settings.d_sae).clone()), None
    if settings.k is None:
        return ReLU(), None
    return (TopK if settings.architecture == "topk" else AbsTopK)(settings.k), None


def _input_scale(settings: SAELensSettings, scaler: Settings | None, given: float | None) -> float:
    if not settings.scales_input:
        if given is not None:
            raise UserValueError(f"input_scale={given} was given, but the file needs none")
        return 1.0
    stored: float | None = None if scaler is None else scaler.positive("scaling_factor", None)
    if stored is not None and given is not None and stored != given:
        raise UserValueError(f"input_scale={given} was given, but activation_scaler.json says {stored}")
    scale = given if stored is None else stored
    if scale is None:
        raise UserValueError(
            "normalize_activations is 'expected_average_only_in', whose factor is not in the file: give it with "
            "input_scale=... (sqrt(d_in) / mean norm of the activations it was trained on)"
        )
    return as_positive("input_scale", scale)


def _finetuning(weights: WeightsFile, settings: SAELensSettings) -> Tensor | None:
    """Factors on the activations that old versions learned after training, and applied in decoding only."""
    name = "scaling_factor" if "scaling_factor" in weights else "finetuning_scaling_factor"
    if name not in weights:
        return None
    factors = weights.vector(name, settings.d_sae)
    if bool((factors == 1).all()):
        return None
    if not settings.finetuning_scaling_factor:
        raise UserValueError(f"it holds a {name} other than 1, but its settings do not say that it is to be used")
    if settings.rescale_acts_by_decoder_norm:
        raise UserValueError(f"it has both {name} and rescale_acts_by_decoder_norm, which no version of SAELens writes")
    return factors.float()
