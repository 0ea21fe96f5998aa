"""The streaming pass against dense loops in fp64, and its independence of order, batches and padding."""

from __future__ import annotations

import random

import pytest
import torch

from qscope_posttrain.features import sums
from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.features.sums import LayerSums
from qscope_posttrain.models import calibration
from qscope_posttrain.models.calibration import LanguageRows
from qscope_posttrain.sae.activations import JumpReLU, ReLU, TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

SUMS = ("residual_sum", "residual_second_moment", "activation_sum", "firing_count", "tokens", "outliers")


def residuals(model, layer: int, ids: list[int]) -> torch.Tensor:
    """Output of one decoder layer for one unpadded text, read by a hook of the test's own."""
    kept = []

    def keep(module, args, output):
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = model.model.layers[layer].register_forward_hook(keep)
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return kept[0][0].double()


def dense_top_k(sae, h: torch.Tensor) -> torch.Tensor:
    """Post-activations [d_sae] of one token, written out."""
    pre = sae.W_enc.double() @ h + sae.b_enc.double()
    dense = torch.zeros_like(pre)
    for index in pre.argsort(descending=True)[: sae.activation.k]:
        dense[index] = max(float(pre[index]), 0.0)
    return dense


def oracle(model, tokenizer, texts, sae, layer: int, factor: float = 10.0) -> dict[str, torch.Tensor]:
    """The same sums by loops over single tokens. The calibration sample is all tokens, because they are few."""
    tokens = {
        language: [residuals(model, layer, tokenizer(line)["input_ids"])[1:] for line in lines]
        for language, lines in texts.items()
    }
    everything = torch.cat([part for parts in tokens.values() for part in parts])
    limit = factor * everything.norm(dim=1).sort().values[(len(everything) - 1) // 2]
    rows = {name: [] for name in (*SUMS, "pre")}
    for parts in tokens.values():
        counted = [h for part in parts for h in part if h.norm() <= limit]
        codes = torch.stack([dense_top_k(sae, h) for h in counted])
        rows["tokens"].append(torch.tensor(len(counted)))
        rows["outliers"].append(torch.tensor(sum(len(part) for part in parts) - len(counted)))
        rows["residual_sum"].append(sum(counted))
        rows["residual_second_moment"].append(sum(torch.outer(h, h) for h in counted))
        rows["activation_sum"].append(codes.sum(0))
        rows["firing_count"].append((codes > 0).sum(0))
        rows["pre"].append(torch.stack([sae.W_enc.double() @ h + sae.b_enc.double() for h in counted]).mean(0))
    return {name: torch.stack(values) for name, values in rows.items()}


def assert_same_sums(found, expected, rtol: float, atol: float = 0.0) -> None:
    for layer in expected.layers:
        for name in SUMS:
            torch.testing.assert_close(
                getattr(found.layers[layer], name), getattr(expected.layers[layer], name), rtol=rtol, atol=atol
            )


@pytest.mark.promise(
    "Sums and statistics of the feature pass equal dense loops, in any order of texts and any size of batch"
)
def test_sums_equal_dense_loops(make_model, tiny_tokenizer, texts, saes, statistics):
    model = make_model()
    for layer, sae in saes.items():
        expected, found = oracle(model, tiny_tokenizer, texts, sae, layer), statistics.layers[layer]
        assert torch.equal(found.tokens, expected["tokens"])
        assert torch.equal(found.outliers, expected["outliers"])
        assert torch.equal(found.firing_count, expected["firing_count"])
        for name in ("residual_sum", "residual_second_moment", "activation_sum"):
            torch.testing.assert_close(getattr(found, name), expected[name], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.moments(sae.W_enc, sae.b_enc)[0], expected["pre"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.firing_rate, expected["firing_count"] / expected["tokens"][:, None])


def test_first_tokens_and_norm_outliers_are_left_out_and_counted(make_model, tiny_tokenizer, texts, make_sae):
    model, sae = make_model(), make_sae(2)
    frequent = tiny_tokenizer(" the")["input_ids"][0]
    with torch.no_grad():
        model.model.embed_tokens.weight[frequent] *= 3000  # the residual stream keeps the norm of the embedding
    expected = oracle(model, tiny_tokenizer, texts, sae, 2)
    assert expected["outliers"].sum() > 0, "the test needs outliers"
    found = collect_statistics(model, tiny_tokenizer, texts, {2: sae})
    assert torch.equal(found.layers[2].outliers, expected["outliers"])
    assert torch.equal(found.layers[2].tokens, expected["tokens"])
    for name in ("activation_sum", "residual_sum", "residual_second_moment"):
        torch.testing.assert_close(getattr(found.layers[2], name), expected[name], rtol=1e-4, atol=1e-3)
    assert found.texts.tolist() == [len(lines) for lines in texts.values()]


@pytest.mark.promise(
    "Sums and statistics of the feature pass equal dense loops, in any order of texts and any size of batch"
)
def test_order_of_texts_does_not_matter(make_model, tiny_tokenizer, texts, saes, statistics):
    shuffled = {language: random.Random(1).sample(lines, len(lines)) for language, lines in texts.items()}
    assert_same_sums(collect_statistics(make_model(), tiny_tokenizer, shuffled, saes), statistics, rtol=1e-12)


def test_order_of_languages_only_permutes_the_rows(make_model, tiny_tokenizer, texts, saes, statistics):
    turned = dict(reversed(texts.items()))
    found = collect_statistics(make_model(), tiny_tokenizer, turned, saes)
    assert found.languages == tuple(reversed(statistics.languages))
    for layer in saes:
        flipped = found.layers[layer].activation_sum.flip(0)
        torch.testing.assert_close(flipped, statistics.layers[layer].activation_sum, rtol=1e-6, atol=1e-5)


@pytest.mark.promise(
    "Sums and statistics of the feature pass equal dense loops, in any order of texts and any size of batch"
)
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "qwen3_moe", "qwen3_5_text"])
def test_batch_size_and_padding_do_not_matter(architecture, make_model, tiny_tokenizer, texts, make_sae):
    model, sae = make_model(architecture), {1: make_sae(1)}
    one_by_one = collect_statistics(model, tiny_tokenizer, texts, sae, tokens_per_batch=1)
    for tokens_per_batch in (100, 4096):
        found = collect_statistics(model, tiny_tokenizer, texts, sae, tokens_per_batch=tokens_per_batch)
        torch.testing.assert_close(
            found.layers[1].residual_sum, one_by_one.layers[1].residual_sum, rtol=1e-4, atol=1e-3
        )
        torch.testing.assert_close(
            found.layers[1].activation_sum, one_by_one.layers[1].activation_sum, rtol=1e-3, atol=0.05
        )
        assert torch.equal(found.layers[1].tokens, one_by_one.layers[1].tokens)


