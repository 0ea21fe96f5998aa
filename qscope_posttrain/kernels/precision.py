"""Whether fp32 matrix products are computed in fp32: a global setting of torch lets libraries round their factors."""

from __future__ import annotations

import torch


def lowered_to(device: torch.device) -> str | None:
    """What libraries round the factors of fp32 products on `device` to ("tf32", "bf16"); None if they do not.

    Asked of the backend, because that answers whichever of torch's two interfaces set it; once
    `torch.backends.fp32_precision` was used (transformers' `tf32=True` does), `torch.get_float32_matmul_precision()`
    raises.
    """
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    found = str(backend.fp32_precision)
    return None if found in ("none", "ieee") else found


def exact_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or fp64 where it is fp32 and products of it are lowered: those of fp64 never are."""
    return torch.float64 if dtype == torch.float32 and lowered_to(device) is not None else dtype
