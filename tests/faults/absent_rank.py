"""Two ranks of one command without an agent that watches them: the second dies or hangs, the first waits for it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState  # noqa: F401 - imported once, before the ranks are forked

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from free_port import free_port

from qscope_posttrain.cli import main as module
from qscope_posttrain.distributed import join_processes, over_processes


def work(arguments: list[str]) -> int:
    join_processes("cpu", 10.0)
    over_processes(torch.zeros(1))
    if os.environ["RANK"] == "1":
        if arguments == ["dies"]:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10**6)
    over_processes(torch.zeros(1))
    return 0


if __name__ == "__main__":
    module._runner = lambda name: work
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os._exit(module.main(["sae", sys.argv[1]]))
        children.append(child)
    status = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
    os.kill(children[1], signal.SIGKILL)
    sys.exit(status)
