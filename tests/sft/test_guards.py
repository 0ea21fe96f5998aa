"""Trainings that would be plain SFT, or worse, without a word: noticed before or in the first steps."""

from __future__ import annotations

import copy

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sft.cases import case_model, make_features, make_rows, make_trainer

from qscope_posttrain.sft.callback import SASFTCallback

CHECKPOINTING = {
    "none": {"gradient_checkpointing": False},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.fixture
def build(model, tiny_tokenizer):
    def build(callback, change=lambda model: model, **arguments):
        """A trainer of a changed copy of the model."""
        arguments = {"processing_class": tiny_tokenizer, **arguments}
        return make_trainer(change(copy.deepcopy(model)), make_rows(8), [callback], **arguments)

    return build


def frozen_up_to(layer):
    def change(model):
        model.model.embed_tokens.requires_grad_(False)
        for block in model.model.layers[: layer + 1]:
            block.requires_grad_(False)
        return model

    return change


def lora_on(*layers):
    return lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"], layers_to_transform=list(layers)))


@pytest.mark.promise("A penalty on layers below all that is trained is refused before the first step")
class TestWithoutGradient:
    """Features are on layers 1 and 2 of 3."""

    @pytest.mark.parametrize("checkpointing", list(CHECKPOINTING))
    @pytest.mark.parametrize(
        ("change", "layers", "named"),
        [
            (frozen_up_to(2), (1, 2), "1, 2"),
            (frozen_up_to(1), (1, 2), "1"),  # the head is trained, the last layer too
            (frozen_up_to(1), (1,), "1"),
            (lora_on(2), (1,), "1"),
        ],
    )
    def test_frozen_layers(self, build, features, change, layers, named, checkpointing):
        trainer = build(SASFTCallback(features, layers=layers), change, **CHECKPOINTING[checkpointing])
        with pytest.raises(ValueError, match=rf"would change nothing on layer\(s\) {named}: .*Train parameters"):
            trainer.train()
        assert trainer.state.global_step == 0

    @pytest.mark.parametrize(
        "change",
        [
            frozen_up_to(0),
            lora_on(1),
            lora_on(0),
            lambda model: get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        ],
    )
    def test_trained_at_or_below(self, build, features, change):
        trainer = build(SASFTCallback(features, layers=(1,)), change)
        trainer.train()
        assert trainer.state.log_history[0]["sasft/penalty"] > 0

    def test_a_head_that_is_the_embedding(self, make_model, tiny_tokenizer):
        model = case_model(make_model, tie_word_embeddings=True)
        for block in model.model.layers:
            block.requires_grad_(False)
        make_trainer(
            model, make_rows(8), [SASFTCallback(make_features(model))], processing_class=tiny_tokenizer
        ).train()

    def test_a_term_that_only_measures_is_left_alone(self, build, features):
        build(SASFTCallback(features, weight=0.0), frozen_up_to(2)).train()
