"""Fused operators for sparse autoencoders, as torch.library custom ops, for torch alone.

Nothing here imports the rest of the package. Triton is imported when a CUDA tensor arrives, never before.
"""

from qscope_posttrain.kernels.encode import topk_encode

__all__ = ["topk_encode"]
