"""An output embedding with an adapter: right logits, or a refusal at attach."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sft.cases import case_model, make_features, make_rows, make_trainer

from qscope_posttrain.sft.baselines import TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.logits import Anchor, LogitHead

IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def model(make_model):
    return case_model(make_model, tie_word_embeddings=False)


def adapted(model, **options):
    """PEFT on a copy, all that it trains moved away from where it starts."""
    options = {"r": 4, "target_modules": ["q_proj"], **options}
    result = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    for parameter in result.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return result


def largest_difference(model) -> float:
    """Between the logits of `LogitHead` and the model's own."""
    with torch.no_grad():
        hidden = model.get_base_model().base_model(input_ids=IDS).last_hidden_state
        return float((LogitHead.of(model).logits(hidden) - model(input_ids=IDS).logits).abs().max())


def test_lora_on_the_head_is_refused(model):
    with pytest.raises(ValueError, match=r"carries the adapter default .*modules_to_save=\[\"lm_head\"\]"):
        LogitHead.of(adapted(model, target_modules=["q_proj", "lm_head"]))


@pytest.mark.parametrize("name", ["anchor", "token"])
def test_it_is_refused_at_attach(model, tiny_tokenizer, name):
    features = make_features(model)
    callback = {
        "anchor": SASFTCallback(features, anchor_weight=1.0),
        "token": TokenPenaltyCallback(languages=features.languages),
    }[name]
    trainer = make_trainer(copy.deepcopy(model), make_rows(8), processing_class=tiny_tokenizer)
    trainer.model = adapted(model, target_modules=["lm_head"])  # some versions of TRL refuse it at construction
    with pytest.raises(ValueError, match="carries the adapter"):
        callback.attach(trainer)
    assert SASFTCallback(features).attach(trainer).runs, "the plain penalty needs no logits"


def test_a_given_anchor_with_such_a_head_is_refused(model, tiny_tokenizer):
    trainer = make_trainer(copy.deepcopy(model), make_rows(8), processing_class=tiny_tokenizer)
    with pytest.raises(ValueError, match="carries the adapter"):
        Anchor.for_trainer(trainer, adapted(model, target_modules=["lm_head"]))


@pytest.mark.parametrize("how", ["off", "merged", "other", "trained whole", "trained whole, off", "layers only"])
def test_every_other_head_gives_the_models_own_logits(model, how):
    if "whole" in how:
        changed = adapted(model, modules_to_save=["lm_head"])
    else:
        changed = adapted(model, target_modules=["q_proj"] if how == "layers only" else ["q_proj", "lm_head"])
    if how == "merged":
        changed.merge_adapter()
    if how == "other":
        changed.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
        changed.set_adapter("other")
    if "off" in how:
        with changed.disable_adapter():
            assert largest_difference(changed) < 1e-5
    else:
        assert largest_difference(changed) < 1e-5
