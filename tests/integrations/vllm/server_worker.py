"""One rank of the training through a server that two processes share; writes what all ranks saw."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from integrations.vllm.rollout_cases import no_weight_transfer, train


def main(folder: Path) -> None:
    job = torch.load(folder / "job.pt", weights_only=False)
    results = {}
    for name, options in job["cases"].items():
        with no_weight_transfer():
            run = train(job["model"], ddp_backend="gloo", **options)
        ranks = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, (run.said, run.flags))
        results[name] = ranks
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
