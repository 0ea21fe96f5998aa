"""Training of sparse autoencoders, on text (`run`) or on activations in memory (`in_memory`).

In units z = (x - center) / scale, with the geometric median of the activations as center:

    pre   = W_enc z + b_enc
    f     = topk(pre), batch_topk(pre) or jumprelu(pre)
    z_hat = W_dec^T f + b_dec
    loss  = mean (z_hat - z)^2 / variance + weight * AuxK (+ a penalty on L0 for jumprelu)

Decoder rows keep norm 1. At the end everything is folded into raw units: a canonical `SparseAutoencoder`.
"""

from qscope_posttrain.sae.training.config import SAETrainingConfig
from qscope_posttrain.sae.training.in_memory import explained_variance, train_saes

__all__ = ["SAETrainingConfig", "explained_variance", "train_saes"]
