"""What a job costs: operations, memory and traffic, from the sizes of a model, its data and its features.

Functions to read and to call; `python benchmarks/cost_model.py` checks them against what torch counts on tiny models,
on one process and on two, and writes benchmarks/results/cost_model.json, from which docs/scaling.md is made.

Everything is per process (GPU), in operations (a multiply-add is two) and bytes. Norms, activations, routing and
optimizer arithmetic are left out of the operations: they are bound by memory, and small beside the products.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder. `experts` 0 is a dense model; `intermediate` is that of one expert."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    experts: int = 0
    experts_of_a_token: int = 0
    tied: bool = False

    @property
    def attention(self) -> int:
        """Parameters of the four products of one layer's attention."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    def mlp(self, experts: int) -> int:
        """Parameters of one layer's products after attention, with this number of experts."""
        router = self.hidden * self.experts
        return 3 * self.hidden * self.intermediate * (experts if self.experts else 1) + router

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All of them, but for norms and biases."""
        embeddings = self.head * (1 if self.tied else 2)
        return self.layers * (self.attention + self.mlp(self.experts)) + embeddings

    @property
    def cache_of_a_token(self) -> int:
        """Numbers in the key-value cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def forward(shape: Shape, tokens: int, length: int, layers: int | None = None, head: bool = True) -> float:
    """2 per weight that a token meets, and 4 * heads * head_dim * length for its scores and their sum: all of the
    square, as torch counts; a causal kernel does half."""
    depth = shape.layers if layers is None else layers
    weights = depth * (shape.attention + shape.mlp(shape.experts_of_a_token)) + (shape.head if head else 0)
    return 2.0 * tokens * weights + 4.0 * tokens * depth * shape.heads * shape.head_dim * length


def training(shape: Shape, tokens: int, length: int, recompute: bool = False, frozen: bool = False) -> float:
    """Forward, and twice that backward: gradients of activations and of weights. `recompute` (gradient checkpointing)
    runs the layers forward once more, up to their last product, whose result backward does not need. `frozen` (LoRA)
    spares the gradients of weights; its own are left out."""
    whole = forward(shape, tokens, length)
    attention = 4.0 * tokens * shape.layers * shape.heads * shape.head_dim * length
    backward = 2 * whole - (whole - attention if frozen else 0.0)
    last_products = 2.0 * tokens * shape.layers * shape.hidden * shape.intermediate * max(1, shape.experts_of_a_token)
    again = forward(shape, tokens, length, head=False) - last_products
    return whole + backward + (again if recompute else 0.0)


def penalty(shape: Shape, tokens: int, features: int) -> float:
    """SASFT: the readouts of `features` rows (of all penalized layers together), and their gradient to the stream."""
    return 4.0 * shape.hidden * features * tokens


def token_penalty(shape: Shape, eligible: int) -> float:
    """The logits of `eligible` tokens: forward, once more in backward, and the gradients to states and head."""
    return 4 * 2.0 * shape.head * eligible


def anchor(shape: Shape, tokens: int, length: int, eligible: int) -> float:
    """The starting model forward over all tokens, and both models' logits of `eligible` tokens: its own twice."""
    return forward(shape, tokens, length, head=False) + (4 + 2) * 2.0 * shape.head * eligible


def generation(shape: Shape, rows: int, prompt: int, completion: int) -> float:
    """The prompts, and one forward for each new token, over half of the completion on average."""
    return forward(shape, rows * prompt, prompt, head=False) + forward(
        shape, rows * completion, prompt + completion // 2
    )


def generation_bytes(shape: Shape, rows: int, prompt: int, completion: int, gpus: int = 1, size: int = 2) -> float:
    """Bytes that one of `gpus` GPUs reads for `rows` rows decoded together: all weights (a batch meets all experts) and
    the cache of all rows, for each token."""
    cache = rows * (prompt + completion / 2) * shape.cache_of_a_token
    return completion * size * (shape.parameters + cache) / gpus


