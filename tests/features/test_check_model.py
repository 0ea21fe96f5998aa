"""Features recognise the model that they were found on, whatever was done to it, and no other one of its shape."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.testbed.feature_sets import difference_of_means_set
from qscope_posttrain.features.feature_set import SAME_EMBEDDING, FeatureSet
from qscope_posttrain.provenance import embedding_agreement, embedding_sketch, model_identity

SHAPE_ALONE = "fit the model by its shape (weights not compared)"


@pytest.fixture(scope="module")
def features(statistics) -> FeatureSet:
    return difference_of_means_set(statistics, "zh")


def tuned(model, rate):
    """Every weight of the embedding moved by `rate` standard deviations, at random."""
    moved = copy.deepcopy(model)
    weight = moved.get_input_embeddings().weight
    weight.data += rate * weight.data.std() * torch.randn(weight.shape)
    return moved


def trained(model, rate, steps=200):
    """From its random start to a small loss, every weight."""
    made = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(3, 500, (32, 16), generator=draw)
    optimizer = torch.optim.AdamW(made.parameters(), lr=rate)
    for step in range(steps):
        batch = texts[step % 4 * 8 : step % 4 * 8 + 8]
        made(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made


def resized(model, vocabulary):
    changed = copy.deepcopy(model)
    changed.resize_token_embeddings(vocabulary, mean_resizing=False)
    return changed


def with_lora(model, **options):
    return get_peft_model(copy.deepcopy(model), LoraConfig(r=2, **options))


TRAINS_LONG = "trained from its start"
SAME = {
    "itself": lambda model: model,
    "bf16": lambda model: copy.deepcopy(model).bfloat16(),
    "fp16": lambda model: copy.deepcopy(model).half(),
    "more tokens": lambda model: resized(model, 555),
    "fewer tokens": lambda model: resized(model, 480),
    "compiled": torch.compile,
    "fine-tuned": lambda model: tuned(model, 0.1),
    "much fine-tuned": lambda model: tuned(model, 0.7),
    TRAINS_LONG: lambda model: trained(model, 3e-3),
    "lora": lambda model: with_lora(model, target_modules=["q_proj"]),
    "lora on the embedding": lambda model: with_lora(model, target_modules=["embed_tokens"]),
    "embedding trained beside": lambda model: with_lora(
        model, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    ),
    "tokens trained": lambda model: with_lora(model, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
}


@pytest.mark.parametrize(
    "change", [pytest.param(name, marks=pytest.mark.slow) if name == TRAINS_LONG else name for name in SAME]
)
def test_the_same_model_fits(features, make_model, change, tmp_path):
    loaded = FeatureSet.load(features.save(tmp_path / "features.safetensors"))
    assert loaded.check_model(SAME[change](make_model())) == "fit the model"


@pytest.mark.promise(
    "A penalty that stays 0, features of another model and a layer that never fires are not passed over in silence"
)
@pytest.mark.parametrize("seed", range(1, 9))
def test_another_model_of_the_same_shape_is_refused(features, make_model, seed):
    with pytest.raises(ValueError, match=r"shape is the same.* agree to -?0\.[01].*Find the features on this model"):
        features.check_model(make_model(seed=seed))


def test_where_there_are_no_weights_the_shape_alone_is_compared(features, make_model):
    with torch.device("meta"):
        assert features.check_model(make_model()) == SHAPE_ALONE
        with pytest.raises(ValueError, match="num_hidden_layers"):
            features.check_model(make_model(num_hidden_layers=3))
    gathered = make_model()
    gathered.get_input_embeddings().weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    assert features.check_model(gathered) == SHAPE_ALONE
    old = replace(features, model={key: value for key, value in features.model.items() if key != "embedding"})
    assert old.check_model(make_model(seed=1)) == SHAPE_ALONE
    quantised = make_model()
    quantised.set_input_embeddings(torch.ao.nn.quantized.Embedding(512, quantised.config.hidden_size))
    assert features.check_model(quantised) == SHAPE_ALONE  # its weight is a method
    empty = make_model()
    empty.get_input_embeddings().weight.data.zero_()
    assert embedding_sketch(empty) is None


def test_rows_that_share_a_direction_do_not_make_models_alike(make_model):
    """Embeddings of trained models have a common mean and a few large dimensions."""
    models = [make_model(seed=seed) for seed in (0, 1)]
    for model in models:
        model.get_input_embeddings().weight.data[:, :3] += 2.0
    sketch = embedding_sketch(models[0])
    assert embedding_agreement(sketch, models[0]) == pytest.approx(1.0, abs=1e-9)
    assert abs(embedding_agreement(sketch, models[1])) < 0.2


@pytest.mark.parametrize("kind", ["frequent tokens", "unused tokens"])
def test_what_is_alike_in_all_models_does_not_make_them_alike(make_model, kind):
    """A direction of frequent tokens, another one in each model; tokens of no meaning, the same ones in all."""
    draw = torch.Generator().manual_seed(0)
    models = [make_model(seed=seed) for seed in range(12)]
    for model in models:
        weight = model.get_input_embeddings().weight.data
        if kind == "frequent tokens":
            direction = 0.1 * torch.randn(weight.shape[1], generator=draw)
            weight += torch.linspace(1, -1, len(weight))[:, None] * direction
        else:
            weight[len(weight) // 10 :] = 0.0
    sketch = embedding_sketch(models[0])
    assert embedding_agreement(sketch, models[0]) == pytest.approx(1.0, abs=1e-9)
    assert max(embedding_agreement(sketch, other) for other in models[1:]) < 0.8 * SAME_EMBEDDING


@pytest.mark.parametrize("sketch", [None, {}, {"rows": 0, "sketch": ""}, {"rows": 512, "sketch": "AAAA"}])
def test_a_damaged_sketch_is_named(features, make_model, sketch):
    damaged = replace(features, model={**features.model, "embedding": sketch})
    with pytest.raises(ValueError, match="sketch of the embedding is damaged"):
        damaged.check_model(make_model())


def test_the_sketch_is_small(make_model):
    assert len(str(model_identity(make_model())["embedding"])) < 800
