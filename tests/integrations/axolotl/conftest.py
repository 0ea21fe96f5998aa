"""Fixtures of the tests of axolotl, which only `make test-axolotl` installs."""

from __future__ import annotations

import os

import pytest
from axolotl_runs import Workplace, quiet
from integrations.frameworks import written_out

os.environ.update(quiet())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, make_model, tiny_tokenizer, texts):
    return Workplace(tmp_path_factory.mktemp("axolotl"), make_model, tiny_tokenizer, texts)


@pytest.fixture(scope="module")
def references(workplace):
    """`references(rows, peft, weight)`: gradients, loss and penalty of a step, written out row by row."""
    return written_out(workplace.model, workplace.features)
