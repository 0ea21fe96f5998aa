"""EleutherAI sparsify: `<hookpoint>/{cfg.json,sae.safetensors}`.

    encoder.weight (d_sae, d_in)    encoder.bias (d_sae,)    W_dec (d_sae, d_in)    b_dec (d_in,)

Encoding is topk(relu(encoder(x - b_dec))), or groupmax in place of topk: b_dec is always subtracted. Transcoders and
skip connections are refused. The site is the name of the folder ("layers.10").
"""

from __future__ import annotations

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.activations import Activation, GroupMax, TopK
from qscope_posttrain.sae.containers.json_file import Settings
from qscope_posttrain.sae.containers.weights_file import WeightsFile
from qscope_posttrain.sae.formats.stored import Fold, Layout, StoredSAE, read_stored
from qscope_posttrain.sae.layout import layer_of_site
from qscope_posttrain.sae.source import LocatedFile

_LAYOUT = Layout("sparsify", ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), "rows, rows")
_MODULE = ("layers", "blocks", "h.", "embed", "model.", "transformer.", "gpt_neox.")


def recognizes(weights: WeightsFile) -> bool:
    return weights.kind == "safetensors" and {"encoder.weight", "b_dec"} <= weights.names


def open_file(weights: WeightsFile, located: LocatedFile) -> StoredSAE:
    settings = weights.required_settings("cfg.json")
    if settings.flag("transcode", False) or settings.flag("skip_connection", False) or "W_skip" in weights:
        raise UserValueError("it is a transcoder, or has a skip connection: it does not reconstruct what it reads")
    if "W_dec" not in weights:
        raise UserValueError("it lacks W_dec: it was saved without its decoder")
    _LAYOUT.check(weights)
    d_model = settings.integer("d_in")
    d_sae = settings.integer("num_latents", 0, least=0) or d_model * settings.integer("expansion_factor", 32)
    site = weights.path.parent.name
    return read_stored(
        weights,
        located,
        _LAYOUT,
        d_sae,
        d_model,
        fold=Fold(subtract_b_dec=True),
        activation=_activation(settings),
        layer=layer_of_site(site) if site.startswith(_MODULE) else None,
    )


def _activation(settings: Settings) -> Activation:
    name = settings.text("activation", "topk")
    if name == "groupmax":
        return GroupMax(settings.integer("k", 32))
    if name != "topk":
        raise UserValueError(f"its activation is {name!r}; known are topk and groupmax")
    return TopK(settings.integer("k", 32), "signed" if settings.flag("signed", False) else "relu_before")
