"""A plug-in of ms-swift for the tests: writes down what one optimizer step saw. `--callbacks keep_gradients`

Rank r writes `$KEEP_GRADIENTS/rank_r.pt`: gradients just before the step, the micro-batches that led to it, and how
far the rows got that the penalty looks at.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from swift.arguments import SftArguments
from swift.callbacks import callbacks_map
from transformers import TrainerCallback


def copied(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


class KeepGradients(TrainerCallback):
    def __init__(self, args, trainer) -> None:
        self.trainer = trainer
        self.batches: list[dict[str, Any]] = []
        self.folder = Path(os.environ["KEEP_GRADIENTS"])

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        read = self.trainer.get_batch_samples

        def get_batch_samples(*arguments, **options):
            batches, count = read(*arguments, **options)
            self.batches += [copied(batch) for batch in batches]
            return batches, count

        self.trainer.get_batch_samples = get_batch_samples
        if state.global_step > 0:
            return  # resumed
        # LoRA starts with one matrix of zeros, and then the other has no gradient.
        generator = torch.Generator().manual_seed(1)
        for name, parameter in self.trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        gradients = {
            name.removeprefix("module."): parameter.grad.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        checkpoint = torch.utils.checkpoint.checkpoint
        cells = dict(zip(checkpoint.__code__.co_freevars, checkpoint.__closure__ or (), strict=True))
        kept = {
            "gradients": gradients,
            "batches": self.batches,
            "use_reentrant": cells["use_reentrant_"].cell_contents if "use_reentrant_" in cells else None,
            "checkpointing": any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
            "peft": None,
        }
        trained = self.trainer.model
        if hasattr(trained, "peft_config"):
            kept["peft"] = trained.peft_config["default"], trained.state_dict()
        torch.save(kept, self.folder / f"rank_{args.process_index}_step_{state.global_step}.pt")
        self.batches = []


def packs_without_flash_attention(arguments: Any) -> None:
    """ms-swift lets packed rows only to flash attention, which no CPU has; "sdpa" masks documents by position ids."""
    arguments.padding_free = arguments.padding_free or arguments.packing


callbacks_map["keep_gradients"] = KeepGradients
SftArguments._check_padding_free = packs_without_flash_attention
