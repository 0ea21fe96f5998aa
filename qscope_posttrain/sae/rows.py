"""The few rows of a dictionary that training and steering need, read without the dictionary."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qscope_posttrain.sae.checks import check_finite, check_tensor
from qscope_posttrain.sae.formats.stored import StoredSAE
from qscope_posttrain.sae.source import LocatedFile, SAESource


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """Encoder and decoder rows of F features, in raw residual-stream units. Checked on construction."""

    feature_ids: Tensor
    """int64 [F], on the CPU."""
    encoder: Tensor
    """[F, d_model]"""
    encoder_bias: Tensor
    """[F]"""
    decoder: Tensor
    """Directions, [F, d_model]."""
    source: SAESource
    layer: int | None = None

    def __post_init__(self) -> None:
        count = self.feature_ids.shape[0]
        check_tensor("encoder", self.encoder, (count, None))
        check_tensor("encoder_bias", self.encoder_bias, (count,))
        check_tensor("decoder", self.decoder, (count, self.encoder.shape[1]))
        for name in ("encoder", "encoder_bias", "decoder"):
            check_finite(f"{name} of features {self.feature_ids.tolist()}", getattr(self, name))

    def __len__(self) -> int:
        return self.feature_ids.shape[0]


def feature_id_tensor(feature_ids: Sequence[int] | Tensor, d_sae: int) -> Tensor:
    """`feature_ids` as int64 [F] on the CPU. TypeError if they are not integers, ValueError if out of range or none."""
    ids = torch.as_tensor(feature_ids)
    if ids.ndim != 1 or ids.numel() == 0:
        raise ValueError(f"feature_ids must be a non-empty list of integers, got {feature_ids!r}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"feature_ids must be integers, got {ids.dtype}")
    ids = ids.to(device="cpu", dtype=torch.int64)
    if int(ids.min()) < 0 or int(ids.max()) >= d_sae:
        bad = [number for number in ids.tolist() if not 0 <= number < d_sae]
        raise ValueError(f"feature ids {bad} are out of range: the dictionary has features 0..{d_sae - 1}")
    return ids


def read_rows(located: LocatedFile, stored: StoredSAE, feature_ids: Sequence[int] | Tensor) -> FeatureRows:
    """Copy some features' rows out of a memory-mapped file, as float32 [F, d_model].

    Only the pages that hold them are read. A canonical row is contiguous: d_model * 4 bytes. The direction of a
    Qwen-Scope feature is a *column*, one number in each of d_model rows of the file, so that it costs d_model pages of
    4 KiB wherever a file row is longer than a page: 8 MiB of the 268 MiB matrix for d_model 2048, the same pages for
    features closer than 1024 ids. Random access is announced to the kernel first; its read-ahead around each of these
    pages would otherwise fetch the whole matrix from a cold disk.
    """
    ids = feature_id_tensor(feature_ids, stored.b_enc.shape[0])
    for view in (stored.W_enc, stored.W_dec):
        _announce_random_access(view)
    try:
        return FeatureRows(
            feature_ids=ids,
            encoder=stored.W_enc.index_select(0, ids).float(),
            encoder_bias=stored.b_enc.index_select(0, ids).float(),
            decoder=stored.W_dec.index_select(0, ids).float(),
            source=located.describe(stored.format, None, stored.origin),
            layer=located.layer if stored.layer is None else stored.layer,
        )
    except ValueError as error:
        raise ValueError(f"{stored.path}: {error}") from error


def _announce_random_access(view: Tensor) -> None:
    """madvise(MADV_RANDOM) on the pages of a memory-mapped tensor: advice only, so a refusal changes nothing but speed.

    Python's own mmap objects have this call, but the mapping here belongs to torch.
    """
    if not sys.platform.startswith("linux"):
        return
    storage = view.untyped_storage()
    first_page = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = storage.data_ptr() + storage.nbytes() - first_page
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(first_page), ctypes.c_size_t(length), mmap.MADV_RANDOM)
