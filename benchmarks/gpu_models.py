"""Whole models on a GPU: what SASFT adds to a training step, and steering to decoding.

    python benchmarks/gpu_models.py [--shapes 1.7B 8B] [--tokens 8192] [--output benchmarks/results/gpu_models.json]
    python benchmarks/gpu_models.py --device cpu --tiny           # a rehearsal, for machines without a GPU

Qwen3 models of the published shapes with random bfloat16 weights. A training step is forward and backward of one row of
`--tokens` tokens under gradient checkpointing; the penalty is timed twice: with the step, in turn with the plain step,
and alone on captured hidden states, because its share is below what two timings of a step differ by. A decoding step is
one forward of one token per row on a filled cache. Steering adds a direction to every other row at one layer.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_kernels import device_name, parse, write
from interleaved import in_turn, ratios
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from qscope_posttrain.kernels import feature_penalty
from qscope_posttrain.models.capture import LayerCapture
from qscope_posttrain.models.steering import Steering, steer
from qscope_posttrain.report.tables import Table

SIZES = {
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
}
ALONE = 20
"""Runs of the penalty alone within a round"""
DECODING_ROWS, DECODING_CACHE = 64, 512


def build(name: str, options: argparse.Namespace) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        **SIZES[name],
        vocab_size=512 if name == "tiny" else 151_936,
        num_key_value_heads=2 if name == "tiny" else 8,
        head_dim=16 if name == "tiny" else 128,
        max_position_embeddings=max(options.tokens, 2 * DECODING_CACHE),
        tie_word_embeddings=name != "8B",
    )
    with torch.device(options.device):
        kept = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(kept)


class Penalty:
    """Two features on each of the last two layers, as in the paper, or 32 on the last."""

    def __init__(self, model: nn.Module, layers: int, features: int) -> None:
        count, width = model.config.num_hidden_layers, model.config.hidden_size
        device = next(model.parameters()).device
        self.layers = list(range(count - layers, count))
        self.rows = torch.randn(features, width, device=device) / width**0.5
        self.zeros = torch.zeros(features, device=device)

    def __call__(self, hidden: dict[int, Tensor]) -> Tensor:
        total = self.zeros.sum()
        for layer in self.layers:
            states = hidden[layer]
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            found = feature_penalty(states, self.rows, self.zeros, self.zeros, mask)
            total = total + found.sums.sum() / mask.numel()
        return 1e-2 * total


def sasft(model: Qwen3ForCausalLM, options: argparse.Namespace) -> dict[str, Any]:
    """Share of the penalty in a step, and the ratio of paired steps."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(model.config.vocab_size, (1, options.tokens), device=options.device)
    penalties = {"2 features x 2 layers": Penalty(model, 2, 2), "32 features x 1 layer": Penalty(model, 1, 32)}

    def plain() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=False)

    def with_penalty(penalty: Penalty) -> Callable[[], None]:
        def run() -> None:
            with LayerCapture(model, penalty.layers) as capture:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                (loss + penalty(capture.require())).backward()
            model.zero_grad(set_to_none=False)

        return run

    def alone(penalty: Penalty) -> Callable[[], None]:
        width = model.config.hidden_size
        hidden = {
            layer: torch.randn(
                1, options.tokens, width, device=options.device, dtype=torch.bfloat16, requires_grad=True
            )
            for layer in penalty.layers
        }

        def run() -> None:
            for _ in range(ALONE):
                torch.autograd.grad(penalty(hidden), list(hidden.values()))

        return run

    ways: dict[str, Callable[[], object]] = {"plain": plain}
    for name, penalty in penalties.items():
        ways[name], ways[f"{name}, alone"] = with_penalty(penalty), alone(penalty)
    found = ratios(in_turn(ways, options.rounds), "plain", "wall")
    for name in penalties:
        found[name]["share_of_a_step"] = found.pop(f"{name}, alone")["median_s"] / ALONE / found["plain"]["median_s"]
    model.gradient_checkpointing_disable()
    model.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def decoding(model: Qwen3ForCausalLM, options: argparse.Namespace) -> dict[str, Any]:
    """One token per row on a filled cache, with and without steering every other row at the middle layer."""
    model.eval()
    rows, filled = (4, 8) if options.tiny else (DECODING_ROWS, DECODING_CACHE)
    steps = 4 if options.tiny else 16
    ids = torch.randint(model.config.vocab_size, (rows, 1), device=options.device)
    layer = model.config.num_hidden_layers // 2
    steering = Steering(
        torch.randn(model.config.hidden_size, device=options.device),
        layers=(layer,),
        positions="generated",
        rows=torch.arange(rows) % 2 == 0,
    )
    prompt = torch.randint(model.config.vocab_size, (rows, filled), device=options.device)
    cache = DynamicCache(config=model.config)
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def plain() -> None:
        for _ in range(steps):
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.crop(-steps)

    def steered() -> None:
        with steer(model, steering, prompt_length=filled):
            plain()

    found = ratios(in_turn({"plain": plain, "steered": steered}, options.rounds), "plain", "wall")
    read = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for row in found.values():
        row["median_s"] /= steps
        row["weights_read_gb_s"] = read / row["median_s"] / 1e9
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments, "gpu_models")
    results: dict[str, Any] = {}
    for name in options.shapes:
        model = build(name, options)
        results[name] = {"sasft": sasft(model, options), "decoding": decoding(model, options)}
        del model
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    table = Table(
        f"Models in bfloat16 on {device_name(options.device)}, training steps of {options.tokens} tokens",
        ["shape", "what", "way", "time, ms", "times plain", "lowest", "highest", "penalty alone, % of a step"],
        [
            [shape, what, way, 1e3 * row["median_s"], row["ratio"], row["lowest"], row["highest"],
             100 * row["share_of_a_step"] if "share_of_a_step" in row else None]
            for shape, parts in results.items() for what, ways in parts.items() for way, row in ways.items()
        ],
        "Goals: SASFT at most 0.1 % of a step, steering at most 1 % of decoding.",
    )  # fmt: skip
    table.print()
    write(options, "gpu_models", results, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
