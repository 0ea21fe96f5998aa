"""Qwen-Scope: `layer{n}.sae.pt`, a pickled dict of four tensors.

    W_enc (d_sae, d_model)    W_dec (d_model, d_sae)    b_enc (d_sae,)    b_dec (d_model,)

The direction of a feature is a *column* of W_dec. Encoding is topk(x @ W_enc.T + b_enc), without subtraction of b_dec
and without input scaling, so nothing has to be folded. k is not in the file: it is part of the release's name.
"""

from __future__ import annotations

from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.containers.weights_file import WeightsFile
from qscope_posttrain.sae.formats.stored import StoredSAE
from qscope_posttrain.sae.source import LocatedFile

FORMAT = "qwen_scope"
KEYS = ("W_enc", "W_dec", "b_enc", "b_dec")


def recognises(weights: WeightsFile) -> bool:
    """A torch archive with any of the four, and nothing that only other libraries call so."""
    theirs = ("encoder.weight", "W_E", "W_D", "log_jumprelu_threshold", "r_mag", "group_sizes")
    if weights.kind != "torch" or weights.metadata or any(name in weights for name in theirs):
        return False
    return "threshold" not in weights or weights.settings("config.json") is None


def open_file(weights: WeightsFile, located: LocatedFile, input_scale: float | None) -> StoredSAE:
    """Open one layer. ValueError that names the fault if it is not a Qwen-Scope SAE."""
    weights.only(set(KEYS))
    W_enc, W_dec = (weights.any_matrix(name) for name in ("W_enc", "W_dec"))
    b_enc, b_dec = (weights.vector(name) for name in ("b_enc", "b_dec"))
    d_sae = _check_shapes(W_enc, b_enc, W_dec, b_dec)
    if located.release is not None and located.release.d_sae != d_sae:
        raise UserValueError(
            f"it holds {d_sae} latents, but its release {located.release.name} has {located.release.d_sae}"
        )
    return StoredSAE(weights.path, FORMAT, W_enc, b_enc, W_dec.t(), b_dec, weights.memory_mapped, layer=located.layer)


def _check_shapes(encoder: Tensor, b_enc: Tensor, decoder: Tensor, b_dec: Tensor) -> int:
    """d_sae, or a ValueError that says which of the ways of being wrong this is."""
    d_sae, d_model = b_enc.shape[0], b_dec.shape[0]
    upright, transposed = (d_sae, d_model), (d_model, d_sae)
    W_enc, W_dec = tuple(encoder.shape), tuple(decoder.shape)
    if d_sae == d_model and W_enc == W_dec == upright:
        raise UserValueError(
            f"all matrices are {d_sae} x {d_sae}, so that their orientation cannot be told from the shapes and "
            "a swapped file would pass unnoticed. No Qwen-Scope release is square; if you know the orientation, build "
            "SparseAutoencoder(...) yourself and save() it"
        )
    if (W_enc, W_dec) == (upright, transposed):
        return d_sae
    found = f"W_enc {list(W_enc)}, W_dec {list(W_dec)}, b_enc [{d_sae}], b_dec [{d_model}]"
    expected = "Qwen-Scope has W_enc [d_sae, d_model], W_dec [d_model, d_sae], b_enc [d_sae], b_dec [d_model]"
    if (W_enc, W_dec) == (transposed, upright):
        fault = "W_enc and W_dec (or b_enc and b_dec) are swapped"
    elif (W_enc, W_dec) == (upright, upright):
        fault = "W_dec is transposed"
    elif (W_enc, W_dec) == (transposed, transposed):
        fault = "W_enc is transposed"
    else:
        fault = "the shapes do not belong together"
    raise UserValueError(f"{fault}: {found}. {expected}")
