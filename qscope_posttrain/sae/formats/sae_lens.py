"""SAELens: `{cfg.json,sae_weights.safetensors}`, from version 6 and before.

    W_enc (d_in, d_sae)    W_dec (d_sae, d_in)    b_dec (d_in,)    b_enc (d_sae,) but for gated SAEs
    jumprelu: threshold (d_sae,)    gated: b_gate, b_mag, r_mag (d_sae,)    old ones: scaling_factor (d_sae,)

`apply_b_dec_to_input`, `rescale_acts_by_decoder_norm`, the scaling factors of finetuning and the normalization
"expected_average_only_in" are folded; the factor of the latter is not in the file, but in activation_scaler.json of a
training checkpoint. A gated SAE is a JumpReLU: see `stored.gated`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import replacing
from qscope_posttrain.sae.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from qscope_posttrain.sae.checks import Settings, as_positive
from qscope_posttrain.sae.formats.stored import Fold, Layout, StoredSAE, gated, read_stored, unshared
from qscope_posttrain.sae.layout import layer_of_site
from qscope_posttrain.sae.source import LocatedFile
from qscope_posttrain.sae.weights_file import WeightsFile

if TYPE_CHECKING:
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder

# Architecture in cfg.json -> architecture at inference: SAELens saves batch variants as JumpReLU.
_ARCHITECTURES = {name: name for name in ("standard", "topk", "jumprelu", "gated")}
_ARCHITECTURES |= dict.fromkeys(("batchtopk", "matryoshka_batchtopk"), "jumprelu")
_NO_SAE = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_FINETUNING = ("scaling_factor", "finetuning_scaling_factor")
_VERSION = "6.0.0"  # Version of SAELens whose cfg.json is written; without one, readers assume one before 6


def recognizes(weights: WeightsFile) -> bool:
    if weights.kind != "safetensors" or "W_dec" not in weights or weights.metadata.keys() - {"format"}:
        return False
    settings = weights.settings("cfg.json")
    return settings is not None and "d_in" in settings.values and "d_sae" in settings.values


def open_file(weights: WeightsFile, located: LocatedFile, input_scale: float | None) -> StoredSAE:
    settings = weights.required_settings("cfg.json")
    architecture, k = _architecture(settings)
    layer = _layer(settings)
    d_model, d_sae = settings.integer("d_in"), settings.integer("d_sae")
    scales_input = _scales_input(settings)
    rescales = k is not None and settings.flag("rescale_acts_by_decoder_norm", False)
    b_enc = "b_mag" if architecture == "gated" else "b_enc"
    own = {"gated": ("b_gate", "r_mag"), "jumprelu": ("threshold",)}.get(architecture, ())
    layout = Layout("sae_lens", ("W_enc", b_enc, "W_dec", "b_dec"), "columns, rows", own, _FINETUNING)
    layout.check(weights)
    scale = _input_scale(scales_input, weights.settings("activation_scaler.json"), input_scale)
    activation: Activation | None
    activation, gain = gated(weights, b_enc, "b_gate") if architecture == "gated" else (None, None)
    subtracts, finetuned = settings.flag("apply_b_dec_to_input", True), _finetuning(weights, settings, d_sae, rescales)
    fold = Fold(scale, scale, 1.0, subtracts, rescales, encoder_scale=gain, decoder_scale=finetuned)
    activation = activation or _activation(weights, architecture, k)
    return read_stored(weights, located, layout, d_sae, d_model, fold=fold, activation=activation, layer=layer)


def write_file(path: Path, sae: SparseAutoencoder) -> Path:
    """`path` is the folder for cfg.json and the weights."""
    if path.suffix in (".safetensors", ".json", ".pt"):
        raise UserValueError(
            f"SAELens has a folder with cfg.json and sae_weights.safetensors: give a folder, got {path}"
        )
    activation = sae.activation
    metadata: dict[str, Any] = {"sae_lens_version": _VERSION, "saved_by": "qscope_posttrain"}
    if sae.layer is not None:
        metadata["hook_name"] = f"blocks.{sae.layer}.hook_resid_post"
        metadata["hf_hook_name"] = f"model.layers.{sae.layer}"
    metadata["converted_from"] = str(sae.source.origin or sae.source)
    settings: dict[str, Any] = {"d_in": sae.d_model, "d_sae": sae.d_sae, "device": "cpu", "metadata": metadata}
    settings |= {"dtype": str(sae.W_enc.dtype).removeprefix("torch."), "apply_b_dec_to_input": False}
    settings |= {"normalize_activations": "none", "reshape_activations": "none"}
    tensors = {"W_enc": sae.W_enc.t(), "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if isinstance(activation, TopK) and activation.variant != "signed":
        settings |= {"architecture": "topk", "k": activation.k, "rescale_acts_by_decoder_norm": False}
    elif isinstance(activation, ReLU):
        settings["architecture"] = "standard"
    elif isinstance(activation, JumpReLU | BatchTopK):  # SAELens saves BatchTopK as JumpReLU, too
        settings["architecture"] = "jumprelu"
        tensors["threshold"] = _thresholds(activation, sae.b_enc)
    else:
        raise UserValueError(f"SAELens has no architecture for {activation}; save it as native")
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / "sae_weights.safetensors") as unfinished:
        save_file(unshared(tensors), unfinished)
    with replacing(path / "cfg.json") as unfinished:
        unfinished.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _thresholds(activation: JumpReLU | BatchTopK, b_enc: Tensor) -> Tensor:
    if isinstance(activation, JumpReLU):
        return activation.threshold
    uniform = torch.full_like(b_enc, activation.threshold)
    if float(uniform[0]) != activation.threshold and b_enc.dtype != torch.float32:
        raise UserValueError(
            f"the threshold {activation.threshold} cannot be written in {b_enc.dtype}: convert with to(dtype=...)"
        )
    return uniform


def _architecture(settings: Settings) -> tuple[str, int | None]:
    """(architecture at inference, k where it keeps one)"""
    k = _k(settings)
    named = settings.text("architecture", "standard")
    if named in _NO_SAE:
        raise UserValueError(f"it is a {named}, which does not reconstruct what it reads")
    architecture = _ARCHITECTURES.get(named)
    if architecture is None:
        raise UserValueError(f"its architecture is {named!r}; known are {', '.join(_ARCHITECTURES)}")
    if architecture == "standard" and k is not None:
        architecture = "topk"
    if architecture == "topk" and k is None:
        raise UserValueError(f"its architecture is {architecture!r}, but cfg.json lacks k")
    return architecture, k if architecture == "topk" else None


def _k(settings: Settings) -> int | None:
    """k of TopK; before version 6 it was in `activation_fn_kwargs`, with the activation function beside it."""
    function = settings.text("activation_fn", None) or settings.text("activation_fn_str", None) or "relu"
    if function not in ("relu", "topk"):
        raise UserValueError(f"its activation function is {function!r}; known are relu and topk")
    arguments = settings.section("activation_fn_kwargs", None)
    inner = None if arguments is None or function != "topk" else arguments.integer("k", None)
    return settings.integer("k", inner) if settings.text("architecture", "standard") != "batchtopk" else None


def _layer(settings: Settings) -> int | None:
    metadata = settings.section("metadata", settings)
    site = metadata.text("hook_name", None) or settings.text("hook_point", None)
    head = metadata.integer("hook_head_index", None, least=0)
    if settings.text("reshape_activations", "none") != "none" or head is not None:
        raise UserValueError(
            f"it reads the heads of an attention layer ({site!r}), not the residual stream after a layer"
        )
    return None if site is None else layer_of_site(site)


def _scales_input(settings: Settings) -> bool:
    """Whether activations are multiplied by a factor that is not in these settings."""
    kind = settings.values.get("normalize_activations")
    if kind in (None, False, "none"):
        return False
    if kind in (True, "expected_average_only_in"):
        return True
    if kind in ("layer_norm", "constant_norm_rescale"):
        raise UserValueError(
            f"normalize_activations {kind!r} divides by a norm of each token, which cannot be folded into weights"
        )
    if kind == "covariance_whitening":
        raise UserValueError(
            "normalize_activations 'covariance_whitening' is folded by SAELens when training ends: this is a training "
            "checkpoint, save its inference model"
        )
    raise UserValueError(f"normalize_activations is {kind!r}; known are 'none' and 'expected_average_only_in'")


def _input_scale(scales_input: bool, scaler: Settings | None, given: float | None) -> float:
    if not scales_input:
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


def _activation(weights: WeightsFile, architecture: str, k: int | None) -> Activation:
    if architecture == "jumprelu":
        return JumpReLU(weights.tensor("threshold", None).clone())
    return ReLU() if k is None else TopK(k)


def _finetuning(weights: WeightsFile, settings: Settings, d_sae: int, rescales: bool) -> Tensor | None:
    """Factors on the activations that old versions learned after training, and applied in decoding only."""
    name = next((name for name in _FINETUNING if name in weights), None)
    if name is None:
        return None
    factors = weights.tensor(name, d_sae)
    if bool((factors == 1).all()):
        return None
    if not settings.flag("finetuning_scaling_factor", False):
        raise UserValueError(f"it holds a {name} other than 1, but its settings do not enable it")
    if rescales:
        raise UserValueError(f"it has both {name} and rescale_acts_by_decoder_norm, which no version of SAELens writes")
    return factors.float()
