"""Features pooled per text against one forward per text, for each pooling; what is left out; order and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qscope_posttrain.features.text_features import collect_text_features
from qscope_posttrain.models.batches import TokenText
from qscope_posttrain.sae.activations import JumpReLU


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def lines(texts):
    return [line for language in texts for line in texts[language][:6]]


def by_hand(model, tokenizer, line, sae, layer, pooling):
    """(dense pooled activations [d_sae], pooled residual [d_model]) from one whole forward."""
    seen = []
    handle = model.model.layers[layer].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=torch.tensor([tokenizer(line)["input_ids"]]), use_cache=False)
    handle.remove()
    states = seen[0][0, 1:]
    pre = states @ sae.W_enc.T + sae.b_enc
    values, indices = pre.topk(12)
    dense = torch.zeros_like(pre).scatter_(1, indices, values.relu()).double()
    if pooling == "last":
        return dense[-1], states[-1]
    return (dense.amax(0) if pooling == "max" else dense.mean(0)), states.mean(0)


@pytest.mark.parametrize("pooling", ["last", "max", "mean"])
def test_equals_one_forward_per_text(model, tiny_tokenizer, lines, saes, pooling):
    found = collect_text_features(model, tiny_tokenizer, lines, saes, pooling=pooling, residual=True)
    for layer, features in found.items():
        assert len(features) == len(lines)
        dense = torch.from_numpy(features.matrix.todense())
        for number, line in enumerate(lines):
            expected, states = by_hand(model, tiny_tokenizer, line, saes[layer], layer, pooling)
            torch.testing.assert_close(dense[number].double(), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(features.residual[number], states, rtol=1e-4, atol=1e-4)
            row = features.matrix[[number]]
            assert row.indices.tolist() == expected.nonzero().flatten().tolist()
            assert bool((row.data > 0).all())


def test_neither_order_nor_batches_matter(model, tiny_tokenizer, lines, saes):
    options = {"pooling": "max", "max_length": 16}
    forward = collect_text_features(model, tiny_tokenizer, lines, saes, **options)
    backward = collect_text_features(model, tiny_tokenizer, lines[::-1], saes, tokens_per_batch=40, **options)
    for layer in saes:
        dense, reversed_dense = (torch.from_numpy(f[layer].matrix.todense()) for f in (forward, backward))
        torch.testing.assert_close(dense, reversed_dense.flip(0), rtol=1e-4, atol=1e-5)
        assert forward[layer].truncated.tolist() == backward[layer].truncated.flip(0).tolist()


def test_short_and_cut_texts_and_contexts(model, tiny_tokenizer, saes):
    ids = tuple(tiny_tokenizer("a longer text of several words")["input_ids"])
    texts = [ids[:1], ids, TokenText(ids, start=len(ids) - 1)]
    features = collect_text_features(model, tiny_tokenizer, texts, saes, pooling="max", max_length=len(ids))[1]
    assert features.tokens.tolist() == [0, len(ids) - 1, 1]
    assert features.matrix[[0]].nnz == 0
    assert set(features.matrix[[2]].indices.tolist()) <= set(features.matrix[[1]].indices.tolist())
    assert not features.truncated.any()
    cut = collect_text_features(model, tiny_tokenizer, texts[1:2], saes, max_length=len(ids) - 1)[1]
    assert cut.truncated.tolist() == [True]
    assert cut.tokens.tolist() == [len(ids) - 2]


def test_outliers_are_left_out(model, tiny_tokenizer, lines, saes):
    few = collect_text_features(model, tiny_tokenizer, lines, saes, outlier_factor=1.01)[1]
    many = collect_text_features(model, tiny_tokenizer, lines, saes)[1]
    assert int(few.tokens.sum()) < int(many.tokens.sum())


def test_other_activations_have_rows_of_any_width(model, tiny_tokenizer, lines, make_sae):
    sae = make_sae(2, activation=JumpReLU(torch.full((192,), 0.5)))
    features = collect_text_features(model, tiny_tokenizer, lines, {2: sae}, pooling="last")[2]
    assert len(set(np.diff(features.matrix.indptr).tolist())) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"pooling": "sum"}, "pooling must be"), ({"texts": []}, "no texts"), ({"saes": {99: None}}, "99")],
)
def test_refusals(model, tiny_tokenizer, saes, arguments, message):
    options = {"texts": ["some text here"], "saes": saes} | arguments
    with pytest.raises(ValueError, match=message):
        collect_text_features(model, tiny_tokenizer, **options)


def test_given_norms_make_a_text_independent_of_its_neighbours(model, tiny_tokenizer, lines, saes):
    together = collect_text_features(model, tiny_tokenizer, lines, saes, outlier_factor=1.02)
    norms = {layer: features.median_norm for layer, features in together.items()}
    options = {"outlier_factor": 1.02, "median_norms": norms}
    for number, line in enumerate(lines):
        alone = collect_text_features(model, tiny_tokenizer, [line], saes, **options)
        for layer in saes:
            assert alone[layer].matrix.indices.tolist() == together[layer].matrix[[number]].indices.tolist()
            assert alone[layer].median_norm == norms[layer]
    with pytest.raises(ValueError, match="median_norms must have the layers"):
        collect_text_features(model, tiny_tokenizer, lines, saes, median_norms={})
