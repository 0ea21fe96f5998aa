"""Importing the package is quick, quiet and loads no trainer."""

from __future__ import annotations

import subprocess
import sys

import pytest

import qscope_posttrain as qp


def test_import_loads_no_heavy_package():
    probe = (
        "import sys, qscope_posttrain\n"
        "heavy = {'torch', 'trl', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in qp.__all__ if name != "__version__"])
def test_every_public_name_resolves(name):
    assert getattr(qp, name).__doc__


def test_unknown_name_lists_what_exists():
    with pytest.raises(AttributeError, match="SASFTCallback"):
        qp.no_such_name  # noqa: B018