def test_calibration_sample_is_the_same_for_any_order_and_smaller_than_the_data(
    make_model, tiny_tokenizer, texts, saes, monkeypatch
):
    monkeypatch.setattr(calibration, "CALIBRATION_TOKENS", 100)
    medians = []
    for seed in (0, 1):
        shuffled = {language: random.Random(seed).sample(lines, len(lines)) for language, lines in texts.items()}
        found = collect_statistics(make_model(), tiny_tokenizer, shuffled, saes)
        medians.append(found.layers[3].median_norm)
    assert medians[0] == medians[1]
    monkeypatch.undo()
    everything = collect_statistics(make_model(), tiny_tokenizer, texts, saes)
    assert medians[0] == pytest.approx(everything.layers[3].median_norm, rel=0.3)
    assert medians[0] != everything.layers[3].median_norm


def test_long_texts_are_cut(make_model, tiny_tokenizer, texts):
    found = collect_statistics(make_model(), tiny_tokenizer, texts, {0: None}, max_length=8)
    assert found.layers[0].tokens.tolist() == [4 * 7] * 5
    assert found.layers[0].activation_sum is None


def test_texts_are_cut_at_the_positions_of_the_model(make_model, tiny_tokenizer, texts):
    found = collect_statistics(make_model(max_position_embeddings=16), tiny_tokenizer, texts, {0: None})
    assert found.settings["max_length"] == 16


@pytest.mark.parametrize("activation", [TopK(12, "signed"), TopK(12, "relu_before"), JumpReLU(torch.full((192,), 2.0))])
def test_other_activations_and_padding_entries(activation, make_model, tiny_tokenizer, texts, make_sae):
    sae = make_sae(1, activation=activation)
    found = collect_statistics(make_model(), tiny_tokenizer, texts, {1: sae}).layers[1]
    h = torch.cat([residuals(make_model(), 1, tiny_tokenizer(line)["input_ids"])[1:] for line in texts["zh"]]).float()
    values, indices = sae.encode(h)
    dense = torch.zeros(len(h), sae.d_sae).scatter_add_(1, indices.long(), values)
    torch.testing.assert_close(found.activation_sum[2], dense.sum(0).double(), rtol=1e-4, atol=1e-3)
    assert torch.equal(found.firing_count[2], (dense > 0).sum(0))


