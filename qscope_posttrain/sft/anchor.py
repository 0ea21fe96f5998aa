"""The model as it was before training, for the KL anchor."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.models.layers import evaluation_mode, pretrained_model, text_config
from qscope_posttrain.sft.logits import LogitHead, check_head, divergence_from


class Anchor:
    """Gives the starting model's final-norm output for a batch, and the divergence from it.

    With PEFT the starting model is the model with its adapter disabled: no further memory, one more forward. Without,
    it is a frozen model: the one given, or a copy of the model at attach. It is moved to the device of the first batch,
    because a trainer may place its model only after the copy was made (DeepSpeed, `*_full_eval`).
    """

    def __init__(self, frozen: nn.Module | None) -> None:
        """`frozen`: a causal language model, or None to disable the adapter of the trained one."""
        self.frozen = frozen
        self._to_place = frozen is not None and _can_move(frozen)

    @classmethod
    def for_trainer(cls, trainer: Trainer, given: nn.Module | Anchor | None) -> Anchor:
        """The anchor for a trainer's model, unless it is given. Of a given model, only the device may change."""
        if isinstance(given, Anchor):
            return given
        model: Any = trainer.model
        if given is not None:
            if not isinstance(given, nn.Module):
                raise UserTypeError(f"anchor_model must be a loaded model; got {type(given).__name__} {given!r}.")
            _check_given(given, model)
            return cls(given)
        if hasattr(model, "disable_adapter"):
            return cls(None)
        frozen: nn.Module = copy.deepcopy(pretrained_model(model))
        # A copy carries the hooks of the original along, which would report the copy's outputs as the original's.
        for module in frozen.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        return cls(frozen.eval().requires_grad_(False))

    def divergence(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        final_hidden: Tensor,
        positions: Tensor,
        excluded_ids: Tensor | None,
        head: LogitHead | None = None,
    ) -> Tensor:
        """`KL(start || model)` at the chosen positions, `[positions]`; see `logits.divergence_from`.

        Args:
            model, inputs: the trained model, unwrapped, and the batch as it got it.
            final_hidden: its final-norm output `[batch, tokens, d_model]`, with graph.
            positions: bool `[batch, tokens]`.
            excluded_ids: tokens to renormalize without, or None.
            head: the map from its output to logits; None: that of the model.
        """
        start_hidden, start_head = self.start(model, inputs)
        # The layers of a model that is split over devices end on another one than that of the labels.
        start_hidden = start_hidden[positions.to(start_hidden.device)]
        final_hidden = final_hidden[positions.to(final_hidden.device)]
        return divergence_from(start_head, start_hidden, head or LogitHead.of(model), final_hidden, excluded_ids)

    @torch.no_grad()
    def start(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, LogitHead]:
        """The starting model's final-norm output `[batch, tokens, d_model]` for a batch, and its head."""
        adapted: Any = model
        start = model if self.frozen is None else self.frozen
        if self._to_place:  # once, since a walk over all parameters costs time
            start.to(next(value.device for value in inputs.values() if isinstance(value, Tensor)))
            self._to_place = False
        # The backbone is all but the LM head; labels would only make it compute a loss.
        backbone: Any = pretrained_model(start).base_model
        arguments = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
        with adapted.disable_adapter() if self.frozen is None else nullcontext(), evaluation_mode(start):
            hidden = backbone(**arguments).last_hidden_state
            head = LogitHead.of(start)
        return hidden, head

    def fingerprint(self, model: nn.Module) -> str:
        """SHA-256 of the first values of every parameter of the starting model: cheap, and no two trainings share it.

        With PEFT, of the parameters of `model` that are not trained.
        """
        digest = hashlib.sha256()
        for parameter in (model if self.frozen is None else self.frozen).parameters():
            if self.frozen is not None or not parameter.requires_grad:
                digest.update(parameter.detach().flatten()[:8].float().cpu().numpy().tobytes())
        return digest.hexdigest()


def sharding_of(trainer: Trainer) -> str | None:
    """The name of the scheme under which no rank holds whole parameters (FSDP, ZeRO-3, ...), or None."""
    if trainer.is_fsdp_enabled:
        return "FSDP"
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        return "DeepSpeed ZeRO-3"
    if trainer.get_tp_size() > 1:
        return "tensor parallelism"
    model: Any = trainer.model
    at_load = getattr(trainer, "is_distributed_loading_by_transformers", False)  # not in transformers 5.10
    if at_load or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "sharded loading (DTensor parameters)"
    return None


def _check_given(given: nn.Module, model: nn.Module) -> None:
    trained = {id(parameter) for parameter in model.parameters()}
    memory = {parameter.data_ptr() for parameter in model.parameters()} - {0}  # 0: nothing is allocated
    if any(id(parameter) in trained or parameter.data_ptr() in memory for parameter in given.parameters()):
        raise UserValueError(
            "anchor_model shares parameters with the model that is trained, so it would train along. Leave it out "
            "(then a frozen copy is made; with PEFT the adapter is disabled), or load the starting model once more."
        )
    expected, found = text_config(model).vocab_size, text_config(given).vocab_size
    if expected != found:
        raise UserValueError(f"anchor_model has a vocabulary of {found} tokens, the trained model of {expected}.")
    check_head(given)


def _can_move(model: nn.Module) -> bool:
    """Whether `.to(device)` is right: not for quantized weights, nor where a device_map placed the modules."""
    causal_lm: Any = pretrained_model(model)
    places = set((getattr(causal_lm, "hf_device_map", None) or {}).values())
    return len(places) <= 1 and getattr(causal_lm, "hf_quantizer", None) is None
