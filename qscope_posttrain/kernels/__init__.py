"""Fused operators of sparse autoencoders, registered as torch.library custom ops.

This folder depends on torch only. Triton is imported when a CUDA tensor arrives, never before.
"""

from qscope_posttrain.kernels.certified import CertifiedCode, CertifiedWeights, certified_encode, certified_weights
from qscope_posttrain.kernels.decode import sparse_decode
from qscope_posttrain.kernels.encode import topk_encode
from qscope_posttrain.kernels.penalty import feature_penalty
from qscope_posttrain.kernels.readout import feature_preactivations
from qscope_posttrain.kernels.statistics import feature_statistics_
from qscope_posttrain.kernels.steering import steer_add, steer_add_
from qscope_posttrain.kernels.threshold import batch_topk_encode, threshold_encode

__all__ = [
    "CertifiedCode",
    "CertifiedWeights",
    "batch_topk_encode",
    "certified_encode",
    "certified_weights",
    "feature_penalty",
    "feature_preactivations",
    "feature_statistics_",
    "sparse_decode",
    "steer_add",
    "steer_add_",
    "threshold_encode",
    "topk_encode",
]
