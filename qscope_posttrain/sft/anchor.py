"""The model as it was before training, for the KL anchor."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from qscope_posttrain.residual.layers import pretrained_model, text_config
from qscope_posttrain.sft.checks import is_sharded
from qscope_posttrain.sft.logits import LogitHead, divergence_from


class Anchor:
    """Gives the starting model's final-norm output for a batch, and the divergence from it.

    With PEFT the starting model is the model with its adapter disabled: no further memory, one more forward. Without,
    it is a frozen model: the one given, or a copy of the model at attach.
    """

    def __init__(self, frozen: nn.Module | None) -> None:
        """`frozen`: a causal language model, or None to disable the adapter of the trained one."""
        self.frozen = frozen

    @classmethod
    def for_trainer(cls, trainer: Trainer, given: nn.Module | None) -> Anchor:
        """The anchor for a trainer's model.

        Raises:
            ValueError: parameters are sharded, or the given model has another vocabulary.
        """
        model: Any = trainer.model
        scheme = is_sharded(trainer)
        if scheme is not None:
            raise ValueError(
                f"anchor_weight needs whole logits of the starting and the trained model; under {scheme} no rank "
                "holds the whole output embedding outside of the model's forward. Use DDP or ZeRO-1/2, or "
                "anchor_weight=0."
            )
        if given is not None:
            expected, found = text_config(model).vocab_size, text_config(given).vocab_size
            if expected != found:
                raise ValueError(f"anchor_model has a vocabulary of {found} tokens, the trained model of {expected}.")
            return cls(_freeze(given))
        if hasattr(model, "disable_adapter"):
            return cls(None)
        return cls(_freeze(copy.deepcopy(pretrained_model(model))))

    def divergence(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        final_hidden: Tensor,
        positions: Tensor,
        excluded_ids: Tensor | None,
    ) -> Tensor:
        """`KL(start || model)` at the chosen positions, `[positions]`; see `logits.divergence_from`.

        Args:
            model: the trained model, unwrapped.
            inputs: the batch as the model got it.
            final_hidden: the trained model's final-norm output `[batch, tokens, d_model]`, with graph.
            positions: bool `[batch, tokens]`.
            excluded_ids: tokens to renormalise without, or None.
        """
        with torch.no_grad():
            start_hidden, start_head = self._start(model, inputs)
        head = LogitHead.of(model)
        return divergence_from(start_head, start_hidden[positions], head, final_hidden[positions], excluded_ids)

    def _start(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, LogitHead]:
        adapted: Any = model
        without_adapter: AbstractContextManager[Any] = (
            adapted.disable_adapter() if self.frozen is None else nullcontext()
        )
        start = self.frozen if self.frozen is not None else model
        # The backbone is all but the LM head; labels would only make it compute a loss.
        backbone: Any = pretrained_model(start).base_model
        arguments = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
        with without_adapter, _evaluating(start):
            hidden = backbone(**arguments).last_hidden_state
            head = LogitHead.of(start)
        return hidden, head


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode (no dropout), then each as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _freeze(model: nn.Module) -> nn.Module:
    # A copy carries the hooks of the original along, which would report the copy's outputs as the original's.
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model.eval().requires_grad_(False)
