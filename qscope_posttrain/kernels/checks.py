"""Checks of operators' arguments: shapes, dtypes and devices, never values, so that none waits for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = (torch.int32, torch.int64)
MAX_FEATURES = 2**31 - 1  # Indices are int32


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


def check_same(attribute: str, **tensors: Tensor) -> None:
    """All tensors must have the "device" or "dtype" of the first."""
    (first, leader), *others = tensors.items()
    for name, tensor in others:
        have, want = getattr(tensor, attribute), getattr(leader, attribute)
        if have != want and attribute == "device":
            raise ValueError(f"{name} is on {have}, {first} on {want}: move one with .to(device)")
        if have != want:
            raise TypeError(f"{name} is {have}, {first} is {want}: they must share one dtype")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


def check_count(name: str, value: int, at_least: int = 1) -> None:
    """A Python integer (not a bool) of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int | None = None) -> None:
    """x [tokens, d_model], W_enc [d_sae, d_model], b_enc [d_sae], on one device; the weights share a dtype."""
    check_shape("W_enc", W_enc, ("d_sae", "d_model"))
    check_shape("b_enc", b_enc, (W_enc.shape[0],))
    check_shape("x", x, ("tokens", W_enc.shape[1]))
    check_floating(x=x, W_enc=W_enc, b_enc=b_enc)
    check_same("dtype", W_enc=W_enc, b_enc=b_enc)
    check_same("device", x=x, W_enc=W_enc, b_enc=b_enc)
    if W_enc.shape[0] > MAX_FEATURES:
        raise ValueError(f"d_sae = {W_enc.shape[0]} does not fit int32 indices")
    if k is not None:
        check_count("k", k)
        if k > W_enc.shape[0]:
            raise ValueError(f"k={k} features per token were asked for, but the dictionary has only {W_enc.shape[0]}")


def check_tiles(tile_tokens: int | None, tile_features: int | None) -> None:
    for name, tile in (("tile_tokens", tile_tokens), ("tile_features", tile_features)):
        if tile is not None:
            check_count(name, tile)


def lowered_to(device: torch.device) -> str | None:
    """Format ("tf32", "bf16") to which factors of fp32 products on `device` are rounded; None if they are not."""
    # The backend knows it whichever of torch's two interfaces set it: `torch.get_float32_matmul_precision()` raises
    # once `torch.backends.fp32_precision` was used, as transformers' `tf32=True` does.
    backends: Any = torch.backends
    found = str((backends.cuda if device.type == "cuda" else backends.mkldnn).matmul.fp32_precision)
    return None if found in ("none", "ieee") else found


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if one of them is, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def exact_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or fp64 where it is fp32 and products of it are lowered: those of fp64 never are."""
    return torch.float64 if dtype == torch.float32 and lowered_to(device) is not None else dtype
