"""Features token by token: values against a plain forward, and the same groups on a terminal and on a page."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from qscope_posttrain.features.explain.contexts import token_view
from qscope_posttrain.features.explain.explanation import Explanation
from qscope_posttrain.features.find.contrast import find_language_features
from qscope_posttrain.report.html import Section, ShadedText, ShadedTexts, print_shaded, write_html

LINES = ["The river runs past the old mill", "она читает книгу"]


@pytest.fixture(scope="module")
def features(make_model, tiny_tokenizer, texts, saes):
    return find_language_features(make_model(), tiny_tokenizer, texts, saes, top=1)


def activations(model, tokenizer, line, sae, layer):
    seen = []
    handle = model.model.layers[layer].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(input_ids=torch.tensor([tokenizer(line)["input_ids"]]), use_cache=False)
    handle.remove()
    pre = seen[0][0] @ sae.W_enc.T + sae.b_enc
    values, indices = pre.topk(12)
    return pre, torch.zeros_like(pre).scatter_(1, indices, values.relu())


@pytest.mark.parametrize("with_sae", [True, False])
def test_values_are_those_of_a_plain_forward(make_model, tiny_tokenizer, features, saes, with_sae):
    model = make_model()
    groups = token_view(model, tiny_tokenizer, LINES, features, saes if with_sae else None)
    assert len(groups) == len(features)
    found = iter(groups)
    for layer, rows in features.layers.items():
        for feature in rows.feature_ids.tolist():
            group = next(found)
            assert f"layer {layer}" in group.title
            for line, passage in zip(LINES, group.passages, strict=True):
                pre, acts = activations(model, tiny_tokenizer, line, saes[layer], layer)
                column = (acts if with_sae else pre.relu())[:, feature]
                column[0] = 0
                assert "".join(passage.tokens) == line
                assert max(passage.values) == pytest.approx(float(column.max()), rel=1e-4, abs=1e-4)


def test_explanations_are_shown(make_model, tiny_tokenizer, features, saes):
    layer, rows = next(iter(features.layers.items()))
    explained = features.explained([Explanation(layer, int(rows.feature_ids[0]), "cooking words", "me")])
    titles = [group.title for group in token_view(make_model(), tiny_tokenizer, LINES, explained, saes)]
    assert any(title.endswith(": cooking words") for title in titles)


def test_another_model_and_empty_texts_are_refused(make_model, tiny_tokenizer, features):
    with pytest.raises(ValueError, match="does not fit"):
        token_view(make_model(num_hidden_layers=3), tiny_tokenizer, LINES, features)
    with pytest.raises(ValueError, match="without a token"):
        token_view(make_model(), tiny_tokenizer, [""], features)


GROUP = ShadedTexts("layer 1, [bold]#3", [ShadedText(["the ", "[red] ", "soup"], [0.0, 1.0, 4.0])])


def test_terminal_with_and_without_colour(tmp_path):
    plain = Console(file=io.StringIO(), width=60, color_system=None)
    print_shaded(GROUP, plain)
    assert plain.file.getvalue() == "layer 1, [bold]#3\n  the <<[red] >><<soup>>\n"
    coloured = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="truecolor")
    print_shaded(GROUP, coloured)
    shown = coloured.file.getvalue()
    assert "48;2;214;96;32" in shown  # the peak has the deepest colour
    assert "48;2;245;215;199" in shown  # a quarter of the way
    page = write_html(tmp_path / "page.html", "Tokens", [Section("View", shaded=[GROUP])]).read_text()
    assert "--a:1.00" in page
    assert "[red]" in page
