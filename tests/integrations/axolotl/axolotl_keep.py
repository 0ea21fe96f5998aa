"""A plug-in of axolotl for the tests: writes down what each optimizer step saw.

`plugins: [<the plug-in of the package>, axolotl_keep.KeepPlugin]`, with `output_dir` in the configuration: rank r of
step n writes `<output_dir>/kept/rank_r_step_n.pt`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from axolotl.integrations.base import BasePlugin
from integrations.reference import KeepGradients, watch


class Keep(KeepGradients):
    def __init__(self, trainer, folder: Path) -> None:
        super().__init__()
        self.trainer = trainer
        self.folder = folder
        self.seen = watch(trainer)
        self.starting = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)
        trained = self.trainer.model
        kept = {
            "gradients": self.gradients,
            "batches": list(self.seen),
            "checkpointing": any(getattr(module, "gradient_checkpointing", False) for module in trained.modules()),
            "peft": (trained.peft_config["default"], self.starting) if hasattr(trained, "peft_config") else None,
            "eval_columns": getattr(self.trainer.eval_dataset, "column_names", None),
        }
        self.seen.clear()
        torch.save(kept, self.folder / f"rank_{args.process_index}_step_{state.global_step}.pt")

    def on_train_end(self, args, state, control, **kwargs):
        weights = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}
        torch.save({"weights": weights, "logs": state.log_history}, self.folder / f"rank_{args.process_index}_end.pt")


def no_cuda(*devices: int) -> bool:
    """What a build of torch for the CPU has in place of `torch.cuda.can_device_access_peer`."""
    raise AssertionError("Torch not compiled with CUDA enabled")


class KeepPlugin(BasePlugin):
    # With several processes axolotl asks whether GPUs reach each other, and loads the model onto the GPU of the rank.
    # Where there is none, a torch built for the CPU lets it go on after the first, and one built for CUDA, the only one
    # on PyPI for Python 3.12, does not. Nothing lets it go on after the second but another device.
    def register(self, cfg) -> None:
        if not torch.cuda.is_available():
            torch.cuda.can_device_access_peer = no_cuda

    def load_datasets(self, cfg, preprocess=False) -> None:
        if not torch.cuda.is_available() and cfg.world_size > 1:
            cfg.device_map = {"": "cpu"}

    def post_trainer_create(self, cfg, trainer) -> None:
        # LoRA starts with one matrix of zeros, and then the other has no gradient.
        generator = torch.Generator().manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        folder = Path(cfg.output_dir) / "kept"
        folder.mkdir(parents=True, exist_ok=True)
        trainer.add_callback(Keep(trainer, folder))
