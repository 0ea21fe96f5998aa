"""A tiny random model of the arithmetic testbed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qscope_posttrain.testbed.arithmetic.config import ArithmeticConfig
from qscope_posttrain.testbed.arithmetic.language_model import ArithmeticModel
from qscope_posttrain.testbed.arithmetic.model import build_model
from qscope_posttrain.testbed.arithmetic.tokenizer import build_tokenizer

TINY = ArithmeticConfig(hidden_size=16, intermediate_size=24, model_layers=2, heads=2, answer_tokens=40)


@pytest.fixture
def tiny() -> ArithmeticModel:
    """Two layers of width 16, weights large enough that no distribution is flat."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return ArithmeticModel(model, tokenizer, (), Path(), "")
