"""The anchor's model: where it lies, whose it is, and what is left of it."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from models.other_device import elsewhere
from sft.cases import make_features, make_rows, make_trainer, with_lora

from qscope_posttrain.sft.auxiliary_loss import FINAL_NORM
from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.logits import Anchor

IDS = torch.arange(3, 15).view(2, 6)
META = {"input_ids": IDS.to("meta"), "attention_mask": torch.zeros(2, 1, 6, 6, device="meta")}
"""A batch on another device; its mask is one that transformers takes without a look at its values"""


def trainer_of(model):
    """A trainer that has not placed its model, as under DeepSpeed."""
    return SimpleNamespace(
        model=model, is_fsdp_enabled=False, get_tp_size=lambda: 1,
        accelerator=SimpleNamespace(state=SimpleNamespace(), num_processes=1),
    )  # fmt: skip


def device_of(model) -> str:
    return {parameter.device.type for parameter in model.parameters()}.pop()


@pytest.mark.parametrize("how", ["copy", "given"])
def test_the_model_comes_to_the_batch(model, how):
    """A copy made before the trainer placed its model, and a model that the user loaded on the CPU."""
    trained = copy.deepcopy(model)
    anchor = Anchor.for_trainer(trainer_of(trained), copy.deepcopy(model) if how == "given" else None)
    assert device_of(anchor.frozen) == "cpu"
    hidden, head = anchor.start(trained.to("meta"), META)
    assert device_of(anchor.frozen) == hidden.device.type == head.weight.device.type == "meta"


@pytest.mark.parametrize("how", ["split", "quantised"])
def test_models_that_cannot_move_stay(model, how):
    given = copy.deepcopy(model)
    if how == "split":
        given.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1}
    else:
        given.hf_quantizer = object()
    anchor = Anchor.for_trainer(trainer_of(model), given)
    anchor.start(model, META)
    assert device_of(given) == "cpu"


def test_the_masks_come_to_the_last_layers_device(model):
    loss = KLAnchorCallback(anchor_model=copy.deepcopy(model)).prepare(trainer_of(model))
    hidden = model.base_model(input_ids=IDS).last_hidden_state
    step = SimpleNamespace(inputs={"input_ids": IDS}, named={FINAL_NORM: hidden})
    mask = torch.rand(IDS.shape) > 0.3
    assert torch.equal(loss.divergence(step, elsewhere(mask)), loss.divergence(step, mask))


@pytest.mark.parametrize("shared", ["itself", "base of the adapted", "tied", "same memory"])
def test_a_part_of_the_trained_model_is_no_anchor(model, shared):
    base = copy.deepcopy(model)
    trained, given = base, base
    if shared == "base of the adapted":
        trained = with_lora(base)
    elif shared != "itself":
        given = copy.deepcopy(model)
        weight = base.model.norm.weight
        given.model.norm.weight = weight if shared == "tied" else torch.nn.Parameter(weight.data)
    before = [parameter.requires_grad for parameter in trained.parameters()]
    with pytest.raises(ValueError, match="shares parameters with the model that is trained"):
        Anchor.for_trainer(trainer_of(trained), given)
    assert [parameter.requires_grad for parameter in trained.parameters()] == before


def test_a_given_model_is_left_as_it_was(model, tiny_tokenizer):
    given = copy.deepcopy(model).train()
    given.model.layers[0].eval()
    calls = []
    given.model.norm.register_forward_hook(lambda *_: calls.append(1))
    modes = [module.training for module in given.modules()]
    callback = SASFTCallback(make_features(model), anchor_weight=1.0, anchor_model=given)
    make_trainer(copy.deepcopy(model), make_rows(8), [callback], processing_class=tiny_tokenizer).train()
    assert calls, "its hooks are the user's"
    assert [module.training for module in given.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in given.parameters())


def test_a_starting_model_without_an_anchor_is_refused(model):
    for make in (partial(SASFTCallback, make_features(model)), TokenPenaltyCallback):
        with pytest.raises(ValueError, match="anchor_weight is 0, so that it would do nothing"):
            make(anchor_model=copy.deepcopy(model))
    assert KLAnchorCallback(weight=0.0, anchor_model=model).anchor_model is model


def test_a_copy_has_no_hooks_and_no_gradients(model):
    trained = copy.deepcopy(model)
    calls = []
    trained.model.norm.register_forward_hook(lambda *_: calls.append(1))
    anchor = Anchor.for_trainer(trainer_of(trained), None)
    anchor.start(trained, {"input_ids": IDS})
    assert not calls
    assert not any(parameter.requires_grad for parameter in anchor.frozen.parameters())
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_the_anchor_sees_the_batch_as_the_collator_made_it(model, tiny_tokenizer):
    """TRL's compute_loss writes options of the whole model into its batch, which a backbone may not know."""

    class Spy(KLAnchorCallback):
        def prepare(self, trainer):
            loss = super().prepare(trainer)
            start = loss.anchor.start
            loss.anchor.start = lambda model, inputs: seen.append(dict(inputs)) or start(model, inputs)
            return loss

    seen, written = [], []
    trainer = make_trainer(copy.deepcopy(model), make_rows(8), processing_class=tiny_tokenizer)
    inner = trainer.compute_loss

    def compute_loss(model, inputs, **options):
        result = inner(model, inputs, **options)
        written.append("use_cache" in inputs)
        inputs["labels"] = inputs["input_ids"] = None
        inputs["not_an_argument"] = 1
        return result

    trainer.compute_loss = compute_loss
    Spy().attach(trainer)
    trainer.train()
    assert written == [True] * len(seen)
    assert len(seen) == 4
    assert all(batch.keys() == {"input_ids", "attention_mask", "labels"} for batch in seen)
    assert all(isinstance(value, torch.Tensor) for batch in seen for value in batch.values())
