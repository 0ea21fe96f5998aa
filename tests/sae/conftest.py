"""Tiny dictionaries, in memory and as Qwen-Scope files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_sae import D_MODEL, D_SAE, RELEASE
from torch import Tensor

from qscope_posttrain.sae.activations import Activation, TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder


@pytest.fixture
def qwen_tensors() -> dict[str, Tensor]:
    """The four tensors of a Qwen-Scope layer, as they lie in the file."""
    generator = torch.Generator().manual_seed(7)
    return {
        "W_enc": torch.randn(D_SAE, D_MODEL, generator=generator),
        "W_dec": torch.randn(D_MODEL, D_SAE, generator=generator),
        "b_enc": torch.randn(D_SAE, generator=generator),
        "b_dec": torch.randn(D_MODEL, generator=generator),
    }


@pytest.fixture
def release_folder(tmp_path: Path, qwen_tensors: dict[str, Tensor]) -> Path:
    """A folder named like a release, with layers 0, 1, 2 and 5; all alike but for b_dec, which is full of n."""
    folder = tmp_path / RELEASE
    folder.mkdir()
    for layer in (0, 1, 2, 5):
        torch.save(
            qwen_tensors | {"b_dec": torch.full_like(qwen_tensors["b_dec"], layer)}, folder / f"layer{layer}.sae.pt"
        )
    return folder


@pytest.fixture
def make_sae() -> Callable[..., SparseAutoencoder]:
    """make_sae(d_sae=..., d_model=..., activation=...): a random dictionary in memory."""

    def make(d_sae: int = 64, d_model: int = 16, activation: Activation | None = None) -> SparseAutoencoder:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        return SparseAutoencoder(
            draw(d_sae, d_model), draw(d_sae), draw(d_sae, d_model), draw(d_model), activation or TopK(4), layer=3
        )

    return make
