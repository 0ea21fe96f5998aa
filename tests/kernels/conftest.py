"""Where the Triton kernels run: on the GPU if there is one, else in Triton's interpreter, on small shapes.

The interpreter has to be asked for before a kernel is imported, hence here.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def triton_device() -> torch.device:
    pytest.importorskip("triton", reason="Triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
