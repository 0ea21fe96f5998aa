"""Small SAEs and one pass over the shared texts, for the tests of the features room."""

from __future__ import annotations

import pytest
import torch

from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder


def build_sae(layer: int | None = None, seed: int = 0, d_model: int = 64, d_sae: int = 192, activation=None):
    """A random SAE whose decoder rows have different norms and whose biases are not zero."""
    generator = torch.Generator().manual_seed(1000 + seed + (layer or 0))
    encoder = torch.randn(d_sae, d_model, generator=generator)
    return SparseAutoencoder(
        W_enc=encoder,
        b_enc=torch.randn(d_sae, generator=generator),
        W_dec=encoder / 4 + torch.randn(d_sae, d_model, generator=generator) / 4,
        b_dec=torch.randn(d_model, generator=generator),
        activation=activation or TopK(12),
        layer=layer,
    )


@pytest.fixture(scope="session")
def make_sae():
    """Factory `make_sae(layer=None, seed=0, d_model=64, d_sae=192, activation=None)`."""
    return build_sae


@pytest.fixture(scope="session")
def saes():
    """SAEs of layers 1 and 3 of the tiny model."""
    return {layer: build_sae(layer) for layer in (1, 3)}


@pytest.fixture(scope="session")
def statistics(make_model, tiny_tokenizer, texts, saes):
    """One pass of the tiny model over the shared texts."""
    return collect_statistics(make_model(), tiny_tokenizer, texts, saes)
