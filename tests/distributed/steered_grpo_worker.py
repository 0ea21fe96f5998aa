"""Both ranks of the two-process run of `test_steered_grpo_two_processes.py`; writes what all ranks saw."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from conftest import build_model
from ranks import run_two_ranks
from rl.cases import run_prescribed, run_sampled, small_model
from transformers import AutoTokenizer


def main(folder: Path) -> None:
    job = torch.load(folder / "job.pt", weights_only=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    results = {}
    for name, case in job.items():
        model = small_model(build_model)
        options = {"ddp_backend": "gloo", **case["options"]}
        if case["batches"] is None:
            local, gradients, logged = run_sampled(model, tokenizer, **options), {}, {}
        else:
            outcome = run_prescribed(model, tokenizer, case["batches"], **options)
            gradients, logged = outcome.gradients, outcome.trainer.state.log_history[0]
            flags = [[batch["steered"].tolist() for batch in outcome.losses], outcome.flags]
            local = {"said": outcome.said, "flags": flags}
        ranks = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, local)
        results[name] = {"gradients": gradients, "logs": logged, "ranks": ranks}
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_two_ranks(main, Path(sys.argv[1]))
