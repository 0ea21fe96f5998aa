"""cfg.json of SAELens, in the layout of version 6 and in those before it."""

from __future__ import annotations

from dataclasses import dataclass

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.containers.json_file import Settings
from qscope_posttrain.sae.sites import layer_of_site

ARCHITECTURES = {
    "standard": "standard",
    "topk": "topk",
    "abstopk": "abstopk",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
}
"""What an architecture is at inference. SAELens saves batch variants as JumpReLU."""

_NO_SAE = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


@dataclass(frozen=True)
class SAELensSettings:
    d_in: int
    d_sae: int
    architecture: str
    """"standard", "topk", "abstopk", "jumprelu" or "gated"."""
    k: int | None
    apply_b_dec_to_input: bool
    scales_input: bool
    """Activations are multiplied by a factor that is not in these settings."""
    rescale_acts_by_decoder_norm: bool
    finetuning_scaling_factor: bool
    layer: int | None


def parse_settings(settings: Settings) -> SAELensSettings:
    """ValueError for what is not an SAE of the residual stream after a layer, or cannot be folded into weights."""
    metadata = settings.section("metadata", settings)
    k = _k(settings)
    named = settings.text("architecture", "standard")
    if named in _NO_SAE:
        raise UserValueError(f"it is a {named}, which does not reconstruct what it reads")
    architecture = ARCHITECTURES.get(named)
    if architecture is None:
        raise UserValueError(f"its architecture is {named!r}; known are {', '.join(ARCHITECTURES)}")
    if architecture == "standard" and k is not None:
        architecture = "topk"
    keeps_k = architecture in ("topk", "abstopk")
    if keeps_k and k is None:
        raise UserValueError(f"its architecture is {architecture!r}, but cfg.json lacks k")
    site = metadata.text("hook_name", None) or settings.text("hook_point", None)
    head = metadata.integer("hook_head_index", None, least=0)
    if settings.text("reshape_activations", "none") != "none" or head is not None:
        raise UserValueError(
            f"it reads the heads of an attention layer ({site!r}), not the residual stream after a layer"
        )
    return SAELensSettings(
        d_in=settings.integer("d_in"),
        d_sae=settings.integer("d_sae"),
        architecture=architecture,
        k=k if keeps_k else None,
        apply_b_dec_to_input=settings.flag("apply_b_dec_to_input", True),
        scales_input=_scales_input(settings),
        rescale_acts_by_decoder_norm=keeps_k and settings.flag("rescale_acts_by_decoder_norm", False),
        finetuning_scaling_factor=settings.flag("finetuning_scaling_factor", False),
        layer=None if site is None else layer_of_site(site),
    )


def _k(settings: Settings) -> int | None:
    """k of TopK; before version 6 it stood in `activation_fn_kwargs`, with the activation function beside it."""
    function = settings.text("activation_fn", None) or settings.text("activation_fn_str", None) or "relu"
    if function not in ("relu", "topk"):
        raise UserValueError(f"its activation function is {function!r}; known are relu and topk")
    arguments = settings.section("activation_fn_kwargs", None)
    inner = None if arguments is None or function != "topk" else arguments.integer("k", None)
    return settings.integer("k", inner) if settings.text("architecture", "standard") != "batchtopk" else None


def _scales_input(settings: Settings) -> bool:
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
