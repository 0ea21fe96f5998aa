"""saprmarks/dictionary_learning: `trainer_<i>/{ae.pt,config.json}`; `trainer.dict_class` in the config decides.

    AutoEncoder             encoder.weight (d_sae, d), encoder.bias, decoder.weight (d, d_sae), bias (d,)
    AutoEncoderNew          encoder.weight, encoder.bias, decoder.weight, decoder.bias
    AutoEncoderTopK         encoder.weight, encoder.bias, decoder.weight, b_dec, k, threshold
    BatchTopKSAE            the same
    MatryoshkaBatchTopKSAE  W_enc (d, d_sae), b_enc, W_dec (d_sae, d), b_dec, k, threshold, group_sizes
    JumpReluAutoEncoder     W_enc (d, d_sae), b_enc, W_dec (d_sae, d), b_dec, threshold (d_sae,)
    GatedAutoEncoder        encoder.weight, decoder.weight, decoder_bias, r_mag, gate_bias, mag_bias

All but AutoEncoderNew and JumpReluAutoEncoder subtract the decoder's bias before encoding.
"""

from __future__ import annotations

from functools import partial

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from qscope_posttrain.sae.checks import Settings
from qscope_posttrain.sae.formats.stored import Fold, Layout, StoredSAE, gated, read_stored
from qscope_posttrain.sae.layout import layer_of_site
from qscope_posttrain.sae.source import LocatedFile
from qscope_posttrain.sae.weights_file import WeightsFile

_layout = partial(Layout, "dictionary_learning")
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
_GATED = ("encoder.weight", "mag_bias", "decoder.weight", "decoder_bias")
_CLASSES = {
    "AutoEncoder": _layout((*_LINEAR, "bias"), "rows, columns"),
    "AutoEncoderNew": _layout((*_LINEAR, "decoder.bias"), "rows, columns"),
    "AutoEncoderTopK": _layout((*_LINEAR, "b_dec"), "rows, columns", ("k",), ("threshold",)),
    "BatchTopKSAE": _layout((*_LINEAR, "b_dec"), "rows, columns", ("k", "threshold")),
    "MatryoshkaBatchTopKSAE": _layout(_PLAIN, "columns, rows", ("k", "threshold", "group_sizes")),
    "JumpReluAutoEncoder": _layout(_PLAIN, "columns, rows", ("threshold",)),
    "GatedAutoEncoder": _layout(_GATED, "rows, columns", ("r_mag", "gate_bias")),
}
_NOT_SUBTRACTING = ("AutoEncoderNew", "JumpReluAutoEncoder")


def recognizes(weights: WeightsFile) -> bool:
    if weights.kind != "torch" or weights.metadata or "W_E" in weights or "log_jumprelu_threshold" in weights:
        return False
    if {"encoder.weight", "decoder.weight"} <= weights.names or "group_sizes" in weights:
        return True
    return "threshold" in weights and weights.settings("config.json") is not None


def open_file(weights: WeightsFile, located: LocatedFile) -> StoredSAE:
    settings = weights.settings("config.json")
    trainer = None if settings is None else settings.section("trainer")
    name = _class_name(weights, trainer)
    layout = _CLASSES[name]
    layout.check(weights)
    if trainer is not None:
        shape = tuple(weights.tensor(layout.names[place], None).shape[0] for place in (1, 3))
        stated = trainer.integer("dict_size", shape[0]), trainer.integer("activation_dim", shape[1])
        if stated != shape:
            raise UserValueError(f"config.json states dict_size and activation_dim {stated}, it holds {shape}")
    activation: Activation | None
    activation, gain = gated(weights, "mag_bias", "gate_bias") if name == "GatedAutoEncoder" else (None, None)
    fold = Fold(subtract_b_dec=name not in _NOT_SUBTRACTING, encoder_scale=gain)
    activation = activation or _activation(weights, name, trainer)
    layer = None if trainer is None else _layer(trainer)
    return read_stored(weights, located, layout, fold=fold, activation=activation, layer=layer)


def _class_name(weights: WeightsFile, trainer: Settings | None) -> str:
    if trainer is not None:
        name: str = trainer.text("dict_class")
        if name not in _CLASSES:
            raise UserValueError(f"dict_class is {name!r}; known are {', '.join(_CLASSES)}")
        return name
    fitting = [
        name
        for name, layout in _CLASSES.items()
        if layout.required <= weights.names <= layout.required | {*layout.optional}
    ]
    if len(fitting) == 1:
        return fitting[0]
    words = f"it could be {' or '.join(fitting)}" if fitting else "its tensors are those of no class"
    raise UserValueError(f"its config.json is missing, without which {words} of dictionary_learning")


def _activation(weights: WeightsFile, name: str, trainer: Settings | None) -> Activation:
    if name == "JumpReluAutoEncoder":
        return JumpReLU(weights.tensor("threshold", None).clone())
    if name in ("AutoEncoder", "AutoEncoderNew"):
        return ReLU()
    k = weights.integer("k")
    if trainer is not None and trainer.integer("k", k) != k:
        raise UserValueError(f"contradicting k: config.json says {trainer.integer('k')}, the weights {k}")
    return TopK(k, "relu_before") if name == "AutoEncoderTopK" else BatchTopK(weights.number("threshold"))


def _layer(trainer: Settings) -> int | None:
    """`layer` counts decoder layers, unless `submodule_name` says that it is something else inside of them."""
    layer: int | None = trainer.integer("layer", None, least=0)
    site = trainer.text("submodule_name", None)
    if site is None:
        return layer
    named = layer_of_site(site)
    if layer is not None and layer != named:
        raise UserValueError(f"config.json says layer {layer} and submodule_name {site!r}")
    return named
