"""Contexts of features against brute force over every text, whatever the order and the batches."""

from __future__ import annotations

import random

import pytest
import torch

from qscope_posttrain.features.explain.contexts import ContextSettings, collect_contexts, marked, text_pieces

SETTINGS = ContextSettings(top=3, sampled=6, absent=8, window=6, before=4)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def lines(texts):
    words = [word for language in ("en", "fr") for line in texts[language] for word in line.split()]
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=draw.randint(2, 9))) for _ in range(60)]


@pytest.fixture(scope="module")
def dense(model, tiny_tokenizer, lines, saes):
    """{layer: [activations [tokens, d_sae] of each text]}, the first token's set to 0, one forward a text."""
    found = {layer: [] for layer in saes}
    for line in lines:
        seen = {}
        handles = [
            model.model.layers[layer].register_forward_hook(lambda m, a, out, at=layer, to=seen: to.update({at: out}))
            for layer in saes
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([tiny_tokenizer(line)["input_ids"]]), use_cache=False)
        for handle in handles:
            handle.remove()
        for layer, sae in saes.items():
            values, indices = (seen[layer][0] @ sae.W_enc.T + sae.b_enc).topk(12)
            acts = torch.zeros(len(values), sae.d_sae).scatter_(1, indices, values.relu())
            acts[0] = 0
            found[layer].append(acts)
    return found


@pytest.fixture(scope="module")
def chosen(dense):
    """Features that fire on some texts but not on most, and one that never fires."""
    found = {}
    for layer, acts in dense.items():
        rates = torch.stack([act.amax(0) > 0 for act in acts]).float().mean(0)
        often = ((rates > 0.2) & (rates < 0.8)).nonzero().flatten().tolist()[:3]
        never = (rates == 0).nonzero().flatten().tolist()[:1]
        found[layer] = often + never
    assert all(len(ids) == 4 for ids in found.values())
    return found


def collect(model, tokenizer, lines, saes, chosen, **options):
    return collect_contexts(model, tokenizer, lines, saes, chosen, SETTINGS, outlier_factor=1e9, **options)


def test_top_contexts_are_those_of_brute_force(model, tiny_tokenizer, lines, saes, dense, chosen):
    found = collect(model, tiny_tokenizer, lines, saes, chosen)
    assert [(entry.layer, entry.feature_id) for entry in found] == [(la, f) for la in chosen for f in chosen[la]]
    for entry in found:
        peaks = torch.stack([acts[:, entry.feature_id].amax() for acts in dense[entry.layer]])
        assert entry.firing_texts == int((peaks > 0).sum())
        assert entry.texts == len(lines)
        best = peaks.sort(descending=True).values[: min(3, entry.firing_texts)]
        torch.testing.assert_close(torch.tensor([c.peak for c in entry.top]), best, rtol=1e-4, atol=1e-4)
        for context in (*entry.top, *entry.sampled, *entry.absent):
            ids = tiny_tokenizer(lines[context.text])["input_ids"]
            starts = [s for s in range(len(ids)) if tuple(ids[s : s + len(context.ids)]) == context.ids]
            assert len(context.ids) == min(6, len(ids))
            values = torch.tensor(context.values)
            column = dense[entry.layer][context.text][:, entry.feature_id]
            assert any(torch.allclose(values, column[s : s + len(values)], rtol=1e-4, atol=1e-4) for s in starts)
            assert (context.peak > 0) == (context not in entry.absent)


def test_what_is_drawn_is_distinct_and_bounded(model, tiny_tokenizer, lines, saes, chosen):
    for entry in collect(model, tiny_tokenizer, lines, saes, chosen):
        for contexts, most in ((entry.top, 3), (entry.sampled, 6)):
            assert len(contexts) == min(most, entry.firing_texts)
            assert len({context.text for context in contexts}) == len(contexts)
        assert len(entry.absent) == 8


def test_neither_order_nor_batches_nor_copies_matter(model, tiny_tokenizer, lines, saes, chosen):
    def content(found, names):
        return [
            [[(names[c.text], c.ids) for c in part] for part in (entry.top, entry.sampled, entry.absent)]
            for entry in found
        ]

    once = collect(model, tiny_tokenizer, lines, saes, chosen)
    mixed = lines[::-1] + lines[:7]
    again = collect(model, tiny_tokenizer, mixed, saes, chosen, tokens_per_batch=30)
    assert content(once, lines) == content(again, mixed)
    assert [entry.texts for entry in once] == [entry.texts for entry in again]


@pytest.mark.slow
def test_the_draw_is_uniform(model, tiny_tokenizer, lines, saes, chosen):
    """Over many seeds every text on which a feature fires is drawn about equally often."""
    layer = next(iter(chosen))
    feature = chosen[layer][0]
    counts, draws = torch.zeros(len(lines)), 0
    for seed in range(40):
        settings = ContextSettings(top=1, sampled=6, absent=1, window=6, before=4, seed=seed)
        (entry,) = collect_contexts(model, tiny_tokenizer, lines, saes, {layer: [feature]}, settings)
        for context in entry.sampled:
            counts[context.text] += 1
            draws += 1
    firing = counts > 0
    expected = draws / entry.firing_texts
    chi_squared = float(((counts[firing] - expected) ** 2 / expected).sum())
    assert int(firing.sum()) == entry.firing_texts
    assert chi_squared < 2 * entry.firing_texts


@pytest.mark.parametrize(
    ("ids", "message"),
    [({2: [0]}, "no SAE"), ({1: [0, 0]}, "distinct"), ({1: [192]}, "0 to 191"), ({1: []}, "distinct")],
)
def test_mistakes(model, tiny_tokenizer, lines, saes, ids, message):
    with pytest.raises(ValueError, match=message):
        collect_contexts(model, tiny_tokenizer, lines, saes, ids)


def test_mistaken_settings():
    with pytest.raises(ValueError, match="before"):
        ContextSettings(window=4, before=4)
    with pytest.raises(ValueError, match="at least 1"):
        ContextSettings(top=0)


@pytest.mark.parametrize("language", ["en", "zh", "ko", "ru"])
def test_pieces_joined_are_the_text(tiny_tokenizer, texts, language):
    for line in texts[language]:
        ids = tiny_tokenizer(line + " é 🙂")["input_ids"]
        values = [float(n % 3 == 2) for n in range(len(ids))]
        for start in (0, 1, 3):
            pieces, found = text_pieces(tiny_tokenizer, ids[start:], values[start:])
            assert "".join(pieces) == tiny_tokenizer.decode(ids[start:])
            assert max(found) == 1.0
            assert marked(pieces, found).replace("<<", "").replace(">>", "") == "".join(pieces)


def test_marks_enclose_runs():
    assert marked(["a", "b", "c", "d"], [0, 1, 2, 0]) == "a<<bc>>d"
    assert marked(["a", "b"], [0, 1]) == "a<<b>>"
