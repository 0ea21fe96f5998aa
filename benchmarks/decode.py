"""Decoding a sparse code: `sparse_decode` against the ways that others take.

    python benchmarks/decode.py [--tokens 1024] [--d-model 2048] [--d-sae 32768] [--k 50] [--dtype float32|bfloat16] ...

All ways get the same code and must give the same reconstruction, and the same gradients where they have one. Ways:
dense (a code [tokens, d_sae] times W_dec: sae-lens and dictionary-learning), torch's embedding_bag, a CSR product, and
the peers' own decoders where they are installed (`pip install sae-lens eai-sparsify dictionary-learning`). "training"
is forward and backward to values, W_dec and b_dec. Everything runs in turn in one process; peak memory is measured in
a process of its own per way.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import extra_memory_mib, in_turn, ratios, write_report
from torch import Tensor

from qscope_posttrain.kernels import sparse_decode
from qscope_posttrain.report.tables import Table

Decoder = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
OURS = "sparse_decode"


def dense(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    code = torch.zeros(len(values), len(W_dec), dtype=values.dtype, device=values.device)
    return code.scatter(1, indices.long(), values) @ W_dec + b_dec


def embedding_bag(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return F.embedding_bag(indices, W_dec, mode="sum", per_sample_weights=values) + b_dec


def csr(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    tokens, width = values.shape
    columns, order = indices.long().sort(dim=1)
    code = torch.sparse_csr_tensor(
        torch.arange(0, tokens * width + 1, width), columns.flatten(), values.gather(1, order).flatten(),
        (tokens, len(W_dec)),
    )  # fmt: skip
    return code @ W_dec + b_dec


def sparsify() -> Decoder:
    from sparsify.utils import eager_decode

    return lambda values, indices, W_dec, b_dec: eager_decode(indices.long(), values, W_dec.mT) + b_dec


def peers() -> dict[str, Decoder]:
    """The decoders of installed peers that differ from `dense`."""
    found: dict[str, Decoder] = {}
    try:
        found["sparsify"] = sparsify()
    except ImportError as error:
        print(f"sparsify is left out: {error}", file=sys.stderr)
    return found


@functools.cache
def ways() -> dict[str, Decoder]:
    return {OURS: sparse_decode, "dense": dense, "embedding_bag": embedding_bag, "csr": csr, **peers()}


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, options.dtype)
    values = torch.rand(options.tokens, options.k, generator=generator).to(dtype)
    # Distinct within a token, as a top-k gives them.
    step = options.d_sae // options.k
    offsets = torch.randint(step, (options.tokens, options.k), generator=generator)
    indices = (torch.arange(options.k) * step + offsets).int()
    W_dec = torch.randn(options.d_sae, options.d_model, generator=generator).to(dtype)
    return values, indices, W_dec, torch.randn(options.d_model, generator=generator).to(dtype)


def task(options: argparse.Namespace, name: str) -> Callable[[], object]:
    """`name` is "forward <way>" or "training <way>"."""
    mode, way = name.split(" ", 1)
    decode = ways()[way]
    values, indices, W_dec, b_dec = inputs(options)
    if mode == "forward":
        return lambda: decode(values, indices, W_dec, b_dec)
    leaves = [tensor.requires_grad_() for tensor in (values, W_dec, b_dec)]
    gradient = torch.ones(options.tokens, options.d_model, dtype=W_dec.dtype)
    return lambda: torch.autograd.grad(decode(leaves[0], indices, *leaves[1:]), leaves, gradient)


def warmed(options: argparse.Namespace, name: str) -> Callable[[], object]:
    """The same after a tiny run, so that what torch imports at a first call is not counted as memory."""
    warnings.filterwarnings("ignore", message="Sparse")
    tiny = {"tokens": 4, "d_model": 16, "d_sae": 4 * options.k}
    task(argparse.Namespace(**{**vars(options), **tiny}), name)()
    return task(options, name)


def check(options: argparse.Namespace, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(tasks that run and agree with ours, notes on those that do not)."""
    kept, notes = [], []
    for name in names:
        mode = name.split(" ", 1)[0]
        try:
            found, expected = task(options, name)(), task(options, f"{mode} {OURS}")()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            notes.append(f"{name}: {str(error).splitlines()[0][:100]}")
            continue
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        tolerance = 1e-4 if options.dtype == "float32" else 0.05
        gap = max(float((a - b).float().abs().max() / b.float().abs().max()) for a, b in pairs)
        (kept if gap < tolerance else notes).append(name if gap < tolerance else f"{name}: off by {gap:.1e}")
    return kept, notes


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    warnings.filterwarnings("ignore", message="Sparse")  # CSR is in beta, says torch
    torch.set_num_threads(options.threads)
    names, notes = check(options, [f"{mode} {way}" for mode in ("forward", "training") for way in ways()])
    seconds = in_turn({name: task(options, name) for name in names}, options.rounds)
    results: dict[str, Any] = {}
    for mode in ("forward", "training"):
        mine = {name: clocks for name, clocks in seconds.items() if name.startswith(mode)}
        clocks = {clock: ratios(mine, f"{mode} {OURS}", clock) for clock in ("processor", "wall")}
        for name in mine:
            memory = extra_memory_mib(warmed, options, name) if options.memory else float("nan")
            results[name] = {clock: found[name] for clock, found in clocks.items()} | {"extra_memory_mib": memory}
    table = Table(
        f"Decode, {options.tokens} tokens, k {options.k}, {options.d_sae} x {options.d_model}, {options.dtype}, "
        f"{options.threads} thread(s)",
        ["way", "CPU time, ms", "times ours", "lowest", "highest", "extra memory, MiB"],
        [
            [name, 1000 * r["processor"]["median_s"], r["processor"]["ratio"], r["processor"]["lowest"],
             r["processor"]["highest"], r["extra_memory_mib"]]
            for name, r in results.items()
        ],
        "; ".join(notes),
    )  # fmt: skip
    table.print()
    write_report(options, "decode", results=results, left_out=notes, table=table.to_dict())
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--d-model", type=int, default=2048)
    parser.add_argument("--d-sae", type=int, default=32768)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "decode.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