@pytest.mark.promise(
    "Sums and statistics of the feature pass equal dense loops, in any order of texts and any size of batch"
)
def test_moments_equal_an_explicit_covariance(make_model, tiny_tokenizer, texts, saes, statistics):
    generator = torch.Generator().manual_seed(5)
    rows, bias = torch.randn(3, 64, generator=generator), torch.randn(3, generator=generator)
    mean, covariance = statistics.layers[3].moments(rows, bias)
    for index, lines in enumerate(texts.values()):
        h = torch.cat([residuals(make_model(), 3, tiny_tokenizer(line)["input_ids"])[1:] for line in lines])
        f = h @ rows.double().T + bias.double()
        torch.testing.assert_close(mean[index], f.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(covariance[index], torch.cov(f.T, correction=0), rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was(make_model, tiny_tokenizer, texts):
    model = make_model(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    collect_statistics(model, tiny_tokenizer, texts, {1: None})
    assert model.training
    assert model.model.layers[1].mlp.training
    assert not model.model.layers[0].training
    assert all(not layer._forward_hooks for layer in model.model.layers)


def test_deeper_layers_and_the_head_never_run(make_model, tiny_tokenizer, texts):
    model = make_model()
    calls = []
    for module in (model.model.layers[2], model.model.norm, model.lm_head):
        module.register_forward_hook(lambda *_: calls.append(1))
    collect_statistics(model, tiny_tokenizer, texts, {0: None, 1: None})
    assert not calls


class TestErrors:
    @pytest.mark.parametrize(
        ("texts", "error", "message"),
        [
            (["a"], TypeError, "mapping"),
            ({}, ValueError, "at least one language"),
            ({"en": []}, ValueError, "'en' has no texts"),
            ({"en": "one string"}, TypeError, "list of strings"),
            ({"en": ["fine", 3]}, TypeError, "got int"),
            ({"en": ["", ""]}, ValueError, "no text of at least two tokens"),
        ],
    )
    def test_texts(self, texts, error, message, make_model, tiny_tokenizer):
        with pytest.raises(error, match=message):
            collect_statistics(make_model(), tiny_tokenizer, texts, {0: None})

    def test_tokenizer(self, make_model, texts):
        with pytest.raises(TypeError, match="tokenizer"):
            collect_statistics(make_model(), None, texts, {0: None})
        with pytest.raises(TypeError, match="no input_ids"):
            collect_statistics(make_model(), lambda lines, verbose: {"ids": lines}, texts, {0: None})

    def test_layer_out_of_range(self, make_model, tiny_tokenizer, texts):
        with pytest.raises(ValueError, match="0 to 3"):
            collect_statistics(make_model(), tiny_tokenizer, texts, {4: None})

    def test_sae_of_another_width_or_layer(self, make_model, tiny_tokenizer, texts, make_sae):
        with pytest.raises(ValueError, match=r"d_model 32.*hidden size is 64"):
            collect_statistics(make_model(), tiny_tokenizer, texts, {1: make_sae(1, d_model=32)})
        with pytest.raises(ValueError, match="layer 2 was trained on layer 1"):
            collect_statistics(make_model(), tiny_tokenizer, texts, {2: make_sae(1)})

    def test_sums_beyond_the_budget(self, make_model, tiny_tokenizer, texts, saes):
        with pytest.raises(ValueError, match="second_moments=False"):
            collect_statistics(make_model(), tiny_tokenizer, texts, saes, max_sums_gib=1e-4)
        collect_statistics(make_model(), tiny_tokenizer, texts, {1: None}, second_moments=False, max_sums_gib=1e-4)

    def test_a_language_of_outliers_only(self, make_model, tiny_tokenizer, texts):
        model = make_model()
        letter = tiny_tokenizer("x")["input_ids"][0]
        with torch.no_grad():
            model.model.embed_tokens.weight[letter] *= 3000
        with pytest.raises(ValueError, match="'xx' was left out as a norm outlier"):
            collect_statistics(model, tiny_tokenizer, {**texts, "xx": ["xxx"]}, {1: None})

    def test_a_broken_model(self, make_model, tiny_tokenizer, texts):
        model = make_model()
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="the model is broken"):
            collect_statistics(model, tiny_tokenizer, texts, {1: None})

    def test_activations_without_an_sae(self, make_model, tiny_tokenizer, texts):
        found = collect_statistics(make_model(), tiny_tokenizer, texts, {1: None})
        with pytest.raises(ValueError, match="No SAE was given"):
            _ = found.layers[1].mean_activation


@pytest.mark.parametrize("activation", [ReLU(), TopK(4)])
def test_wide_codes_are_encoded_by_tiles(activation, monkeypatch):
    """Of a ReLU dictionary any latent may fire: never more than `CODE_ENTRIES` entries are made at a time."""
    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(64, 16, generator=generator)
    sae = SparseAutoencoder(encoder, torch.zeros(64), encoder.clone(), torch.zeros(16), activation)
    rows = torch.randn(50, 16, generator=generator)
    rows[7] = 1e4  # a norm outlier
    groups = [LanguageRows(0, 0, 20), LanguageRows(2, 20, 33), LanguageRows(0, 33, 50)]
    seen, encode = [], SparseAutoencoder.encode
    monkeypatch.setattr(SparseAutoencoder, "encode", lambda sae, x: seen.append(len(x)) or encode(sae, x))

    def summed():
        sums = LayerSums.zeros(3, 16, sae, False, torch.device("cpu"))
        sums.add(rows, groups, 1e3, sae)
        return sums.tensors()

    whole = summed()
    assert seen == [50]
    monkeypatch.setattr(sums, "CODE_ENTRIES", 640)
    tiled = summed()
    assert seen[1:] == ([10] * 5 if isinstance(activation, ReLU) else [50])
    for name, expected in whole.items():
        torch.testing.assert_close(tiled[name], expected, rtol=1e-6, atol=1e-6)
    assert whole["outliers"].tolist() == [1, 0, 0]
    assert torch.equal(tiled["firing_count"], whole["firing_count"])
