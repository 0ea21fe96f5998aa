"""The formulas of cost_model.py against what torch counts: operations of whole steps, bytes between two processes.

Operations are counted by `torch.utils.flop_counter`, which does not depend on how busy the machine is; it sees no
operator of this package, so theirs (the readouts of features, encoders) are not in either side. Bytes are those of the
loopback device of a network namespace of their own (`unshare -rn`), where nobody else sends.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost_model
from benchmarks.cost_model import Shape

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"hidden": 256, "layers": 4, "vocabulary": 1000, "threads": 1, "rounds": 1, "device": "cpu", "bf16": False}
STEPS = 4
SASFT = "paper's form, 2 features x 2 layers"


def shape_of(config: Any) -> Shape:
    """The sizes of a configuration of transformers."""
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
        config.vocab_size,
        tied=config.tie_word_embeddings,
    )


def counted(run: Callable[[], object]) -> float:
    # torch counts nothing for the attention kernel of CPUs, but all products of the one that is written out.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def operations() -> dict[str, Any]:
    """One process: counted and predicted operations of one step of each job."""
    rows = [*_sft(), *_grpo(), _find()]
    table = [[job, by_torch, by_formula, 100 * (by_formula / by_torch - 1)] for job, by_torch, by_formula in rows]
    columns = ["job", "counted by torch", "by the formula", "off by, %"]
    return {"title": "Operations of a step of a tiny Qwen3, counted and predicted", "columns": columns, "rows": table}


def _sft() -> list[tuple[str, float, float]]:
    import sasft_overhead

    import qscope_posttrain as qp

    found = []
    for checkpointing in (False, True):
        settings = argparse.Namespace(**SIZES, batch=3, length=128, checkpointing=checkpointing)
        bench = sasft_overhead.Bench(settings)
        shape, tokens = shape_of(bench.model.config), settings.batch * settings.length
        plain = cost_model.training(shape, tokens, settings.length, recompute=checkpointing)
        words = ", checkpointing" if checkpointing else ""
        found.append((f"SFT{words}", counted(lambda bench=bench: bench.step("plain")), plain))
        found.append((f"SASFT{words}", counted(lambda bench=bench: bench.step(SASFT)), plain))
        if checkpointing:
            continue
        # Rows in en and fr; three quarters of a row are the response, from the position before it on.
        eligible = 2 * (settings.length * 3 // 4)
        ids = torch.arange(2, 30)
        penalty = qp.TokenPenaltyCallback(
            "zh", target_token_ids=ids, skip_target_labels=False, languages=("en", "fr", "zh")
        )
        with penalty.attach(bench.trainer):
            by_torch = counted(bench._timed)
        found.append(("SFT, token penalty", by_torch, plain + cost_model.token_penalty(shape, eligible)))
        with qp.KLAnchorCallback().attach(bench.trainer):
            by_torch = counted(bench._timed)
        eligible = 3 * (settings.length * 3 // 4)
        found.append(("SFT, KL anchor", by_torch, plain + cost_model.anchor(shape, tokens, settings.length, eligible)))
    return found


def _grpo() -> list[tuple[str, float, float]]:
    import steered_rollout

    found = []
    for name, options in (("no negatives", {"negatives_per_group": 0}), ("seeded", {"negative": "seeded"})):
        settings = argparse.Namespace(**SIZES, groups=2, group=4, prompt=32, completion=48, checkpointing=False)
        window = {"window_start": [4, 9]} if name == "seeded" else {}
        bench = steered_rollout.Bench(settings, steered_rollout.build_model(settings), {**options, **window})
        shape = shape_of(bench.trainer.model.config)
        predicted = cost_model.grpo(shape, settings.groups * settings.group, settings.prompt, settings.completion)
        found.append((f"GRPO, {name}", counted(lambda bench=bench: bench.step(0)), predicted))
    return found


def _find() -> tuple[str, float, float]:
    from benchmarks.interleaved import random_qwen3
    from qscope_posttrain.models.capture import forward_to_layer

    model = random_qwen3(argparse.Namespace(**SIZES), 128)
    shape, ids = shape_of(model.config), torch.randint(2, 1000, (8, 128))
    by_torch = counted(lambda: forward_to_layer(model, [0, 2], input_ids=ids))
    return "features find, forward to layer 2 of 4", by_torch, cost_model.forward(shape, 8 * 128, 128, 3, head=False)


def traffic() -> dict[str, Any]:
    """Two processes: bytes that each sends in a step, by DDP (through `SFTTrainer` and SASFT) and by FSDP2."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bytes.txt"
        words = f"ip link set lo up && exec {sys.executable} -m torch.distributed.run --nproc_per_node 2"
        words += f" --master_port 29999 {Path(__file__)} {file}"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
        subprocess.run(["unshare", "-rn", "sh", "-c", words], check=True, env=environment, stdout=subprocess.DEVNULL)
        measured = dict(line.split("=") for line in file.read_text().split())
    rows = []
    weights = float(measured["weights"])
    for job, key, predicted in (
        ("SASFT under DDP", "ddp", cost_model.all_reduce(weights, 2)),
        ("forward and backward under FSDP2, fp32", "fsdp2", cost_model.sharded(weights, 2, gathered=4, reduced=4)),
    ):
        sent = float(measured[key])
        rows.append([job, sent, predicted, 100 * (predicted / sent - 1)])
    columns = ["job", "bytes sent by a process in a step", "by the formula", "off by, %"]
    return {"title": "Traffic of two processes (gloo on loopback)", "columns": columns, "rows": rows}


def _sent() -> int:
    """Bytes that went through the loopback device, of both processes."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def _worker(file: Path) -> None:
    import sasft_overhead
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    settings = argparse.Namespace(**SIZES, batch=3, length=128, checkpointing=False)
    bench = sasft_overhead.Bench(settings)  # one step, in which DDP is set up
    trainer = bench.trainer
    weights = sum(parameter.numel() for parameter in bench.model.parameters())

    def per_step(step: Callable[[], object]) -> float:
        step()
        dist.barrier()
        before = _sent()
        for _ in range(STEPS):
            step()
        dist.barrier()
        return (_sent() - before) / STEPS / 2

    model = nn.parallel.DistributedDataParallel(bench.model)
    trainer.model_wrapped = model
    callback = sasft_overhead.SASFTCallback(bench.features, **sasft_overhead.PAPER, top=2)
    with callback.attach(trainer):
        batch = next(iter(trainer.get_train_dataloader()))
        ddp = per_step(lambda: trainer.training_step(model, dict(batch), num_items_in_batch=torch.tensor(200)))
    sharded = sasft_overhead.build_model(settings)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=_mesh())
    fully_shard(sharded, mesh=_mesh())
    ids = torch.randint(2, 1000, (3, 128))
    fsdp2 = per_step(lambda: sharded(input_ids=ids, labels=ids).loss.backward())
    if dist.get_rank() == 0:
        file.write_text(f"weights={weights}\nddp={ddp}\nfsdp2={fsdp2}\n")
    dist.barrier()
    dist.destroy_process_group()


def _mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2,))


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