def grpo(shape: Shape, rows: int, prompt: int, completion: int, recompute: bool = False, frozen: bool = False) -> float:
    """One generation and one update on it: rows are generated, then trained on. A negative is a row like any other:
    steering adds `hidden` operations to a token of a layer, copying none."""
    tokens, length = rows * (prompt + completion), prompt + completion
    return generation(shape, rows, prompt, completion) + training(shape, tokens, length, recompute, frozen)


def find(shape: Shape, tokens: int, length: int, layers: Sequence[int], d_sae: int) -> float:
    """Forward to the deepest layer; per layer the encoder, and the products of the second moments."""
    per_layer = 2.0 * shape.hidden * d_sae + 2.0 * shape.hidden**2
    return forward(shape, tokens, length, max(layers) + 1, head=False) + tokens * len(layers) * per_layer


def find_memory(shape: Shape, languages: int, layers: int, d_sae: int, tokens: int) -> float:
    """Sums in fp64, the encoders in fp32, and 25 bytes for each token of the texts (measured)."""
    sums = 8.0 * layers * languages * (shape.hidden**2 + shape.hidden + 2 * d_sae)
    return sums + layers * 2 * 4.0 * shape.hidden * d_sae + 25.0 * tokens


def sae_update(hidden: int, d_sae: int, k: int, tokens: int) -> float:
    """The encoder over all latents forward; everything else on the k that fire: decoder, and three gradients."""
    return tokens * (2.0 * hidden * d_sae + 4 * 2.0 * hidden * k)


def sae_memory(hidden: int, d_sae: int) -> float:
    """Weights, gradients and both moments of Adam, in fp32, of encoder and decoder."""
    return 2 * 16.0 * hidden * d_sae


def training_memory(shape: Shape, shards: int = 1, trained: float = 1.0, size: int = 4) -> float:
    """Weights (`size` bytes each); for the share that is trained, gradients, and Adam in fp32 (with masters if the
    weights have 2 bytes): 16 bytes a weight in either case."""
    return shape.parameters * (size + trained * (16 - size)) / shards


def activations(shape: Shape, tokens: int, size: int = 2) -> float:
    """With gradient checkpointing: the input of each layer, and the logits once in `size` and twice in fp32."""
    return float(tokens) * (shape.layers * shape.hidden * size + shape.vocabulary * (size + 8))


def all_reduce(numbers: float, processes: int, size: int = 4) -> float:
    """Bytes that a process sends in a ring: DDP does so with the gradients of all trained weights, once a step."""
    return 2.0 * numbers * size * (processes - 1) / processes


def sharded(numbers: float, processes: int, gathered: int = 2, reduced: int = 4) -> float:
    """Bytes that a process sends under FSDP2 or ZeRO-3, in each micro-batch: the weights forward and backward, and the
    gradients."""
    return numbers * (2 * gathered + reduced) * (processes - 1) / processes


QWEN3_30B_A3B = Shape(48, 2048, 32, 4, 128, 768, 151_936, experts=128, experts_of_a_token=8)
"""config.json of Qwen/Qwen3-30B-A3B-Base on the Hugging Face hub"""
H100 = {"operations": 989e12, "memory": 80e9, "bandwidth": 3.35e12, "nvlink": 450e9, "network": 50e9}
"""H100 SXM: dense bf16, HBM3, NVLink in one direction (NVIDIA's data sheet); 400 Gb/s a GPU between nodes (DGX H100)"""
REACHED = {"operations": 0.3, "bandwidth": 0.5, "nvlink": 0.7, "network": 0.7}
"""Shares of these that a job is taken to reach: assumptions, not measurements"""


def seconds(amount: float, of: str) -> float:
    return amount / (H100[of] * REACHED[of])


