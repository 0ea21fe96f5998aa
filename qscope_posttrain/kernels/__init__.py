"""Fused operators for sparse autoencoders, as torch.library custom ops, for torch alone.

Nothing here imports the rest of the package. Triton is imported when a CUDA tensor arrives, never before.
"""

from qscope_posttrain.kernels.decode import sparse_decode
from qscope_posttrain.kernels.encode import topk_encode
from qscope_posttrain.kernels.penalty import feature_penalty
from qscope_posttrain.kernels.readout import feature_preactivations

__all__ = ["feature_penalty", "feature_preactivations", "sparse_decode", "topk_encode"]
