"""The model of small SFT cases and features of it, as fixtures: a folder's conftest imports them."""

from __future__ import annotations

import pytest
from integrations.reference import case_model, make_features


@pytest.fixture(scope="module")
def model(make_model):
    return case_model(make_model)


@pytest.fixture(scope="module")
def features(model):
    return make_features(model)
