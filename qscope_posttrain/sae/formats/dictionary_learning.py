"""saprmarks/dictionary_learning: `trainer_<i>/{ae.pt,config.json}`; `trainer.dict_class` in the config decides.

    AutoEncoder             encoder.weight (d_sae, d), encoder.bias, decoder.weight (d, d_sae), bias (d,)
    AutoEncoderNew          encoder.weight, encoder.bias, decoder.weight, decoder.bias
    AutoEncoderTopK         encoder.weight, encoder.bias, decoder.weight, b_dec, k, threshold
    BatchTopKSAE            the same
    MatryoshkaBatchTopKSAE  W_enc (d, d_sae), b_enc, W_dec (d_sae, d), b_dec, k, threshold, group_sizes
    JumpReluAutoEncoder     W_enc (d, d_sae), b_enc, W_dec (d_sae, d), b_dec, threshold (d_sae,)
    GatedAutoEncoder        encoder.weight, decoder.weight, decoder_bias, r_mag, gate_bias, mag_bias

All but AutoEncoderNew and JumpReluAutoEncoder subtract the decoder's bias before encoding. The gate of GatedAutoEncoder
opens where W (x - b) + gate_bias > 0; its magnitude is exp(r_mag) W (x - b) + mag_bias, so that the gate is the
threshold mag_bias - exp(r_mag) gate_bias on the magnitude: a JumpReLU.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from qscope_posttrain.sae.containers.json_file import Settings
from qscope_posttrain.sae.containers.weights_file import WeightsFile
from qscope_posttrain.sae.formats.stored import Fold, StoredSAE, read_stored
from qscope_posttrain.sae.layout import layer_of_site
from qscope_posttrain.sae.source import LocatedFile

FORMAT = "dictionary_learning"


@dataclass(frozen=True)
class _Class:
    names: tuple[str, str, str, str]
    """Of encoder, its bias, decoder, its bias."""
    more: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    subtracts: bool = True

    @property
    def keys(self) -> set[str]:
        return {*self.names, *self.more}


_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
_CLASSES = {
    "AutoEncoder": _Class((*_LINEAR, "bias")),
    "AutoEncoderNew": _Class((*_LINEAR, "decoder.bias"), subtracts=False),
    "AutoEncoderTopK": _Class((*_LINEAR, "b_dec"), ("k",), ("threshold",)),
    "BatchTopKSAE": _Class((*_LINEAR, "b_dec"), ("k", "threshold")),
    "MatryoshkaBatchTopKSAE": _Class(_PLAIN, ("k", "threshold", "group_sizes")),
    "JumpReluAutoEncoder": _Class(_PLAIN, ("threshold",), subtracts=False),
    "GatedAutoEncoder": _Class(
        ("encoder.weight", "mag_bias", "decoder.weight", "decoder_bias"), ("r_mag", "gate_bias")
    ),
}


def recognizes(weights: WeightsFile) -> bool:
    if weights.kind != "torch" or weights.metadata or "W_E" in weights or "log_jumprelu_threshold" in weights:
        return False
    if {"encoder.weight", "decoder.weight"} <= weights.names or "group_sizes" in weights:
        return True
    return "threshold" in weights and weights.settings("config.json") is not None


def open_file(weights: WeightsFile, located: LocatedFile, input_scale: float | None) -> StoredSAE:
    settings = weights.settings("config.json")
    trainer = None if settings is None else settings.section("trainer")
    name = _class_name(weights, trainer)
    kind = _CLASSES[name]
    weights.only(kind.keys, kind.optional)
    b_enc, b_dec = weights.vector(kind.names[1]), weights.vector(kind.names[3])
    d_sae, d_model = b_enc.shape[0], b_dec.shape[0]
    if trainer is not None:
        stated = trainer.integer("dict_size", d_sae), trainer.integer("activation_dim", d_model)
        if stated != (d_sae, d_model):
            raise UserValueError(
                f"config.json states dict_size and activation_dim {stated}, it holds {(d_sae, d_model)}"
            )
    features_in = "columns, rows" if kind.names == _PLAIN else "rows, columns"
    fold, activation = _activation(weights, name, trainer, b_enc, kind.subtracts)
    layer = None if trainer is None else _layer(trainer)
    return read_stored(weights, FORMAT, kind.names, features_in, fold=fold, activation=activation, layer=layer)


def _class_name(weights: WeightsFile, trainer: Settings | None) -> str:
    if trainer is not None:
        name: str = trainer.text("dict_class")
        if name not in _CLASSES:
            raise UserValueError(f"dict_class is {name!r}; known are {', '.join(_CLASSES)}")
        return name
    fitting = [name for name, kind in _CLASSES.items() if kind.keys <= weights.names <= kind.keys | set(kind.optional)]
    if len(fitting) == 1:
        return fitting[0]
    words = f"it could be {' or '.join(fitting)}" if fitting else "its tensors are those of no class"
    raise UserValueError(f"its config.json is missing, without which {words} of dictionary_learning")


def _activation(
    weights: WeightsFile, name: str, trainer: Settings | None, b_enc: Tensor, subtracts: bool
) -> tuple[Fold, Activation]:
    d_sae, fold = b_enc.shape[0], Fold(subtract_b_dec=subtracts)
    if name == "GatedAutoEncoder":
        gain = weights.vector("r_mag", d_sae).float().exp()
        threshold = b_enc.float() - gain * weights.vector("gate_bias", d_sae).float()
        return Fold(subtract_b_dec=subtracts, encoder_scale=gain), JumpReLU(threshold)
    if name == "JumpReluAutoEncoder":
        return fold, JumpReLU(weights.vector("threshold", d_sae).clone())
    if name in ("AutoEncoder", "AutoEncoderNew"):
        return fold, ReLU()
    k = weights.integer("k")
    if trainer is not None and trainer.integer("k", k) != k:
        raise UserValueError(f"contradicting k: config.json says {trainer.integer('k')}, the weights {k}")
    if name == "AutoEncoderTopK":
        return fold, TopK(k, "relu_before")
    return fold, BatchTopK(weights.scalar("threshold"))


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
