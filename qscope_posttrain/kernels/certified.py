"""The k largest pre-activations in float32, found with a bfloat16 product: every row is proved, or done in float32.

Notation, for one row x and features s: z_s = x . w_s + b_s in real numbers; y_s is z_s evaluated in float32, in any
order of summation; a_s is the bfloat16 product, from x~, w~_s, b~_s rounded to bfloat16. u = 2^-24, D = d_model,
N = max |w_s|, E = max |w_s - w~_s|, B = max |b_s|, E_b = max |b_s - b~_s| over all s, and |.| the Euclidean norm.

Bound. For all s

    |y_s - a_s| <= r |a_s| + eps,      r = 2^-8 + 2^-16
    eps = |x - x~| N + |x~| E + E_b + r (B + E_b) + g (|x| N + |x~| (N + E) + 2 B + E_b) + tiny

Proof. (1) z_s - (x~ . w~_s + b~_s) = (x - x~) . w_s + x~ . (w_s - w~_s) + (b_s - b~_s), of which Cauchy-Schwarz bounds
the first two terms by |x - x~| N and |x~| E. (2) n + 1 float32 additions of products, with or without fused
multiply-add, err by at most g (sum |x_i w_i| + |b|), where g = n u' / (1 - n u'), n = D + 2 (Higham 2002, section 3.1);
sum |x_i w_i| <= |x| |w_s|. u' = 2^-23 instead of 2^-24 allows for units that truncate. This is used twice: for y_s, and
for the sum behind a_s, whose products of bfloat16 numbers are exact, with |w~_s| <= N + E. (3) That sum is rounded to
bfloat16 once, or before and after the bias is added: each time by at most 2^-9 of the result, where the first result is
at most |a_s| (1 + 2^-8) + |b~_s|; together less than r (|a_s| + |b~_s|). (4) Denormal factors, products and results may
be flushed to zero: each loses less than 2^-126, together less than tiny = 2^-126 (4 D + 4 + sqrt(D) (|x| + |x~| + 2 N +
E)). (5) Nothing overflows if |x| (N + E), |x~| (N + E) and B are below 2^125; where they are not, x is not finite, or D
is above 2^22, eps is infinite. QED

Selection. Let m >= k features of the largest a_s be the candidates, a_m their smallest, and y_(k) the k-th largest y_s
of candidates. a + r |a| grows with a, so that every other feature has y_s <= a_m + r |a_m| + eps. If this is below
y_(k), no other feature belongs to the k first, not even by a tie: the row is *certified*. In the same way a candidate
need not be evaluated if its bound is below the k-th largest y_s of any k features. Rows that are not certified (the
band was wider than m - k features, or eps is infinite) are encoded in float32 and counted.

The norms are computed in float64, and eps is enlarged by 2^-20 of itself for their rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qscope_posttrain.kernels import native
from qscope_posttrain.kernels.checks import check_encoder, check_same, check_shape
from qscope_posttrain.kernels.decode import register_encoder_gradient
from qscope_posttrain.kernels.select import best, product_dtype, topk_product

BAND = 96  # Candidates beyond k: more cost little, since only those within the bound are evaluated
_ROUNDING = 2.0**-8 + 2.0**-16
_NORM_TOKENS = 256
_GATHERED_ELEMENTS = 1 << 22  # Weights gathered at a time: 16 MiB


class CertifiedWeights(NamedTuple):
    """Bounds for `topk_encode(precision="certified")`; they must be made from the same weights."""

    W_low: Tensor  # W_enc in bfloat16, [d_sae, d_model]; W_enc itself if it is bfloat16
    b_low: Tensor  # b_enc in bfloat16, [d_sae]
    norms: Tensor  # (N, E, B, E_b), float64, [4]


class CertifiedCode(NamedTuple):
    values: Tensor  # [tokens, k], float32
    indices: Tensor  # [tokens, k], int32
    recomputed: Tensor  # Number of rows that were not certified and were encoded in float32: int64, [], on the device


def certified_weights(W_enc: Tensor, b_enc: Tensor) -> CertifiedWeights:
    """Compute the bfloat16 copy and the norms in one pass over W_enc. They are valid until the weights change."""
    W_low, b_low = W_enc.bfloat16(), b_enc.bfloat16()
    norms = W_enc.new_zeros(4, dtype=torch.float64)
    step = max(1, _GATHERED_ELEMENTS // max(1, 2 * W_enc.shape[1]))
    for start in range(0, W_enc.shape[0], step):
        W, b = W_enc[start : start + step].double(), b_enc[start : start + step].double()
        parts = (
            W.norm(dim=1).amax(),
            (W - W_low[start : start + step]).norm(dim=1).amax(),
            b.abs().amax(),
            (b - b_low[start : start + step]).abs().amax(),
        )
        norms = torch.maximum(norms, torch.stack(parts))
    return CertifiedWeights(W_low, b_low, norms)


def certified_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    weights: CertifiedWeights | None = None,
    variant: str = "relu_after",
    tile_tokens: int | None = None,
    tile_features: int | None = None,
) -> CertifiedCode:
    """`topk_encode(precision="certified")` with the number of rows that had to be encoded in float32."""
    check_encoder(x, W_enc, b_enc, k)
    if W_enc.dtype == torch.float64:
        raise ValueError("certified results are float32: for float64 weights use precision='fp32' or 'model'")
    weights = certified_weights(W_enc, b_enc) if weights is None else weights
    for (name, tensor), shape in zip(weights._asdict().items(), (W_enc.shape, b_enc.shape, (4,)), strict=True):
        check_shape(f"weights.{name}", tensor, tuple(shape))
        check_same("device", W_enc=W_enc, **{f"weights.{name}": tensor})
        dtype = torch.float64 if name == "norms" else torch.bfloat16
        if tensor.dtype != dtype:
            raise TypeError(f"weights.{name} must be {dtype}, got {tensor.dtype}")
    return CertifiedCode(*_certified(x, W_enc, b_enc, *weights, k, variant != "signed", tile_tokens, tile_features))


@torch.library.custom_op("qscope_posttrain::topk_encode_certified", mutates_args=())
def _certified(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_low: Tensor,
    b_low: Tensor,
    norms: Tensor,
    k: int,
    relu: bool,
    tile_tokens: int | None,
    tile_features: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    exact, d_sae, x = product_dtype(W_enc, fp32=True), W_enc.shape[0], x.float()
    m = min(d_sae, k + BAND)
    with torch.autocast(x.device.type, enabled=False):
        low, candidates = topk_product(x, W_low, b_low, m, torch.bfloat16, tile_tokens, tile_features)
        eps = error_bound(x, norms)
        values, indices, kth = _rescore(x, W_enc, b_enc, low, candidates, eps, k)
        uncertified = ~(kth > _upper(low[:, -1], eps)) if m < d_sae else torch.zeros_like(kth, dtype=torch.bool)
        again = uncertified.nonzero().squeeze(1)
        if again.numel():
            values[again], indices[again] = topk_product(x[again], W_enc, b_enc, k, exact, tile_tokens, tile_features)
    return (values.relu_() if relu else values), indices, uncertified.sum()


def error_bound(x: Tensor, norms: Tensor) -> Tensor:
    """eps of the module docstring for each row of x [tokens, d_model] (float32): float64, [tokens]."""
    N, E, B, E_b = norms.unbind()
    D = x.shape[1]
    nu = min((D + 2) * 2.0**-23, 0.5)
    sizes = x.new_empty(3, x.shape[0], dtype=torch.float64)
    for rows, norms_of_rows in zip(x.split(_NORM_TOKENS), sizes.split(_NORM_TOKENS, dim=1), strict=True):
        exact, rounded = rows.double(), rows.bfloat16().double()
        for norm, vectors in zip(norms_of_rows, (exact, rounded, exact - rounded), strict=True):
            torch.linalg.vector_norm(vectors, dim=1, out=norm)
    size, size_low, lost = sizes
    tiny = 2.0**-126 * (4 * D + 4 + D**0.5 * (size + size_low + 2 * N + E))
    eps = lost * N + size_low * E + E_b + _ROUNDING * (B + E_b) + tiny
    eps = eps + nu / (1 - nu) * (size * N + size_low * (N + E) + 2 * B + E_b)
    largest = torch.maximum(torch.maximum(size, size_low) * (N + E), B)
    applies = largest < 2.0**125 if nu < 0.5 else torch.zeros_like(size, dtype=torch.bool)
    return torch.where(applies, eps * (1 + 2.0**-20), torch.inf)


def _upper(low: Tensor, eps: Tensor) -> Tensor:
    """The largest y_s that a bfloat16 pre-activation `low` can stand for."""
    low = low.double()
    return low + low.abs() * _ROUNDING + eps


def _rescore(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, low: Tensor, candidates: Tensor, eps: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k first candidates by float32 value, and the k-th value. low, candidates [tokens, m], by descending low."""
    values = torch.full_like(low, -torch.inf)
    every = torch.full_like(candidates[:, 0], k)
    dot_products(values, x, W_enc, b_enc, candidates, torch.zeros_like(every), every)
    kth = values[:, :k].amin(dim=1)
    useful = ~(_upper(low, eps[:, None]) < kth[:, None])  # a prefix of each row; all of it where anything is NaN
    dot_products(values, x, W_enc, b_enc, candidates, every, useful.sum(dim=1, dtype=torch.int32).clamp_(min=k))
    found, where = best(values, candidates.long(), k)
    return found, where.to(torch.int32), found[:, k - 1]


