"""Trainings that would be plain SFT, or worse, without a word: noticed before or in the first steps."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from sft.cases import case_model, make_features, make_rows, make_trainer

from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.watch import FAR, Watch

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

    @pytest.mark.parametrize(
        ("change", "layers", "named", "checkpointing"),
        [
            (frozen_up_to(2), (1, 2), "1, 2", "none"),
            (frozen_up_to(1), (1, 2), "1", "none"),  # the last layer is trained, and the head
            (frozen_up_to(1), (1,), "1", "reentrant"),
            *((lora_on(2), (1,), "1", checkpointing) for checkpointing in CHECKPOINTING),
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


def found_on(model, rows):
    """Features with the mean residuals that the model has on `rows` at positions that predict a response token."""
    features = make_features(model)
    layers = {}
    for layer, found in features.layers.items():
        means = []
        for language in features.languages:
            states = []
            for row in rows:
                if row["language"] == language:
                    hidden = forward_to_layer(model, [layer], input_ids=torch.tensor([row["input_ids"]]))[layer][0]
                    states.append(hidden[:-1][torch.tensor(row["labels"][1:]) != -100])
            means.append(torch.cat(states).mean(0))
        layers[layer] = replace(found, mean_residual=torch.stack(means), residual_median_norm=float("nan"))
    # As from an earlier version of the package, or where weights are quantized or sharded
    identity = {key: value for key, value in features.model.items() if key != "embedding"}
    return replace(features, layers=layers, model=identity)


def trained(model, features, rows, tokenizer, **arguments):
    """The log of a training and what was warned of in it."""
    trainer = make_trainer(
        copy.deepcopy(model), rows, [SASFTCallback(features)], processing_class=tokenizer, **arguments
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(one.message) for one in caught if str(one.message).startswith("SASFTCallback: ")]
    return [entry for entry in trainer.state.log_history if "sasft/penalty" in entry], said


ROWS = make_rows(24)
BATCHES = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}


@pytest.mark.promise("Features of another model of the same shape are warned of at the first log of a training")
class TestDisplacement:
    def test_on_their_model_it_is_zero(self, model, tiny_tokenizer):
        logs, said = trained(model, found_on(model, ROWS), ROWS, tiny_tokenizer, **BATCHES)
        assert logs[0]["sasft/displacement/layer 1"] < 1e-5
        assert logs[0]["sasft/displacement/layer 2"] < 1e-5
        assert said == []

    def test_as_written_out(self, model, tiny_tokenizer):
        features, own = found_on(model, [*ROWS, *make_rows(24, seed=1)]), found_on(model, ROWS)
        logs, said = trained(model, features, ROWS, tiny_tokenizer, **BATCHES)
        counts = torch.zeros(3)
        for row in ROWS:
            if row["language"] != "zh":
                counts[features.languages.index(row["language"])] += sum(label != -100 for label in row["labels"][1:])
        for layer, rows in features.layers.items():
            moved = (counts[:, None] * (own.layers[layer].mean_residual - rows.mean_residual)).sum(0)
            length = (counts * rows.mean_residual.square().sum(1) * counts.sum()).sum().sqrt()
            expected = float(moved.norm() / length)
            assert 0.01 < expected < FAR
            assert logs[0][f"sasft/displacement/layer {layer}"] == pytest.approx(expected, rel=1e-4)
        assert said == []

    def test_another_seed(self, make_model, model, tiny_tokenizer):
        other = found_on(case_model(make_model, seed=1), ROWS)
        logs, said = trained(model, other, ROWS, tiny_tokenizer, **BATCHES, max_steps=2)
        assert logs[0]["sasft/displacement/layer 1"] > FAR
        assert len(said) == 1
        assert "another model's. On layer 1" in said[0]

    def test_drift(self, model, tiny_tokenizer):
        arguments = {**BATCHES, "learning_rate": 0.2, "max_steps": 6, "num_train_epochs": 6}
        logs, said = trained(model, found_on(model, ROWS), ROWS, tiny_tokenizer, **arguments)
        assert logs[0]["sasft/displacement/layer 2"] < 1e-5
        assert logs[-1]["sasft/displacement/layer 2"] > FAR
        assert len(said) == 1
        assert "training has moved the model away from its features" in said[0]

    def test_most_tokens_far_out(self, model, tiny_tokenizer):
        features = found_on(model, ROWS)
        layers = {layer: replace(found, residual_median_norm=1e-3) for layer, found in features.layers.items()}
        rows = [replace(found, mean_residual=found.mean_residual / 1e3) for found in layers.values()]
        features = replace(features, layers=dict(zip(layers, rows, strict=True)))
        logs, said = trained(model, features, ROWS, tiny_tokenizer, **BATCHES)
        assert logs[0]["sasft/displacement/layer 1"] > 100 * FAR
        assert len(said) == 1
        assert "another model's. On layer 1" in said[0]
        assert "have moved the model" in said[0]

    def test_few_tokens_say_nothing(self, model, tiny_tokenizer):
        logs, _ = trained(model, found_on(model, ROWS), make_rows(4), tiny_tokenizer)
        assert not any("displacement" in key for key in logs[0])


@pytest.mark.promise("A penalty that is no number is warned of, also outside of the commands")
def test_weights_that_are_no_number(model, features, tiny_tokenizer):
    broken = copy.deepcopy(model)
    broken.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan
    logs, said = trained(broken, features, make_rows(8), tiny_tokenizer)
    assert math.isnan(logs[0]["sasft/penalty"])
    assert [line for line in said if "its penalty is nan" in line] == said


VALUES = {"penalty": 1.0, "excess/layer 1 zh #5": 0.0, "excess/layer 1 zh #7": 0.5}


def look(*windows, weight=1.0, steps=10):
    """The warnings about the metrics of several logging windows."""
    watch = Watch("SASFTCallback", weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for values in windows:
            watch.look(values, steps)
    return [str(one.message) for one in caught]


@pytest.mark.promise("A penalty that outweighs the loss it is added to is warned of in the first log")
def test_a_weight_that_takes_over():
    (said,) = look({"penalty": 203.0}, {"penalty": 190.0}, weight=0.016)
    assert "its penalty times its weight is 3.25 nats per token" in said
    assert look({"penalty": 203.0}, weight=0.001) == []
    assert look({"penalty": 203.0}, weight=0.0) == []
    assert look({"penalty": 1.0}, {"penalty": 203.0}, weight=0.016) == []


@pytest.mark.promise("A feature that is 0 on all tokens of the first 20 steps is warned of by its name")
class TestIdle:
    def test_a_dead_readout(self):
        (said,) = look(*[VALUES] * 4)
        assert "of its readouts layer 1 zh #5 (1 in all) were 0 at every position in the first 20 steps" in said

    def test_one_that_fires_once(self):
        assert look({**VALUES, "excess/layer 1 zh #5": 1e-9}, *[VALUES] * 3) == []
        assert look({**VALUES, "excess/layer 1 zh #5": 1e-9}, *[{"penalty": 0.0}] * 3) == []

    def test_before_20_steps_and_without_a_weight(self):
        assert look(VALUES) == []
        assert look(*[VALUES] * 4, weight=0.0) == []


@pytest.mark.promise("A training whose hooks are bypassed ends in its first step, with the reason")
class TestBypassedHooks:
    def refused(self, trainer):
        with pytest.raises(RuntimeError, match="The hooks are attached but never ran"):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_a_model_that_was_replaced(self, build, features):
        trainer = build(SASFTCallback(features))
        trainer.model = trainer.model_wrapped = copy.deepcopy(trainer.model)
        for module in trainer.model.modules():
            module._forward_hooks.clear()
        self.refused(trainer)

    def test_a_layer_that_was_replaced(self, build, features):
        trainer = build(SASFTCallback(features))
        trainer.model.model.layers[1] = copy.deepcopy(trainer.model.model.layers[1])
        trainer.model.model.layers[1]._forward_hooks.clear()
        self.refused(trainer)

    @pytest.mark.slow
    def test_a_graph_from_before(self, build, features):
        callback = SASFTCallback(features)
        trainer = build(callback)
        callback.detach()
        trainer.model.compile(backend="eager")
        trainer.train()
        callback.attach(trainer)
        trainer.state.global_step = 0
        self.refused(trainer)
