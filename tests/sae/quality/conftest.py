"""SAEs of the shape of the tiny model."""

from __future__ import annotations

import pytest
from features.conftest import build_sae


@pytest.fixture(scope="session")
def make_sae():
    """Factory `make_sae(layer=None, seed=0, d_model=64, d_sae=192, activation=None)`."""
    return build_sae
