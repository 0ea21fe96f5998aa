"""Where the Triton kernels run: on the GPU if there is one, else in Triton's interpreter, on small shapes."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def triton_device() -> torch.device:
    pytest.importorskip("triton", reason="Triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
