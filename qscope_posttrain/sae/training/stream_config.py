"""Settings of the stream of activations that SAEs are trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.sae.training.text_stream import PACKINGS

BUFFER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StreamConfig:
    """How text becomes shuffled activations."""

    context_length: int = 512
    """Tokens of a sequence."""
    block_tokens: int = 65536
    """Tokens of all processes whose activations are in memory at a time, and among which batches are drawn: the reach
    of the shuffling. A checkpoint may have to read so many again."""
    forward_tokens: int = 8192
    """Tokens of one forward pass of a process."""
    packing: Literal["isolated", "joined", "separate"] = "isolated"
    """Documents in a sequence. isolated: several, and none attends to another (checked on the model before the start);
    joined: several, and each attends to those before it; separate: one, the rest is padding, for models whose layers
    carry a state along the sequence."""
    buffer_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the activations in memory."""
    buffer_device: Literal["cpu", "model"] = "cpu"
    """Where they lie: in main memory, or where the layer is."""
    max_buffer_gib: float = 8.0
    """Memory of a process that the activations may take; more is refused before the start."""
    outlier_factor: float = 10.0
    """A token is left out where its residual vector is longer than this many times the median."""
    calibration_tokens: int = 16384
    """Tokens at the start of the stream behind the median norm and the units of training."""

    def __post_init__(self) -> None:
        for name in ("context_length", "block_tokens", "forward_tokens", "calibration_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 2:
                raise UserValueError(f"{name} must be an integer from 2, got {value!r}")
        if self.packing not in PACKINGS:
            raise UserValueError(f"packing must be one of {', '.join(PACKINGS)}, got {self.packing!r}")
        if self.buffer_dtype not in BUFFER_DTYPES:
            raise UserValueError(f"buffer_dtype must be one of {', '.join(BUFFER_DTYPES)}, got {self.buffer_dtype!r}")
        if self.buffer_device not in ("cpu", "model"):
            raise UserValueError(f"buffer_device must be cpu or model, got {self.buffer_device!r}")
        for name in ("max_buffer_gib", "outlier_factor"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.block_tokens < self.context_length:
            raise UserValueError(
                f"block_tokens={self.block_tokens} is less than a sequence of context_length={self.context_length}"
            )

    @property
    def block_sequences(self) -> int:
        """Sequences in memory at a time, of all processes."""
        return self.block_tokens // self.context_length

    def buffer_bytes(self, layers: int, d_model: int, processes: int) -> int:
        """Memory that the activations take on a process, with their norms."""
        own = math.ceil(self.block_sequences / processes) * self.context_length
        return own * layers * (d_model * BUFFER_DTYPES[self.buffer_dtype].itemsize + 4)