def a3b_table() -> dict[str, Any]:
    """Qwen3-30B-A3B on 8 nodes of 8 H100."""
    shape, gpus, tokens, length = QWEN3_30B_A3B, 64, 8192, 4096
    rows: list[list[Any]] = []

    def add(job: str, compute: float, reads: float, nvlink: float, network: float, memory: float) -> None:
        parts = {
            "compute": seconds(compute, "operations"),
            "memory bandwidth": seconds(reads, "bandwidth"),
            "NVLink": seconds(nvlink, "nvlink"),
            "network": seconds(network, "network"),
        }
        bound = max(parts, key=lambda name: parts[name])
        rows.append([job, *(round(value, 2) for value in parts.values()), round(memory / 1e9), bound])

    step = training(shape, tokens, length, recompute=True) + penalty(shape, tokens, 32)
    add(
        f"SFT with SASFT, FSDP2 over 64, {tokens} tokens a GPU",
        step, 0.0, 0.0, sharded(shape.parameters, gpus),
        training_memory(shape, gpus) + activations(shape, tokens),
    )  # fmt: skip
    add(
        "SFT with SASFT, sharded within a node (HSDP)",
        step, 0.0, sharded(shape.parameters, 8), all_reduce(shape.parameters / 8, 8),
        training_memory(shape, 8) + activations(shape, tokens),
    )  # fmt: skip
    lora = 48 * 32 * 2 * (2048 + 4096 + 2048 + 512)  # rank 32 on q, k, v, o
    add(
        "SFT with SASFT, LoRA under DDP",
        training(shape, tokens, length, recompute=True, frozen=True),
        0.0, 0.0, all_reduce(lora, gpus),
        training_memory(shape, 1, lora / shape.parameters, 2) + activations(shape, tokens),
    )  # fmt: skip
    add(
        "the same, with token penalty and anchor (half of the tokens)",
        training(shape, tokens, length, recompute=True, frozen=True)
        + token_penalty(shape, tokens // 2)
        + anchor(shape, tokens, length, tokens // 2),
        0.0, 0.0, all_reduce(lora, gpus),
        training_memory(shape, 1, lora / shape.parameters, 2) + activations(shape, tokens),
    )  # fmt: skip
    group, prompt, completion = 64, 512, 4096
    own = group // 8
    add(
        "GRPO: 512 rows of 4,608 tokens generated, vLLM over 8 GPUs",
        generation(shape, group, prompt, completion) / 8,
        generation_bytes(shape, group, prompt, completion, 8), 0.0, 0.0,
        2 * shape.parameters / 8 + 2 * group * (prompt + completion) * shape.cache_of_a_token / 8,
    )  # fmt: skip
    add(
        "GRPO: the update on these rows, LoRA under DDP",
        training(shape, own * (prompt + completion), prompt + completion, recompute=True, frozen=True),
        0.0, 0.0, all_reduce(lora, gpus),
        training_memory(shape, 1, lora / shape.parameters, 2) + activations(shape, prompt + completion),
    )  # fmt: skip
    share = 10_000_000 // gpus
    add(
        "features find, 10 million tokens, 4 layers of 32,768 latents",
        find(shape, share, 512, [24, 30, 36, 42], 32_768), 0.0, 0.0, 0.0,
        2 * shape.parameters + find_memory(shape, 5, 4, 32_768, 10_000_000),
    )  # fmt: skip
    share = 1_000_000_000 // gpus
    add(
        "sae train, a billion tokens, one layer of 32,768 latents",
        forward(shape, share, 2048, 37, head=False) + sae_update(2048, 32_768, 50, share), 0.0, 0.0,
        1_000_000_000 / 65_536 * all_reduce(2 * 2048 * 32_768, gpus), 2 * shape.parameters + sae_memory(2048, 32_768),
    )  # fmt: skip
    columns = ["job", "compute, s", "reads, s", "NVLink, s", "network, s", "memory of a GPU, GB", "bound by"]
    return {"title": "Qwen3-30B-A3B on 8 x 8 H100, by the model", "columns": columns, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "cost_model.json")
    options = parser.parse_args(arguments)
    from benchmarks import cost_checks
    from benchmarks.interleaved import write_report
    from qscope_posttrain.report.tables import Table

    tables = {"operations": cost_checks.operations(), "traffic": cost_checks.traffic(), "a3b": a3b_table()}
    for table in tables.values():
        Table(table["title"], table["columns"], table["rows"]).print()
    write_report(options, "cost_model", tables=tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
