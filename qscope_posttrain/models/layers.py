"""Find the text decoder of any decoder-only model of transformers, however it is wrapped.

Nothing here knows an attribute path. The text backbone is the module that directly holds both the token embedding and
a list of `config.num_hidden_layers` blocks. That rule sees through PEFT, DDP, FSDP and `torch.compile` wrappers, which
are ordinary parents in the module tree, and never picks a vision or audio tower, which has no token embedding.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, SupportsIndex

from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel

from qscope_posttrain.errors import UserTypeError, UserValueError

_STREAMS = ("altup_num_inputs", "hc_mult", "hc_count")
"""Entries of a configuration that hold the number of residual streams (AltUp, hyper-connections)"""


def pretrained_model(model: nn.Module) -> PreTrainedModel:
    """The outermost `PreTrainedModel` in `model`: the model itself, or what PEFT, DDP or `torch.compile` wrap."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UserValueError(
        f"{type(model).__name__} holds no transformers model; give a causal language model of transformers, "
        "plain or wrapped (PEFT, DDP, torch.compile)."
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module below DDP and `torch.compile` wrappers; a PEFT model stays one."""
    while isinstance(model, (DistributedDataParallel, OptimizedModule)):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model


def text_config(model: nn.Module) -> PreTrainedConfig:
    """The configuration of the text decoder (`hidden_size`, `num_hidden_layers`, `vocab_size`), also of a multimodal
    model."""
    return pretrained_model(model).config.get_text_config(decoder=True)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers in order: the output of element n is the residual stream after block n, counted from 0.
    ValueError for an encoder-decoder, a model with several residual streams, or one without a single list of
    `num_hidden_layers` blocks beside its token embedding."""
    layers, config = text_backbone(model)[1], text_config(model)
    if config.model_type == "xlnet":
        raise UserValueError("XLNet's layers return [tokens, batch, d_model]; only [batch, tokens, d_model] is read.")
    for name in _STREAMS:
        count = getattr(config, name, None)
        if isinstance(count, int) and count > 1:
            raise UserValueError(
                f"{type(pretrained_model(model)).__name__} has several residual streams ({name}={count}), and its "
                "layers return all of them. Only models with one residual stream can be read and steered."
            )
    return layers


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the output embedding; ValueError if it is not exactly one, or if a
    projection follows it."""
    backbone, layers = text_backbone(model)
    norms = _final_norms(backbone, layers)
    if len(norms) != 1:
        found = ", ".join(type(norm).__name__ for norm in norms) or "none"
        raise UserValueError(
            f"Expected one norm behind the decoder layers of {type(backbone).__name__}, found: {found}."
        )
    head: Any = pretrained_model(model).get_output_embeddings()
    read, width = getattr(head, "in_features", None), text_config(model).hidden_size
    if isinstance(read, int) and read != width:
        raise UserValueError(
            f"The output embedding of {type(pretrained_model(model)).__name__} reads {read} numbers, but its decoder "
            f"layers write {width}: a projection lies between the final norm and the output embedding."
        )
    return norms[0]


def trained_for(model: nn.Module, layer: int) -> bool:
    """Whether a parameter that requires a gradient lies at or below decoder layer `layer`, whose output it changes."""
    backbone, layers = text_backbone(model)
    causal_lm = pretrained_model(model)
    head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    later = [*layers[layer + 1 :], *_final_norms(backbone, layers), *([] if head is None else [head])]
    behind = {id(parameter) for module in later for parameter in module.parameters()}
    behind -= {id(parameter) for parameter in embedding.parameters()}  # a head may share them
    return any(parameter.requires_grad and id(parameter) not in behind for parameter in model.parameters())


def virtual_tokens(model: nn.Module) -> int:
    """Tokens that a PEFT adapter (prompt tuning, p-tuning, prefix tuning) puts in front of a text; 0 without one."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            break
        adapter: Any = getattr(module, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            # Inside `disable_adapter()` there are none.
            return int(adapter.num_virtual_tokens) if getattr(module, "has_active_enabled_adapter", True) else 0
    return 0


def output_embedding(model: nn.Module) -> nn.Module:
    """The LM head, from final-norm output `[..., d_model]` to logits `[..., vocabulary]`. ValueError without one."""
    causal_lm = pretrained_model(model)
    head = causal_lm.get_output_embeddings()
    if head is None:
        raise UserValueError(f"{type(causal_lm).__name__} has no output embedding; load the model with its LM head.")
    return head


def check_layers(model: nn.Module, layers: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Check the numbers of decoder layers, and return them as a tuple of ints, in the given order."""
    try:
        numbers = tuple(operator.index(layer) for layer in layers)
    except TypeError as error:
        raise UserTypeError(f"layers must be integers, e.g. [26, 27]; got {layers!r}.") from error
    count = len(decoder_layers(model))
    if not numbers:
        raise UserValueError(f"No layer given; choose among the layers 0 to {count - 1} of this model.")
    if len(set(numbers)) != len(numbers):
        raise UserValueError(f"Layers {list(numbers)} contain a layer twice.")
    outside = [number for number in numbers if not 0 <= number < count]
    if outside:
        raise UserValueError(
            f"Layers {outside} do not exist: this model has {count} layers, valid numbers are 0 to {count - 1}."
        )
    return numbers


def text_backbone(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds the token embedding and the decoder layers, and those layers."""
    causal_lm = pretrained_model(model)
    name = type(causal_lm).__name__
    if causal_lm.config.is_encoder_decoder:
        raise UserValueError(f"{name} is an encoder-decoder; only decoder-only models have one residual stream.")
    try:
        embedding = causal_lm.get_input_embeddings()
    except NotImplementedError as error:
        raise UserValueError(f"{name} names no token embedding, so its decoder cannot be found.") from error
    expected = text_config(causal_lm).num_hidden_layers
    beside_embedding = _module_lists(_owners(causal_lm, embedding))
    matching = [(owner, child) for owner, _, child in beside_embedding if len(child) == expected]
    if len(matching) == 1:
        return matching[0]
    found = beside_embedding or _module_lists(causal_lm.modules())
    listed = ", ".join(f"{type(owner).__name__}.{child_name} ({len(child)})" for owner, child_name, child in found)
    raise UserValueError(
        f"Expected one list of {expected} decoder layers (config.num_hidden_layers) beside the token embedding of "
        f"{name}; found {listed or 'no module list'}."
    )


def _module_lists(owners: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.ModuleList]]:
    """(owner, name, list) of the module lists that the owners directly hold."""
    children = ((owner, name, child) for owner in owners for name, child in owner.named_children())
    return [(owner, name, child) for owner, name, child in children if isinstance(child, nn.ModuleList)]


def _owners(root: nn.Module, embedding: nn.Module) -> list[nn.Module]:
    """The modules that directly hold `embedding`, without a look into the lists beside it: nearly all modules of a
    model are in its layers, and skipping them makes this cheap enough for every forward."""
    owners: list[nn.Module] = []
    waiting, seen = [root], {root}
    while waiting:
        module = waiting.pop(0)
        children = list(module.children())
        if any(child is embedding for child in children):
            owners.append(module)
            children = [child for child in children if not isinstance(child, nn.ModuleList)]
        waiting += [child for child in children if child not in seen]
        seen.update(children)
    return owners


def _final_norms(backbone: nn.Module, layers: nn.ModuleList) -> list[nn.Module]:
    """The norms behind the layers, by the order in which the backbone made its modules."""
    children = list(backbone.named_children())
    place = [child for _, child in children].index(layers)
    # A norm in front of the layers is the embedding's, unless its name says otherwise (OPT).
    return [child for _, child in children[place + 1 :] if _is_norm(child)] or [
        child for name, child in children[:place] if "final" in name and _is_norm(child)
    ]


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm, or a wrapper around one, e.g. PEFT's `modules_to_save`."""
    return any("norm" in type(part).__name__.lower() for part in module.modules())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and restore each module's training flag at the end, also after an exception."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
