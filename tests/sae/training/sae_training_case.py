"""A small training of SAEs, run here or by `python sae_training_case.py FOLDER OUTPUT ARCHITECTURE STEPS`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from qscope_posttrain.sae.training import SAETrainingConfig
from qscope_posttrain.sae.training.run import RunConfig, SAETrainingResult, train_saes_on_text
from qscope_posttrain.sae.training.stream_config import StreamConfig

STREAM = StreamConfig(
    context_length=16, block_tokens=160, forward_tokens=64, buffer_dtype="float32", calibration_tokens=96
)
LAYERS = (1, 3)


def train(world, output: Path, architecture: str = "topk", steps: int = 23, **run) -> SAETrainingResult:
    """23 updates of 32 tokens, 5 a block, checkpoints every 4: the last one in the middle of a block."""
    config = SAETrainingConfig(
        architecture=architecture,
        width=96,
        k=4,
        steps=steps,
        batch_tokens=32,
        dead_after=3,
        k_start=8,
        k_anneal_steps=5,
    )
    options = {"log_every": 5, "held_out_documents": 2, "checkpoint_every": 4, **run}
    model, tokenizer, texts = world
    documents = [line for lines in texts.values() for line in lines]
    return train_saes_on_text(model, tokenizer, documents, LAYERS, config, output, STREAM, RunConfig(**options))


def main(folder: Path, output: Path, architecture: str, steps: int) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from conftest import TEXTS, build_model

    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")
    result = train((build_model(), AutoTokenizer.from_pretrained(folder), TEXTS), output, architecture, steps)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if rank == 0:
        torch.save({"tensors": tensors(result), "records": result.records, "facts": result.facts}, output / "result.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def tensors(result: SAETrainingResult) -> dict[str, torch.Tensor]:
    """Weights of all layers by name."""
    found = {}
    for layer, sae in result.saes.items():
        found |= {f"{layer}.{name}": getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        threshold = getattr(sae.activation, "threshold", None)
        if threshold is not None:
            found[f"{layer}.threshold"] = torch.as_tensor(threshold)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
