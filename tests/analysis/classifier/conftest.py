from __future__ import annotations

import pytest
import torch

from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder


def build_sae(layer: int, d_model: int = 64, d_sae: int = 192) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(layer)
    encoder = torch.randn(d_sae, d_model, generator=generator)
    return SparseAutoencoder(encoder, torch.zeros(d_sae), encoder / 8, torch.zeros(d_model), TopK(6), layer)


@pytest.fixture(scope="session")
def make_sae():
    """Factory `make_sae(layer)` of random SAEs for the tiny model."""
    return build_sae
