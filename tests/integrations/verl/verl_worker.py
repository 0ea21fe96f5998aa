"""One of two processes of `test_two_processes_are_one`: the whole program, as torchrun would start it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from verl_cases import command_line, fit, join_processes

from qscope_posttrain.integrations import verl as integration


def main(folder: Path, rank: int, cases: list[list[str]]) -> None:
    results: list[dict] = []
    own = integration.attach

    def attach(trainer, settings):
        added, run = own(trainer, settings), trainer.fit
        trainer.fit = lambda: results.append(dict(zip(("gradients", "metrics"), fit(trainer, run), strict=True)))
        return added

    integration.attach = attach
    for case, overrides in enumerate(cases):
        place = folder / f"case{case}"
        place.mkdir(exist_ok=True)
        integration.initialize_global_process_group = lambda place=place: join_processes(place, rank, 2)
        sys.argv = ["sft", *command_line(folder, *overrides)]
        integration.main()
    torch.save(results, folder / f"results{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
