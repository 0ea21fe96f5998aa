"""topk_encode: the k largest pre-activations of each token, without the [tokens, d_sae] matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qscope_posttrain.kernels.certified import CertifiedWeights, certified_encode
from qscope_posttrain.kernels.checks import check_choice, check_encoder, check_k, check_tiles
from qscope_posttrain.kernels.encode_gradient import register_gradient
from qscope_posttrain.kernels.select import topk_product
from qscope_posttrain.kernels.tiles import product_dtype, result_dtype

PRECISIONS = ("model", "fp32", "certified")
VARIANTS = ("relu_after", "relu_before", "signed")


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    precision: str = "model",
    variant: str = "relu_after",
    weights: CertifiedWeights | None = None,
    tile_tokens: int | None = None,
    tile_features: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of W_enc x + b_enc for each token, without the [tokens, d_sae] matrix.

    Args:
        x: [tokens, d_model], any floating point dtype, converted to that of the product; need not be contiguous.
        W_enc: [d_sae, d_model], a feature's encoder row is a row.
        b_enc: [d_sae], in the dtype of W_enc.
        k: At most d_sae.
        precision: "model": the product is in the dtype of W_enc. A bfloat16 or float16 product rounds its results, so
            that about 1 % of the kept features differ from those of a float32 product.
            "fp32": in float32 whatever the weights are stored in (float64 for float64 weights).
            "certified": a float32 result at nearly the cost of the bfloat16 product, proved row by row: see
            `certified.certified_encode`, which also tells how many rows had to be done in float32.
        variant: "relu_after" relu(topk(z)); "relu_before" topk(relu(z)), the same values; "signed" topk(z).
        weights: For "certified", `certified_weights(W_enc, b_enc)`, so as not to be made again by each call.
        tile_tokens, tile_features: Size of the tile. By default the tile has 2^24 elements at most.

    Returns:
        values [tokens, k], float32 (float64 for float64 weights), sorted, the largest first; indices [tokens, k],
        int32, distinct in each row. Equal values are ordered, and chosen, by the lowest index. With a ReLU, entries of
        value 0 carry a valid index but do not fire. NaN counts as the largest: a row of x with NaN returns NaN, at
        the lowest indices; other rows are not affected.

    Memory: a tile, and 12 bytes for each of tokens * k entries. Deterministic for a given tile size; another tile size
    may change the rounding of the product, never the order of equal values. Not affected by autocast.

    Differentiable with respect to x, W_enc and b_enc (the choice of the features is not): see `encode_gradient`. Saves
    x, values and indices.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes or options that do not fit.
    """
    check_encoder(x, W_enc, b_enc)
    check_k(k, W_enc.shape[0])
    check_choice("precision", precision, PRECISIONS)
    check_choice("variant", variant, VARIANTS)
    check_tiles(tile_tokens, tile_features)
    if precision == "certified":
        code = certified_encode(
            x, W_enc, b_enc, k, weights=weights, variant=variant, tile_tokens=tile_tokens, tile_features=tile_features
        )
        return code.values, code.indices
    if weights is not None:
        raise ValueError(f"weights belong to precision='certified', got precision={precision!r}")
    code = _topk_encode(x, W_enc, b_enc, k, precision == "fp32", variant != "signed", tile_tokens, tile_features)
    return code[0], code[1]


@torch.library.custom_op("qscope_posttrain::topk_encode", mutates_args=())
def _topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    fp32: bool,
    relu: bool,
    tile_tokens: int | None,
    tile_features: int | None,
) -> tuple[Tensor, Tensor]:
    values, indices = topk_product(x, W_enc, b_enc, k, product_dtype(W_enc, fp32), tile_tokens, tile_features)
    return (values.relu_() if relu else values), indices


@_topk_encode.register_fake
def _(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    fp32: bool,
    relu: bool,
    tile_tokens: int | None,
    tile_features: int | None,
) -> Sequence[Tensor]:
    return x.new_empty(x.shape[0], k, dtype=result_dtype(W_enc)), x.new_empty(x.shape[0], k, dtype=torch.int32)


register_gradient(_topk_encode, relu=lambda inputs: inputs[5])
