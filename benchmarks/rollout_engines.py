"""Tokens per second of vLLM over transformers, and what steered rows cost in vLLM.

    python benchmarks/rollout_engines.py [--rounds 10] [--eager] [--layers 6] [--rows 16] ...

One random Qwen3 is held by transformers and by vLLM with the plug-in, both in this process and in one dtype. Every row
of a batch generates exactly `--completion` tokens. In each round every way generates once, in an order that rotates:

- engines: `generate` of transformers against vLLM;
- steered rows: a plain batch of vLLM against one in which one row in eight is steered (window of 30 tokens, one layer),
  directions sent and counts compared as the trainer does for every batch; and the plain batch again, which is noise.

Ratios are of a round, in wall time and in processor time: on a busy machine only the second can be trusted. On a GPU
the same script runs in bfloat16 and with CUDA graphs (unless `--eager`).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleaved import in_turn, random_qwen3, ratios, write_report
from transformers import GenerationConfig, Qwen3ForCausalLM

from qscope_posttrain.report.tables import Table

TRANSFORMERS, PLAIN, AGAIN, MIXED = "transformers", "vLLM", "vLLM, again", "vLLM, one steered row in eight"
WINDOW = {"start": 4, "length": 30}
DEFAULT_RESULTS = Path(__file__).parent / "results" / "rollout_engines.json"
Way = Callable[[], object]


def build_model(settings: argparse.Namespace, folder: str) -> Qwen3ForCausalLM:
    """A random model, also as files for vLLM."""
    length, dtype = settings.prompt + settings.completion, settings.dtype
    model = random_qwen3(settings, length, eos_token_id=None, dtype=dtype).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return model.to(settings.device).eval()


def with_transformers(settings: argparse.Namespace, model: Qwen3ForCausalLM, prompts: list[list[int]]) -> Way:
    asked = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=settings.completion, eos_token_id=None, pad_token_id=0
    )
    ids = torch.tensor(prompts, device=settings.device)

    def way() -> None:
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=asked)
        if made.shape[1] != settings.prompt + settings.completion:
            raise RuntimeError("transformers made rows of another length: batches are unequal")

    return way


def with_vllm(settings: argparse.Namespace, folder: str, prompts: list[list[int]]) -> dict[str, Way]:
    from vllm import LLM, SamplingParams

    from qscope_posttrain.rl.rollouts.vllm_plugin import KEY, register

    register()  # vLLM finds it by itself where the package is installed; a second call does nothing
    engine = LLM(
        model=folder,
        dtype=settings.dtype,
        enforce_eager=settings.eager,
        max_model_len=settings.prompt + settings.completion,
        max_num_seqs=settings.rows,
        gpu_memory_utilization=settings.memory,
        enable_prefix_caching=False,  # the same prompts come again in every round
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    sampling = {"max_tokens": settings.completion, "ignore_eos": True, "detokenize": False, "logprobs": 0}
    plain = [SamplingParams(**sampling) for _ in prompts]
    direction = torch.randn(settings.hidden, generator=torch.Generator().manual_seed(1))
    edit = {"direction": "d", "layer": settings.layers // 2, "strength": 0.1, "mode": "add", **WINDOW}
    steered = range(7, settings.rows, 8)
    mixed = list(plain)
    for row in steered:
        mixed[row] = SamplingParams(**sampling, extra_args={KEY: {"row": str(row), "edits": [edit]}})
    read = {str(row): settings.completion - 1 for row in steered}
    tokens = min(WINDOW["length"], settings.completion - 1 - WINDOW["start"])

    def generate(params: list[Any]) -> None:
        found = engine.generate(asked, params, use_tqdm=False)
        if any(len(output.outputs[0].token_ids) != settings.completion for output in found):
            raise RuntimeError("vLLM made rows of another length: batches are unequal")

    def steer() -> None:
        engine.collective_rpc("qscope_put_directions", args=({"d": direction.tolist()},))
        generate(mixed)
        (counted,) = engine.collective_rpc("qscope_take_counts", args=(read,))
        if counted != dict.fromkeys(read, tokens):
            raise RuntimeError(f"{tokens} tokens of each steered row were to be steered; the plug-in counted {counted}")

    return {PLAIN: lambda: generate(plain), AGAIN: lambda: generate(plain), MIXED: steer}


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(2, settings.vocabulary, (settings.rows, settings.prompt), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(settings, folder)
        ways = with_vllm(settings, folder, prompts)
    engines = {PLAIN: ways[PLAIN], TRANSFORMERS: with_transformers(settings, model, prompts)}
    found = {}
    for name, group, rounds in (("engines", engines, settings.engine_rounds), ("steered", ways, settings.rounds)):
        seconds = in_turn(group, rounds)
        found[name] = {clock: ratios(seconds, PLAIN, clock) for clock in ("wall", "processor")}
    return found


def table_of(results: dict[str, Any], settings: argparse.Namespace) -> Table:
    tokens = settings.rows * settings.completion
    rows = []
    for group, found in results.items():
        for name, wall in found["wall"].items():
            if group == "engines" or name != PLAIN:
                spreads = [_spread(found[clock][name]) for clock in ("wall", "processor")]
                rows.append([name, round(tokens / wall["median_s"]), *spreads])
    how = "eager" if settings.eager else "compiled"
    return Table(
        f"Rollouts by engine: Qwen3 of {settings.layers} layers, hidden {settings.hidden}, {settings.rows} rows of "
        f"{settings.prompt} + {settings.completion} tokens, {settings.device}, {settings.dtype}, vLLM {how}",
        ["way", "tokens per second", "time over vLLM's", "by processor time"],
        rows,
        f"Median (lowest .. highest) of {settings.engine_rounds} rounds with transformers and {settings.rounds} with "
        "steered rows. The plain batch again is the noise.",
    )


def _spread(values: dict[str, float]) -> str:
    return f"{values['ratio']:.3f} ({values['lowest']:.3f} .. {values['highest']:.3f})"


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8_000)
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch, one in eight of them steered")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--completion", type=int, default=64, help="tokens that every row generates")
    parser.add_argument("--rounds", type=int, default=20, help="of plain and steered batches")
    parser.add_argument("--engine-rounds", type=int, default=5, help="of both engines")
    parser.add_argument("--eager", action="store_true", help="vLLM without its compiler and without CUDA graphs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=float, default=0.3, help="share of the memory that vLLM may take")
    parser.add_argument("--output", type=Path, default=DEFAULT_RESULTS)
    settings = parser.parse_args()
    settings.device, settings.dtype = ("cuda", "bfloat16") if cuda else ("cpu", "float32")
    # Set before vLLM is imported; the plug-in was written for the V1 model runner.
    os.environ |= {"QSCOPE_VLLM": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    results = measure(settings)
    table = table_of(results, settings)
    table.print()
    write_report(settings, "rollout_engines", results=results, table=table.to_dict())


if __name__ == "__main__":
    main()
