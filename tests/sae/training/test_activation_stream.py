from __future__ import annotations

import pytest
import torch

from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.sae.training.activation_stream import ActivationStream
from qscope_posttrain.sae.training.config import StreamConfig
from qscope_posttrain.sae.training.text_stream import list_source

SMALL = StreamConfig(
    context_length=16, block_tokens=128, forward_tokens=48, buffer_dtype="float32", calibration_tokens=64
)


@pytest.fixture(scope="module")
def documents(texts):
    return [line for lines in texts.values() for line in lines]


def make(model, tokenizer, documents, config=SMALL, layers=(1, 2), batch_tokens=32):
    return ActivationStream(model, tokenizer, list_source(documents), layers, config, batch_tokens)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


def test_batches_are_the_activations_of_the_text_each_once(model, tiny_tokenizer, documents):
    """Against every document read alone, in pieces as long as the stream has them."""
    stream = make(model, tiny_tokenizer, documents)
    stream.fill()
    batches = [stream.batch(2, update) for update in range(stream.updates_per_block)]
    assert stream.updates_per_block == 4
    assert all(len(batch.rows) == batch.tokens for batch in batches)
    sizes = [batch.tokens for batch in batches]
    assert max(sizes) - min(sizes) <= 1
    expected, room, read = [], 16, 0
    for document in documents:
        ids = tiny_tokenizer(document)["input_ids"]
        while ids and read < 128:
            piece, ids = ids[:room], ids[room:]
            expected.append(forward_to_layer(model, [2], input_ids=torch.tensor([piece]))[2][0, 1:])
            room, read = (room - len(piece)) or 16, read + len(piece)
    found, wanted = torch.cat([batch.rows for batch in batches]), torch.cat(expected)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found[found[:, 0].argsort()], wanted[wanted[:, 0].argsort()], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[:16], wanted[:16], atol=1e-3), "the order is permuted"


def test_a_block_can_be_read_again_bit_by_bit(model, tiny_tokenizer, documents):
    stream = make(model, tiny_tokenizer, documents)
    stream.fill()
    stream.fill()
    again = make(model, tiny_tokenizer, documents)
    again.medians = stream.medians
    again.go_to(1, stream.start)
    again.fill()
    for layer in (1, 2):
        for update in range(4):
            assert torch.equal(stream.batch(layer, update).rows, again.batch(layer, update).rows)
    assert stream.end == again.end


def test_outliers_are_left_out_and_counted(model, tiny_tokenizer, documents):
    config = StreamConfig(**{**vars(SMALL), "outlier_factor": 1.1})
    stream = make(model, tiny_tokenizer, documents, config)
    stream.fill()
    kept = torch.cat([stream.batch(1, update).rows for update in range(4)])
    plain = make(model, tiny_tokenizer, documents)
    plain.fill()
    everything = torch.cat([plain.batch(1, update).rows for update in range(4)])
    inside = everything.norm(dim=1) <= 1.1 * stream.medians[1]
    assert 0 < stream.left_out[1] == int((~inside).sum())
    assert len(kept) == int(inside.sum())
    assert kept.norm(dim=1).max() <= 1.1 * stream.medians[1]


def test_calibration_rows_are_of_the_first_sequences(model, tiny_tokenizer, documents):
    stream = make(model, tiny_tokenizer, documents)
    stream.fill()
    assert 40 < len(stream.calibration_rows(1)) < 64
    norms = stream.calibration_rows(1).norm(dim=1)
    assert stream.medians[1] == pytest.approx(float(norms.sort().values[(len(norms) - 1) // 2]), rel=1e-5)


def test_broken_activations_are_refused(make_model, tiny_tokenizer, documents):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 2.*(NaN|median norm nan)"):
        make(model, tiny_tokenizer, documents, layers=[2]).fill()
    stream = make(model, tiny_tokenizer, documents, layers=[2])
    stream.medians = {2: 1.0}
    with pytest.raises(ValueError, match=r"layer 2: \d+ of \d+ residual vectors hold NaN or infinite"):
        stream.fill()


def test_a_model_that_cannot_isolate_documents_is_told_apart(make_model, tiny_tokenizer, documents):
    """Layers that carry a state along the sequence do not look at positions."""
    model = make_model("qwen3_5_text", layer_types=["linear_attention"] * 3 + ["full_attention"])
    with pytest.raises(ValueError, match="choose packing: separate"):
        make(model, tiny_tokenizer, documents).fill()
    separate = make(model, tiny_tokenizer, documents, StreamConfig(**{**vars(SMALL), "packing": "separate"}))
    separate.fill()
    ids = tiny_tokenizer(documents[0])["input_ids"][:16]
    alone = forward_to_layer(model, [1], input_ids=torch.tensor([ids]))[1][0, 1:]
    found = torch.cat([separate.batch(1, update).rows for update in range(4)])
    assert (found[:, None] - alone[None]).norm(dim=2).amin(dim=0).max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "batch", "says"),
    [
        ({"max_buffer_gib": 1e-6}, 32, "more than max_buffer_gib"),
        ({}, 256, "holds no batch of 256"),
        ({"context_length": 1024, "block_tokens": 1024}, 32, "only 512 positions"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_start(model, tiny_tokenizer, documents, settings, batch, says):
    with pytest.raises(ValueError, match=says):
        make(model, tiny_tokenizer, documents, StreamConfig(**{**vars(SMALL), **settings}), batch_tokens=batch)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"packing": "mixed"}, "packing must be one of"),
        ({"context_length": 1}, "context_length must be an integer from 2"),
        ({"block_tokens": 100}, "less than a sequence"),
        ({"buffer_dtype": "int8"}, "buffer_dtype must be one of"),
        ({"outlier_factor": 0.0}, "outlier_factor must be above 0"),
    ],
)
def test_bad_stream_settings(settings, says):
    with pytest.raises(ValueError, match=says):
        StreamConfig(**settings)