def dot_products(
    out: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, indices: Tensor, first: Tensor, last: Tensor
) -> None:
    """out[t, j] = x[t] . W_enc[indices[t, j]] + b_enc[..] in float32 for at least first[t] <= j < last[t], in place."""
    if x.is_cuda:
        from qscope_posttrain.kernels.triton.decode import dot_rows_

        dot_rows_(out, x, indices, W_enc, b_enc, first, last)
    elif native.can_multiply(x, W_enc, b_enc):
        native.dot_products(out, x, W_enc, b_enc, indices, first, last)
    else:
        step = max(1, _GATHERED_ELEMENTS // max(1, indices.shape[1] * x.shape[1]))
        for start in range(0, x.shape[0], step):
            rows = slice(start, start + step)
            begin, end = int(first[rows].min()), int(last[rows].max())
            if begin < end:
                chosen = indices[rows, begin:end].long()
                product = torch.bmm(W_enc[chosen].float(), x[rows, :, None]).squeeze(2)
                out[rows, begin:end] = product + b_enc[chosen].float()


@_certified.register_fake
def _(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_low: Tensor, b_low: Tensor, norms: Tensor, k: int, *_: object
) -> tuple[Tensor, ...]:
    values = x.new_empty(x.shape[0], k, dtype=torch.float32)
    return values, torch.empty_like(values, dtype=torch.int32), x.new_empty((), dtype=torch.int64)


register_encoder_gradient(_certified, relu=lambda inputs: inputs[7])
