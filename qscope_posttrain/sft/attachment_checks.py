"""What an auxiliary loss refuses before it changes anything, and when a run is resumed."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor
from transformers import Trainer

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.provenance import check_resumed as check_resumed

ZERO_3 = "DeepSpeed ZeRO-3"
TENSOR_PARALLEL = "tensor parallelism"


def check_trainer(trainer: Trainer, callback_name: str) -> None:
    """Refuse trainers whose loss or batches are not what the penalties rely on.

    Raises:
        TypeError: not a `trl.SFTTrainer`.
        ValueError: a kind of parallelism that splits sequences or replicates the model in one process.
    """
    from trl import SFTTrainer

    if not isinstance(trainer, SFTTrainer):
        raise UserTypeError(
            f"{callback_name} attaches to trl.SFTTrainer (or a subclass), got {type(trainer).__name__}."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_size > 1 or parallelism.sp_size > 1):
        raise UserValueError(
            f"{callback_name} does not work with context or sequence parallelism (cp_size={parallelism.cp_size}, "
            f"sp_size={parallelism.sp_size}): they split a sequence over ranks inside the training step, so labels and "
            "languages no longer match the captured tokens. Use data parallelism, FSDP2 or ZeRO instead."
        )
    if trainer.args.n_gpu > 1:
        raise UserValueError(
            f"{callback_name} does not work with nn.DataParallel, whose replicas run in threads of one process. "
            "Launch with `accelerate launch` or torchrun, or make one GPU visible."
        )


def is_sharded(trainer: Trainer) -> str | None:
    """The name of the scheme under which no rank holds whole parameters (FSDP, ZeRO-3, ...), or None."""
    if trainer.is_fsdp_enabled:
        return "FSDP"
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        return ZERO_3
    model: Any = trainer.model
    at_load = getattr(trainer, "is_distributed_loading_by_transformers", False)
    if at_load or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "sharded loading (DTensor parameters)"
    return TENSOR_PARALLEL if tensor_parallel_size(trainer) > 1 else None


def tensor_parallel_size(trainer: Trainer) -> int:
    """Ranks that hold parts of the same parameters and read the same data."""
    ask = getattr(trainer, "get_tp_size", None)
    if ask is not None:  # knows the model's own and DeepSpeed's tensor parallelism as well
        return int(ask())
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    return 1 if parallelism is None else int(parallelism.tp_size)
