"""Launch files of configs/ on the CPUs of one machine, many of them from one process that has imported everything.

`launch` calls accelerate's own launcher, which reads the file, sets the environment and starts torch's elastic agents.
One thing is replaced: the processes are forked instead of started anew, for imports are most of what a start costs.
Several machines are several agents that meet at a port of this one.

accelerate shards nothing on a CPU: under a launch file for FSDP2 it trains with DDP. `shard_on_cpu` makes it shard, and
`Launched.ranks` says of each process what its parameters were.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.free_port import free_port

torch.set_num_threads(1)  # Threads of OpenMP do not survive a fork: a process that finds them gone waits for ever
CONFIGS = Path(__file__).parent.parent / "configs"
ON_A_CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
"""Keys of a recipe that trains on a CPU in fp32, logs every step and saves nothing"""


@dataclass(frozen=True)
class Launched:
    """What a launch left behind."""

    status: list[int]
    """Exit status of each machine's launcher"""
    ranks: list[dict[str, Any]]
    """Of each process that came to its end, in order: exit status, and the kind of its training and parameters"""
    endpoints: list[str]
    """Where each machine looked for the others"""
    output: str
    """What all of them printed"""


@dataclass(frozen=True)
class _Job:
    """What each process of a launch needs to know."""

    arguments: Sequence[str]
    folder: Path
    shard: bool
    before: Callable[[], None] | None


def launch(
    config: str | None, arguments: Sequence[str], flags: Sequence[str] = (), *, machines: int = 1, shard: bool = True,
    before: Callable[[], None] | None = None,
) -> Launched:  # fmt: skip
    """Run `accelerate launch --config_file configs/CONFIG FLAGS -m qscope_posttrain ARGUMENTS`, once for each machine.

    Args:
        config: None runs the command in one process, without a launcher.
        shard: whether FSDP shards, which accelerate leaves out on a CPU.
        before: called in each process before the command.
    """
    folder, port = Path(tempfile.mkdtemp()), free_port()
    job = _Job(arguments, folder, shard, before)
    forking = multiprocessing.get_context("fork")
    agents = []
    for machine in range(machines):
        words = None
        if config is not None:
            words = ["--config_file", str(CONFIGS / config), "--main_process_port", str(port)]
            if machines > 1:
                words += ["--num_machines", str(machines), "--machine_rank", str(machine)]
                words += ["--main_process_ip", "127.0.0.1"]
            words += [*flags, "-m", "qscope_posttrain", *arguments]
        agents.append(forking.Process(target=_agent, args=(words, job, machine)))
    for agent in agents:
        agent.start()
    for agent in agents:
        agent.join()
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    endpoints = [path.read_text() for path in sorted(folder.glob("endpoint-*"))]
    output = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("output-*")))
    return Launched([agent.exitcode or 0 for agent in agents], ranks, endpoints, output)


def _agent(words: Sequence[str] | None, job: _Job, machine: int) -> None:
    """accelerate's launcher on one machine; it starts `_rank` in place of the program. Without words, `_rank` alone."""
    with (job.folder / f"output-{machine}").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    status = 0
    try:
        if words is None:
            _rank(job)
        else:
            _launch_command(words, job, machine)
    except BaseException:  # whatever it was, it becomes the exit status of the launcher
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def _launch_command(words: Sequence[str], job: _Job, machine: int) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import run as torchrun

    inner = torchrun.config_from_args

    def forking(args: Any) -> tuple[Any, Callable[..., None], list[Any]]:
        config, *_ = inner(args)
        config.start_method = "fork"
        (job.folder / f"endpoint-{machine}").write_text(config.rdzv_endpoint)
        return config, _rank, [job]

    torchrun.config_from_args = forking
    launch_command(launch_command_parser().parse_args(words))


def _rank(job: _Job) -> None:
    """One process of a launch: run the command, and write down what its training was."""
    import transformers.trainer

    from qscope_posttrain.cli.main import main

    if job.shard and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        # Its reduction over shared memory is compiled at the first start, which takes minutes; gloo's does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if job.before is not None:
        job.before()
    seen: dict[str, Any] = {}
    transformers.trainer.DEFAULT_CALLBACKS.append(_observer(seen))
    seen["status"] = main(job.arguments)
    (job.folder / f"rank-{int(os.environ.get('RANK', 0)):02}.json").write_text(json.dumps(seen))
    sys.stdout.flush()
    if seen["status"]:
        raise SystemExit(seen["status"])


def _observer(seen: dict[str, Any]) -> type:
    """A callback that notes what is trained, after the first step, when everything is wrapped."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from torch.distributed.tensor import DTensor
    from transformers import TrainerCallback

    class Observer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step > 1 and seen:
                return
            parameters = list(model.parameters())
            seen["kind"] = PartialState().distributed_type.value
            seen["processes"] = PartialState().num_processes
            seen["precision"] = AcceleratorState().mixed_precision
            seen["parameters"] = len(parameters)
            # FSDP2's shards are DTensors; a parameter of ZeRO-3 says where its shard is
            seen["sharded"] = sum(isinstance(one, DTensor) or hasattr(one, "ds_tensor") for one in parameters)

    return Observer


def shard_on_cpu() -> None:
    """Make accelerate treat the processes of an FSDP launch as it treats those with a GPU each."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    inner = PartialState.__init__

    def patched(self: Any, *arguments: Any, **more: Any) -> None:
        inner(self, *arguments, **more)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = patched  # type: ignore[method-assign]
