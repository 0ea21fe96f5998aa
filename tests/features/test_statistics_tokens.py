"""Texts as token ids: the same sums as the strings they encode, and context that is read but does not count."""

from __future__ import annotations

import pytest
import torch

from qscope_posttrain.features.pass_checkpoint import sequence_fingerprint
from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.models.batches import TokenText, describe_text, tokenize_texts

SUMS = ("tokens", "outliers", "residual_sum", "residual_second_moment", "activation_sum", "firing_count")


def as_ids(tokenizer, texts):
    return {language: [tokenizer(line)["input_ids"] for line in lines] for language, lines in texts.items()}


def test_ids_give_the_sums_of_the_strings(make_model, tiny_tokenizer, texts, saes, statistics):
    found = collect_statistics(make_model(), tiny_tokenizer, as_ids(tiny_tokenizer, texts), saes)
    mixed = {
        language: [TokenText(tuple(tiny_tokenizer(lines[0])["input_ids"])), *lines[1:]]
        for language, lines in texts.items()
    }
    for other in (found, collect_statistics(make_model(), tiny_tokenizer, mixed, saes)):
        assert torch.equal(other.texts, statistics.texts)
        assert torch.equal(other.skipped, statistics.skipped)
        for layer in saes:
            for name in SUMS:
                assert torch.equal(getattr(other.layers[layer], name), getattr(statistics.layers[layer], name)), name


def test_only_tokens_from_the_start_on_count(make_model, tiny_tokenizer, texts, saes):
    """The sums from a later start on, and those of the skipped part, add up to the whole."""
    ids = {name: [tuple(line) for line in lines] for name, lines in as_ids(tiny_tokenizer, texts).items()}
    starts = {name: [1 + 3 * number for number in range(len(lines))] for name, lines in ids.items()}
    late = {name: [TokenText(i, s) for i, s in zip(ids[name], starts[name], strict=True)] for name in ids}
    found = collect_statistics(make_model(), tiny_tokenizer, late, saes, tokens_per_batch=64, outlier_factor=1e6)
    whole = collect_statistics(make_model(), tiny_tokenizer, ids, saes, outlier_factor=1e6)
    assert found.skipped.tolist() == [sum(values) for values in starts.values()]
    # Under causal attention the beginning of a text does not depend on what follows, so it can be read by itself.
    first = {name: [i[:s] for i, s in zip(ids[name], starts[name], strict=True)] for name in ids}
    skipped = collect_statistics(make_model(), tiny_tokenizer, first, saes, outlier_factor=1e6)
    for layer in saes:
        for name in ("tokens", "residual_sum", "activation_sum"):
            parts = getattr(found.layers[layer], name) + getattr(skipped.layers[layer], name)
            torch.testing.assert_close(parts, getattr(whole.layers[layer], name), rtol=1e-4, atol=1e-2)


def test_what_is_cut_before_its_start_does_not_count(tiny_tokenizer):
    long, short = TokenText(tuple(range(10)), 8), TokenText((1, 2, 3), 1)
    sequences = tokenize_texts(tiny_tokenizer, {"a": [long, short]}, 6)
    assert [(s.counted, s.truncated) for s in sequences] == [(0, True), (2, False)]
    with pytest.raises(ValueError, match="before token 6"):
        tokenize_texts(tiny_tokenizer, {"a": [long]}, 6)


def test_fingerprints_know_the_start(tiny_tokenizer):
    prints = set()
    for start in (1, 2):
        sequences = tokenize_texts(tiny_tokenizer, {"a": [TokenText((5, 6, 7), start)]}, 8)
        prints |= {sequence_fingerprint(sequences, ["a"]), describe_text(TokenText((5, 6, 7), start))}
    assert len(prints) == 4
    assert describe_text([5, 6, 7]) == describe_text(TokenText((5, 6, 7)))
    assert describe_text("5 6 7") == "5 6 7"


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ([[1, "b"]], TypeError, "'b' in it"),
        ([b"ab"], TypeError, "got bytes"),
        ([5], TypeError, "got int"),
        ([[1, -2]], ValueError, "negative"),
    ],
)
def test_wrong_texts(tiny_tokenizer, wrong, error, message):
    with pytest.raises(error, match=message):
        tokenize_texts(tiny_tokenizer, {"a": wrong}, 8)


@pytest.mark.parametrize("start", [0, 3])
def test_wrong_start(start):
    with pytest.raises(ValueError, match="start must lie"):
        TokenText((1, 2, 3), start)
