"""EleutherAI sparsify: `<hookpoint>/{cfg.json,sae.safetensors}`.

    encoder.weight (d_sae, d_in)    encoder.bias (d_sae,)    W_dec (d_sae, d_in)    b_dec (d_in,)

Encoding is topk(relu(encoder(x - b_dec))): b_dec is always subtracted. Transcoders, skip connections and groupmax in
place of topk are refused. The site is the name of the folder ("layers.10").
"""

from __future__ import annotations

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.formats.stored import Fold, Layout, StoredSAE, read_stored
from qscope_posttrain.sae.layout import layer_of_site
from qscope_posttrain.sae.source import LocatedFile
from qscope_posttrain.sae.weights_file import WeightsFile

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
    if settings.text("activation", "topk") != "topk":
        raise UserValueError(f"its activation is {settings.text('activation')!r}; known is topk")
    _LAYOUT.check(weights)
    d_model = settings.integer("d_in")
    d_sae = settings.integer("num_latents", 0, least=0) or d_model * settings.integer("expansion_factor", 32)
    site, fold = weights.path.parent.name, Fold(subtract_b_dec=True)
    activation = TopK(settings.integer("k", 32), "signed" if settings.flag("signed", False) else "relu_before")
    layer = layer_of_site(site) if site.startswith(_MODULE) else None
    return read_stored(weights, located, _LAYOUT, d_sae, d_model, fold=fold, activation=activation, layer=layer)
