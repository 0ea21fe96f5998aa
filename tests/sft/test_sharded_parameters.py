"""Options that read the output embedding are refused where no rank holds it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from sft.cases import case_model, make_features, make_rows, make_trainer

from qscope_posttrain.sft.baselines import TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback


@pytest.fixture
def trainer(make_model, tiny_tokenizer):
    return make_trainer(case_model(make_model), make_rows(8), (), processing_class=tiny_tokenizer)


@pytest.fixture
def zero_3(trainer, monkeypatch):
    plugin = property(lambda state: SimpleNamespace(zero_stage=3))
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", plugin, raising=False)
    return trainer


def callbacks(trainer):
    features = make_features(trainer.model)
    return {
        "risk": SASFTCallback(features, position_weight="risk"),
        "anchor": SASFTCallback(features, anchor_weight=1.0),
        "token": TokenPenaltyCallback(languages=features.languages),
        "plain": SASFTCallback(features),
    }


@pytest.mark.parametrize("name", ["risk", "anchor", "token"])
def test_zero_3_refuses_what_needs_the_head(zero_3, name):
    with pytest.raises(ValueError, match="ZeRO-3"):
        callbacks(zero_3)[name].attach(zero_3)


@pytest.mark.parametrize("name", ["anchor", "token"])
def test_fsdp_refuses_what_needs_gradients_of_the_head(trainer, name):
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="FSDP"):
        callbacks(trainer)[name].attach(trainer)


def test_the_plain_penalty_needs_no_head(zero_3):
    assert callbacks(zero_3)["plain"].attach(zero_3).attached
