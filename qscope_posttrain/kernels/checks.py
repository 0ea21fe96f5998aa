"""Checks of the arguments of operators. They look at shapes, dtypes and devices
only, never at values, so none of them waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = (torch.int32, torch.int64)
MAX_FEATURES = 2**31 - 1
"""Indices are int32."""


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
    """`shape` names each dimension: an int is required, a string ("tokens") stands for any size."""
    fits = tensor.ndim == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must be [{expected}], got {list(tensor.shape)}")


def check_floating(**tensors: Tensor) -> None:
    """Each tensor must be float16, bfloat16, float32 or float64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_indices(name: str, tensor: Tensor) -> None:
    """Indices must be int32 or int64. Their range is not looked at."""
    if tensor.dtype not in INDICES:
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")


def check_same_device(**tensors: Tensor) -> None:
    """All tensors must lie on the device of the first."""
    (first, leader), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != leader.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {leader.device}: move one with .to(device)")


def check_same_dtype(**tensors: Tensor) -> None:
    """All tensors must have the dtype of the first."""
    (first, leader), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != leader.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, {first} is {leader.dtype}: they must share one dtype")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


def check_count(name: str, value: int, at_least: int = 1) -> None:
    """A Python integer (not a bool) of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> None:
    """x [tokens, d_model], W_enc [d_sae, d_model], b_enc [d_sae], on one device; the weights share a dtype."""
    check_shape("W_enc", W_enc, ("d_sae", "d_model"))
    check_shape("b_enc", b_enc, (W_enc.shape[0],))
    check_shape("x", x, ("tokens", W_enc.shape[1]))
    check_floating(x=x, W_enc=W_enc, b_enc=b_enc)
    check_same_dtype(W_enc=W_enc, b_enc=b_enc)
    check_same_device(x=x, W_enc=W_enc, b_enc=b_enc)
    if W_enc.shape[0] > MAX_FEATURES:
        raise ValueError(f"d_sae = {W_enc.shape[0]} does not fit int32 indices")


def check_k(k: int, d_sae: int) -> None:
    check_count("k", k)
    if k > d_sae:
        raise ValueError(f"k={k} features of each token were asked for, but the dictionary has only {d_sae}")


def check_tiles(tile_tokens: int | None, tile_features: int | None) -> None:
    for name, tile in (("tile_tokens", tile_tokens), ("tile_features", tile_features)):
        if tile is not None:
            check_count(name, tile)


def lowered_to(device: torch.device) -> str | None:
    """Format ("tf32", "bf16") to which libraries round the factors of fp32 products on `device`; None if they do not.

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
