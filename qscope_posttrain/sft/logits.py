"""Next-token probabilities from final-norm outputs, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.layers import output_embedding, text_config

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
