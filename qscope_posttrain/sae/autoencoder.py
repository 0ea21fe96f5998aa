"""The sparse autoencoder (SAE) in its one in-memory form, whatever file it came from.

    pre   = W_enc x + b_enc                          [d_sae]
    f     = activation(pre)                          sparse, [d_sae]
    x_hat = W_dec^T f + b_dec                        [d_model]

x is the raw output of a decoder layer (the residual stream after block n). Input scaling, subtraction of b_dec and
decoder norms, where a format has them, are folded into these four tensors when a file is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.kernels import CertifiedWeights, certified_weights, feature_preactivations, sparse_decode
from qscope_posttrain.provenance import file_sha256
from qscope_posttrain.sae import loading
from qscope_posttrain.sae.activations import Activation, TopK
from qscope_posttrain.sae.checks import check_finite, check_tensor
from qscope_posttrain.sae.formats import WRITERS
from qscope_posttrain.sae.loading import FeatureRows
from qscope_posttrain.sae.source import SAESource

__all__ = ["FeatureRows", "SAESource", "SparseAutoencoder", "load_sae"]

_TENSOR_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True, eq=False, repr=False)
class SparseAutoencoder:
    """An SAE in units of the raw residual stream. Immutable; `to` and `dataclasses.replace` make new ones.

    The constructor checks shapes, dtypes, devices and that all values are finite: ValueError or TypeError otherwise.

    Example:
        >>> path = saes[2].save(folder / "layer2.sae.safetensors")
        >>> sae = qp.SparseAutoencoder.load(path)
        >>> values, indices = sae.encode(torch.randn(5, sae.d_model))
        >>> sae.decode(values, indices).shape
        torch.Size([5, 64])
    """

    W_enc: Tensor  # Encoder, [d_sae, d_model]: one row per feature
    b_enc: Tensor  # Encoder bias, [d_sae]
    W_dec: Tensor  # Decoder, [d_sae, d_model]: a feature's direction is a row; norms are whatever was trained
    b_dec: Tensor  # Decoder bias, [d_model]: added in `decode`, never subtracted in `encode`
    activation: Activation  # The nonlinearity: which pre-activations survive
    layer: int | None = None  # Decoder layer whose output it reads, counted from 0; None if unknown
    source: SAESource = field(default_factory=lambda: SAESource("memory"))  # Its origin

    def __post_init__(self) -> None:
        check_tensor("b_enc", self.b_enc, (None,))
        check_tensor("b_dec", self.b_dec, (None,))
        check_tensor("W_enc", self.W_enc, (self.d_sae, self.d_model))
        check_tensor("W_dec", self.W_dec, (self.d_sae, self.d_model))
        kinds = {(getattr(self, name).dtype, getattr(self, name).device) for name in _TENSOR_NAMES}
        if len(kinds) > 1:
            raise UserValueError(f"the tensors of an SAE must share one dtype and device, got {kinds}")
        for name in _TENSOR_NAMES:
            check_finite(name, getattr(self, name))
        if not isinstance(self.activation, Activation):
            raise UserTypeError(f"activation must be TopK, ReLU, JumpReLU or BatchTopK, got {self.activation!r}")
        self.activation.check(self.d_sae)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.b_enc.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.b_dec.shape[0]

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    def __repr__(self) -> str:
        layer = "unknown layer" if self.layer is None else f"layer {self.layer}"
        dtype = str(self.dtype).removeprefix("torch.")
        kind = self.activation if isinstance(self.activation, TopK) else type(self.activation).__name__
        where = f"{layer}, {dtype} on {self.device}, {self.source}"
        return f"SparseAutoencoder({self.d_sae} x {self.d_model}, {kind}, {where})"

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SparseAutoencoder:
        """A copy on another device or in another dtype (`self` where nothing changes)."""
        device = self.device if device is None else torch.device(device)
        dtype = self.dtype if dtype is None else dtype
        if (self.device, self.dtype) == (device, dtype):
            return self
        moved: dict[str, Any] = {name: getattr(self, name).to(device, dtype) for name in _TENSOR_NAMES}
        return replace(self, **moved, activation=self.activation.to(device, dtype))

    def pre_activations(self, x: Tensor, feature_ids: Sequence[int] | Tensor | None = None) -> Tensor:
        """W_enc x + b_enc, before any nonlinearity: [tokens, d_model] -> [tokens, F], in float32 (float64 for float64).

        With `feature_ids` only those rows are computed, in that order; without, all d_sae: for many tokens a large
        matrix, which `encode` never holds. Differentiable.
        """
        x = self._checked_input(x)
        W_enc, b_enc = self.W_enc, self.b_enc
        if feature_ids is not None:
            ids = loading.feature_id_tensor(feature_ids, self.d_sae).to(self.device)
            W_enc, b_enc = W_enc[ids], b_enc[ids]
        return feature_preactivations(x, W_enc, b_enc)

    def encode(self, x: Tensor, tile_tokens: int | None = None, *, precision: str = "model") -> tuple[Tensor, Tensor]:
        """Sparse code of x [tokens, d_model]: (values [tokens, width], indices int32 [tokens, width]).

        width is k for TopK, and for the other activations the largest number of firing latents of any token. A latent
        fires where its value is above 0; entries of value 0 only fill the rectangle. Values are sorted, the largest
        first, equal ones by the lowest index; float32, or float64 for a float64 SAE. Differentiable.

        A [tokens, d_sae] matrix never exists: tokens are encoded in tiles, whose size changes results by rounding only.
        `precision`: "model", "fp32" or (TopK only) "certified", as for `kernels.topk_encode`.
        """
        x = self._checked_input(x)
        weights = self._certified_weights if precision == "certified" and isinstance(self.activation, TopK) else None
        return self.activation.encode(
            x, self.W_enc, self.b_enc, precision=precision, weights=weights, tile_tokens=tile_tokens
        )

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Reconstruction [tokens, d_model] of a sparse code: sum_j values_j W_dec[indices_j] + b_dec. `values` and
        `indices` are [tokens, width] as from `encode`. Differentiable."""
        return sparse_decode(values, indices, self.W_dec, self.b_dec)

    def select(self, feature_ids: Sequence[int] | Tensor) -> FeatureRows:
        """Copies of the rows of some features, in the given order."""
        ids = loading.feature_id_tensor(feature_ids, self.d_sae)
        at = ids.to(self.device)
        return FeatureRows(ids, self.W_enc[at], self.b_enc[at], self.W_dec[at], self.source, self.layer)

    def save(self, path: str | Path, format: str = "native") -> Path:
        """Write the SAE, whole or not at all, and return the path; `load` reads the same function back, bit for bit.

        Args:
            path: "native": a file, its name ending in .safetensors; `layer{n}.sae.safetensors` to have it found by
                folder and layer. "sae_lens": a folder, for cfg.json and sae_weights.safetensors. "qwen_scope":
                a folder named SAE-Res-<model>-W<N>K-L0_<k>, or `layer{n}.sae.pt` in it.
            format: One of these; ValueError where it cannot express this SAE (JumpReLU as Qwen-Scope).
        """
        if format not in WRITERS:
            raise UserValueError(f"unknown format {format!r}; an SAE can be saved as {', '.join(WRITERS)}")
        return WRITERS[format](Path(path).expanduser(), self)

    @classmethod
    def load(
        cls,
        source: str | Path,
        layer: int | None = None,
        k: int | None = None,
        *,
        revision: str | None = None,
        d_model: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        checksum: bool = True,
        input_scale: float | None = None,
    ) -> SparseAutoencoder:
        """Read a whole SAE.

        Args:
            source: A file or folder in any format of `formats`, a name of the catalog, or a hub repository id
                (followed by a folder in it, where it holds several), of which only that layer's files are downloaded.
            layer: Layer number from 0; may be left out where the file states it or there is only one candidate.
            k: Survivors of TopK. Qwen-Scope files do not hold it: it is taken from a release name
                (SAE-Res-<model>-W{N}K-L0_{k}) in the repository id or a parent folder, or has to be given.
            revision: Branch, tag or commit of a hub repository.
            d_model: Width of the model's residual stream; an SAE of another width is an error.
            dtype: float32 by default, whatever the file holds.
            device: CPU by default.
            checksum: Record the file's sha256 in `source` (about a second per gigabyte).
            input_scale: For SAELens files with normalize_activations "expected_average_only_in": the factor on the
                activations, where it is not stored beside the weights.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: damaged, hostile or mismatched: the message names file, fault, and what was expected.
        """
        stored = loading.open_source(source, layer, revision, d_model, input_scale)
        activation = loading.activation_of(stored, k)
        origin = stored.source(file_sha256(stored.path) if checksum else None)
        place, kind = torch.device(device or "cpu"), dtype or torch.float32
        try:
            tensors = loading.load_tensors(stored, kind, place)
            return cls(**tensors, activation=activation.to(place, kind), layer=stored.layer, source=origin)
        except ValueError as error:
            raise UserValueError(f"{stored.path}: {error}") from error

    @classmethod
    def rows(
        cls,
        source: str | Path,
        feature_ids: Sequence[int] | Tensor,
        layer: int | None = None,
        *,
        revision: str | None = None,
        d_model: int | None = None,
        input_scale: float | None = None,
    ) -> FeatureRows:
        """Read the rows of some features only: see `loading.gather`. Arguments as for `load`, without k. `source` is
        without the sha256, which would read the whole file."""
        return loading.read_rows(loading.open_source(source, layer, revision, d_model, input_scale), feature_ids)

    @cached_property
    def _certified_weights(self) -> CertifiedWeights:
        return certified_weights(self.W_enc.detach(), self.b_enc.detach())

    def _checked_input(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.d_model:
            raise UserValueError(f"x must be [tokens, {self.d_model}] for this SAE, got {list(x.shape)}")
        if not x.is_floating_point():
            raise UserTypeError(f"x must be floating point, got {x.dtype}")
        if x.device != self.device:
            raise UserValueError(f"x is on {x.device}, the SAE on {self.device}: move one with .to(device=...)")
        return x.to(torch.promote_types(self.dtype, torch.float32)) if x.dtype == torch.float64 else x


def load_sae(source: SparseAutoencoder | str | Path, layer: int, k: int | None, model: nn.Module) -> SparseAutoencoder:
    """The SAE itself, or the one at `source`, on the model's device; ValueError when it is of another width."""
    if isinstance(source, SparseAutoencoder):
        return source
    from qscope_posttrain.models.batches import input_device
    from qscope_posttrain.models.layers import text_config

    width = int(text_config(model).hidden_size)
    return SparseAutoencoder.load(source, layer=layer, k=k, d_model=width, device=input_device(model))
