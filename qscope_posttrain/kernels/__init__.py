"""Fused operators of sparse autoencoders, registered as torch.library custom ops.

This folder depends on torch only. Triton is imported when a CUDA tensor arrives, never before. All operators raise
ValueError or TypeError for shapes, devices, dtypes or options that do not fit.
"""

from qscope_posttrain.kernels.certified import CertifiedCode, CertifiedWeights, certified_encode, certified_weights
from qscope_posttrain.kernels.decode import sparse_decode
from qscope_posttrain.kernels.encode import batch_topk_encode, threshold_encode, topk_encode
from qscope_posttrain.kernels.penalty import feature_penalty, feature_preactivations
from qscope_posttrain.kernels.statistics import feature_statistics_
from qscope_posttrain.kernels.steering import steer_add

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
    "threshold_encode",
    "topk_encode",
]
