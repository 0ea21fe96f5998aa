"""Contrastive finding and ranking on one response, against the definition computed text by text."""

from __future__ import annotations

import pytest
import torch

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.find.contrast import (
    find_contrastive_features,
    most_common_tokens,
    rank_response_features,
)
from qscope_posttrain.models.batches import TokenText


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


def activations(model, ids, sae, layer, start=1):
    """Dense activations [tokens, d_sae] of the tokens from `start` on."""
    seen = []
    handle = model.model.layers[layer].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    handle.remove()
    pre = seen[0][0, start:].double() @ sae.W_enc.T.double() + sae.b_enc.double()
    values, indices = pre.topk(12)
    return torch.zeros_like(pre).scatter_(1, indices, values.relu())


@pytest.mark.parametrize("by", ["activation", "firing_rate"])
def test_scores_are_differences_of_token_means(model, tiny_tokenizer, texts, saes, by):
    found = find_contrastive_features(model, tiny_tokenizer, texts["zh"], texts["en"], saes, top=4, by=by)
    for layer, sae in saes.items():
        means = []
        for language in ("zh", "en"):
            encoded = [tiny_tokenizer(line)["input_ids"] for line in texts[language]]
            dense = torch.cat([activations(model, ids, sae, layer) for ids in encoded])
            means.append((dense if by == "activation" else (dense > 0).double()).mean(0))
        expected = (means[0] - means[1]).sort(descending=True)
        rows = found.layers[layer]
        assert set(rows.feature_ids.tolist()) == set(expected.indices[:4].tolist())
        torch.testing.assert_close(rows.scores.double(), expected.values[:4], rtol=1e-3, atol=1e-4)
        assert set(rows.labels) == {"positive"}


def test_common_tokens_do_not_count(model, tiny_tokenizer, texts, saes):
    sets = {"a": texts["en"], "b": texts["fr"]}
    ignored = most_common_tokens(model, tiny_tokenizer, sets, 3)
    assert len(ignored) == 3
    shares = []
    for lines in sets.values():
        ids = [token for line in lines for token in tiny_tokenizer(line)["input_ids"][1:]]
        shares.append({token: ids.count(token) / len(ids) for token in set(ids)})
    both = sorted((min(s.get(token, 0) for s in shares) for token in set(shares[0]) & set(shares[1])), reverse=True)
    assert sorted((min(s[token] for s in shares) for token in ignored), reverse=True) == pytest.approx(both[:3])

    found = find_contrastive_features(model, tiny_tokenizer, texts["en"], texts["fr"], saes, common_tokens=3)
    counted = sum(token not in ignored for line in texts["en"] for token in tiny_tokenizer(line)["input_ids"][1:])
    assert int(found.layers[1].tokens[0]) == counted
    whole = find_contrastive_features(model, tiny_tokenizer, texts["en"], texts["fr"], saes)
    assert int(whole.layers[1].tokens[0]) > counted


@pytest.mark.parametrize("by", ["max", "mean"])
def test_ranking_reads_the_response_alone(model, tiny_tokenizer, saes, by):
    prompt, response = "A question about the river", " and a rather odd answer"
    found = rank_response_features(model, tiny_tokenizer, response, saes, prompt=prompt, by=by, top=3)
    ids, before = (tiny_tokenizer(text)["input_ids"] for text in (prompt + response, prompt))
    start = next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), len(before))
    for layer, sae in saes.items():
        dense = activations(model, ids, sae, layer, start)
        expected = (dense.amax(0) if by == "max" else dense.mean(0)).sort(descending=True)
        rows = found.layers[layer]
        torch.testing.assert_close(rows.scores.double(), expected.values[:3], rtol=1e-3, atol=1e-4)
    assert found.provenance["response"] == response


def test_a_reference_passes_over_what_fires_everywhere(model, tiny_tokenizer, texts, saes):
    plain = rank_response_features(model, tiny_tokenizer, "an odd answer", saes, reference=texts["en"], top=5)
    rates = plain.layers[1].firing_rate[1]
    limit = float(rates.max()) / 2
    ranked = rank_response_features(
        model, tiny_tokenizer, "an odd answer", saes, reference=texts["en"], max_reference_rate=limit, top=3
    )
    assert float(ranked.layers[1].firing_rate[1].max()) <= limit
    assert ranked.layers[1].feature_ids.tolist() != plain.layers[1].feature_ids.tolist()[:3]


def test_sets_are_saved_and_shown(model, tiny_tokenizer, texts, saes, tmp_path):
    found = find_contrastive_features(model, tiny_tokenizer, texts["zh"], texts["en"], saes, names=("zh", "en"))
    again = FeatureSet.load(found.save(tmp_path / "found.safetensors"))
    assert again.settings["selector"] == "contrast"
    assert "difference of mean activation" in again.to_table().caption


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "median"}, "by must be"),
        ({"names": ("a", "a")}, "different names"),
        ({"common_tokens": -1}, "0 or more"),
        ({"top": 9999}, "top must"),
        ({"positive": []}, "no texts"),
    ],
)
def test_contrast_refusals(model, tiny_tokenizer, texts, saes, arguments, message):
    options = {"positive": texts["zh"], "negative": texts["en"], "saes": saes} | arguments
    with pytest.raises(ValueError, match=message):
        find_contrastive_features(model, tiny_tokenizer, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"response": " "}, "empty"),
        ({"by": "sum"}, "by must be"),
        ({"max_reference_rate": 0.5}, "needs reference"),
        ({"max_reference_rate": 0}, "share above 0"),
        ({"top": 150}, "features fire"),
        ({"response": TokenText((1, 2, 3)), "prompt": "text"}, "prompt as text"),
    ],
)
def test_rank_refusals(model, tiny_tokenizer, saes, arguments, message):
    with pytest.raises(ValueError, match=message):
        rank_response_features(model, tiny_tokenizer, **{"response": "an answer", "saes": saes} | arguments)
