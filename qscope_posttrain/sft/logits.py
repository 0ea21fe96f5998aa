"""Next-token probabilities from final-norm outputs, and the model as it was before training, for the KL anchor."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.models.layers import evaluation_mode, output_embedding, pretrained_model, text_config

CHUNK_TOKENS = 256  # Tokens whose logits exist at one time: 150 MB in fp32 for a vocabulary of 150,000


@dataclass(frozen=True, eq=False)
class LogitHead:
    """The map from final-norm output to logits: `cap * tanh(z / cap)` of `z = multiplier * (h W' + b)`."""

    weight: Tensor | None  # [vocabulary, d_model]; None where logits are given in place of final-norm outputs
    bias: Tensor | None = None
    multiplier: float = 1.0
    softcap: float | None = None  # cap; None leaves z as it is

    @classmethod
    def of(cls, model: nn.Module) -> LogitHead:
        """The head of a causal language model, with its weight (no copy), scaling and softcapping; see `check_head`."""
        check_head(model)
        embedding: Any = output_embedding(model)
        config = text_config(model)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(embedding.weight, getattr(embedding, "bias", None), _multiplier(config), softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[tokens, vocabulary]` in fp32, from `[tokens, d_model]`.

        The product runs in the precision in which the model itself would run it (autocast included).
        """
        if self.weight is None:
            return hidden.float()
        hidden = hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(self.weight.dtype)
        logits = linear(hidden.to(self.weight.device), self.weight, self.bias).float() * self.multiplier
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _multiplier(config: object) -> float:
    """The factor (Cohere, Falcon-H1) or divisor (Granite) of an architecture's logits, as a factor."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if getattr(config, "model_type", "") == "hyperclovax" else 1.0 / float(divisor)


def check_head(model: nn.Module) -> None:
    """Refuse a head whose logits are not those of its weight: an adapter adds its own part inside the head's forward.

    A trained copy of the head (PEFT's `modules_to_save`) is a weight, and so are adapters that are merged or disabled.
    """
    head = output_embedding(model)
    if not isinstance(head, BaseTunerLayer) or head.disable_adapters or head.merged:
        return
    here = {name for names in head.adapter_layer_names for name in getattr(head, names)}
    active = sorted(here.intersection(head.active_adapters))
    if active:
        raise UserValueError(
            f"The output embedding carries the adapter {', '.join(active)} ({type(head).__module__}), so its weight "
            "does not give the model's logits, which the anchor and the token penalty need. Take the head out of "
            'target_modules, train it whole (modules_to_save=["lm_head"]), or leave these options out.'
        )


def target_surprise(head: LogitHead, hidden: Tensor, target_ids: Tensor) -> Tensor:
    """`-log(1 - P(next token is one of target_ids))`, `[tokens]` in fp32, from `[tokens, d_model]`.

    Computed as log sum exp over all logits minus log sum exp over the others, so that it stays exact near P = 1.
    """

    def chunk(hidden: Tensor) -> Tensor:
        logits = head.logits(hidden)
        return logits.logsumexp(-1) - _without(logits, target_ids).logsumexp(-1)

    return _in_chunks(chunk, hidden)


def divergence_from(
    start: LogitHead, start_hidden: Tensor, head: LogitHead, hidden: Tensor, excluded_ids: Tensor | None
) -> Tensor:
    """`KL(start || model)` per token, `[tokens]` in fp32, from final-norm outputs `[tokens, d_model]`.

    With `excluded_ids` both distributions are renormalized over the other tokens. Gradient goes to `hidden` and `head`.
    """

    def log_probabilities(head: LogitHead, hidden: Tensor) -> Tensor:
        logits = head.logits(hidden)
        return (logits if excluded_ids is None else _without(logits, excluded_ids)).log_softmax(-1)

    def chunk(hidden: Tensor, start_hidden: Tensor) -> Tensor:
        with torch.no_grad():
            reference = log_probabilities(start, start_hidden)
        own = log_probabilities(head, hidden)
        reference = reference.to(own.device)
        difference = reference - own
        if excluded_ids is not None:  # -inf - -inf; these tokens have probability 0 in both
            difference = difference.index_fill(-1, excluded_ids.to(difference.device), 0.0)
        return (reference.exp() * difference).sum(-1)

    return _in_chunks(chunk, hidden, start_hidden)


def _without(logits: Tensor, excluded_ids: Tensor) -> Tensor:
    return logits.index_fill(-1, excluded_ids.to(logits.device), float("-inf"))


def _in_chunks(function: Callable[..., Tensor], hidden: Tensor, *more: Tensor) -> Tensor:
    """Apply `function` to chunks of tokens; backward recomputes a chunk's logits instead of keeping them all."""
    if len(hidden) == 0:
        return hidden.sum(-1).float()  # [0], with a graph
    results = []
    for parts in zip(*(tensor.split(CHUNK_TOKENS) for tensor in (hidden, *more)), strict=True):
        if torch.is_grad_enabled():
            results.append(checkpoint(function, *parts, use_reentrant=False))
        else:
            results.append(function(*parts))
    return torch.cat(results)


class Anchor:
    """Gives the starting model's final-norm output for a batch.

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
