from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.intervals import bootstrap_of_sums
from qscope_posttrain.models.capture import forward_to_layer, spliced
from qscope_posttrain.models.layers import decoder_layers
from qscope_posttrain.sae.activations import JumpReLU, TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.quality import measure_sae
from qscope_posttrain.sae.quality.fit import entry_of
from qscope_posttrain.sae.source import SAESource
from qscope_posttrain.sae.training import SAETrainingConfig, train_saes

LAYER, K, WIDTH = 2, 12, 256


def learned(model, tiny_tokenizer, texts):
    """The model, which now knows the texts by heart."""
    rows = [tiny_tokenizer(line)["input_ids"] for lines in texts.values() for line in lines]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 2
    return model.eval()


@pytest.fixture(scope="module")
def trained(make_model, tiny_tokenizer, texts):
    return learned(make_model(), tiny_tokenizer, texts)


def activations(model, tokenizer, texts, layer):
    rows = []
    for lines in texts.values():
        for line in lines:
            ids = torch.tensor([tokenizer(line)["input_ids"]])
            rows.append(forward_to_layer(model, [layer], input_ids=ids)[layer][0, 1:])
    return torch.cat(rows)


@pytest.fixture(scope="module")
def sae(trained, tiny_tokenizer, texts):
    """A good SAE of the model's layer 2."""
    x = activations(trained, tiny_tokenizer, texts, LAYER)
    config = SAETrainingConfig(width=WIDTH, k=K, steps=300, batch_tokens=256)
    return train_saes({LAYER: x}, config)[LAYER]


@pytest.fixture(scope="module")
def measure(trained, tiny_tokenizer, texts):
    def run(sae, layer=None, **options):
        return measure_sae(trained, tiny_tokenizer, texts, sae, layer, **options)

    return run


@pytest.fixture(scope="module")
def good(measure, sae):
    return measure(sae)


def test_figures_are_those_of_an_explicit_computation(good, trained, tiny_tokenizer, texts, sae):
    x = activations(trained, tiny_tokenizer, texts, LAYER).double()
    values, indices = sae.encode(x.float())
    x_hat = sae.decode(values, indices).double()
    total = (x - x.mean(dim=0)).square().sum()
    assert good.tokens == len(x)
    assert good.fvu.estimate == pytest.approx(float((x - x_hat).square().sum() / total), rel=1e-5)
    bare = (x - (x_hat - sae.b_dec)).square().sum() / total
    assert good.fvu_without_b_dec.estimate == pytest.approx(float(bare), rel=1e-5)
    fires = values > 0
    assert good.l0.estimate == pytest.approx(float(fires.sum(dim=1).float().mean()))
    quartiles = np.quantile(fires.sum(dim=1), [0.25, 0.5, 0.75], method="inverted_cdf")
    assert good.l0_quartiles == tuple(quartiles.astype(int))
    assert good.dead == WIDTH - len(indices[fires].unique())
    assert good.cosine.estimate == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()), rel=1e-5)
    assert good.norm.estimate == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-5)
    assert good.reconstruction_norm.estimate == pytest.approx(float(x_hat.norm(dim=1).mean()), rel=1e-5)


def test_losses_are_those_of_an_explicit_computation(good, trained, tiny_tokenizer, texts, sae):
    x = activations(trained, tiny_tokenizer, texts, LAYER)
    sums = dict.fromkeys(("clean", "spliced", "mean", "zero"), 0.0)
    predictions = 0
    for line in (line for lines in texts.values() for line in lines):
        ids = torch.tensor([tiny_tokenizer(line)["input_ids"]])
        with torch.no_grad():
            hidden = trained.model(input_ids=ids, output_hidden_states=True).hidden_states[LAYER + 1]
            made = sae.decode(*sae.encode(hidden[0, 1:]))
            for name, states in (("clean", hidden[0, 1:]), ("spliced", made), ("mean", x.mean(0)), ("zero", 0 * x[0])):
                inside = hidden.clone()
                inside[0, 1:] = states
                with spliced(trained, LAYER, inside):
                    logits = trained(input_ids=ids).logits[0]
                sums[name] += float(cross_entropy(logits[1:-1], ids[0, 2:], reduction="sum"))
        predictions += ids.shape[1] - 2
    for name, value in sums.items():
        assert good.losses[name].estimate == pytest.approx(value / predictions, rel=1e-4)
    for name in ("mean", "zero"):
        recovered = (sums[name] - sums["spliced"]) / (sums[name] - sums["clean"])
        assert good.recovered[name].estimate == pytest.approx(recovered, abs=1e-3)


@pytest.mark.promise("qscope sae check warns of each kind of broken SAE, and of nothing in a good one")
def test_a_good_sae_warns_of_nothing_and_its_intervals_hold_the_estimates(good):
    assert good.warnings == ()
    assert good.fvu.estimate < 0.3
    assert good.recovered["mean"].estimate > 0.5
    assert good.losses["clean"].estimate < good.losses["spliced"].estimate < good.losses["mean"].estimate
    named = {"fvu": good.fvu, "l0": good.l0, "cosine": good.cosine, **good.losses, **good.recovered}
    for name, interval in named.items():
        assert interval.low <= interval.estimate <= interval.high, name
    assert good.fvu.high > good.fvu.low
    assert min(good.fit.layers, key=good.fit.layers.get) == LAYER
    assert good.fit.chance > 5 * good.fvu.estimate
    assert "yes" not in str(good.to_table().rows)
    assert [row[0] for row in good.by_language.rows] == ["en", "fr", "zh", "ru", "ko"]
    assert sum(row[2] for row in good.by_language.rows) == good.tokens


def test_batches_and_order_change_nothing(good, sae, trained, tiny_tokenizer, texts):
    shuffled = {language: list(reversed(lines)) for language, lines in reversed(texts.items())}
    again = measure_sae(trained, tiny_tokenizer, shuffled, sae, tokens_per_batch=100, scan=0)
    assert again.fvu.estimate == pytest.approx(good.fvu.estimate, rel=1e-5)
    assert again.losses["spliced"].estimate == pytest.approx(good.losses["spliced"].estimate, rel=1e-4)
    assert again.fit.layers.keys() == {LAYER}
    flat = measure_sae(trained, tiny_tokenizer, [line for lines in texts.values() for line in lines], sae, losses=False)
    assert flat.fvu.estimate == pytest.approx(good.fvu.estimate, rel=1e-5)
    assert (flat.losses, flat.recovered) == ({}, {})


def _unfolded(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The same SAE as it would be stored for activations of norm 1, with nobody folding the scale in."""
    scale = 1 / 30
    return dataclasses.replace(sae, b_enc=sae.b_enc * scale, b_dec=sae.b_dec * scale)


def _gated(sae: SparseAutoencoder, x: torch.Tensor, unit: float = 1.0) -> SparseAutoencoder:
    """A JumpReLU that passes about what TopK passes, for activations that are `unit` times as large."""
    threshold = sae.pre_activations(x).topk(K, dim=1).values[:, -1].median() * unit
    jump = JumpReLU(torch.full((sae.d_sae,), float(threshold)))
    return dataclasses.replace(sae, b_enc=sae.b_enc * unit, b_dec=sae.b_dec * unit, activation=jump)


def _kinds(quality):
    return {warning.kind for warning in quality.warnings}


@pytest.mark.parametrize("scale", [0.1, 0.5, 3.0, -1.0])
def test_an_unfolded_decoder_norm_is_a_matter_of_units(measure, sae, scale):
    broken = measure(dataclasses.replace(sae, W_dec=sae.W_dec * scale), losses=False)
    assert _kinds(broken) == {"units"}
    assert broken.fit.output_scale == pytest.approx(1 / scale, rel=0.15)
    assert "decoder norms or an output scale were not folded" in broken.warnings[0].reason


def test_an_unfolded_input_scale_is_a_matter_of_units(measure, sae):
    broken = measure(_unfolded(sae), losses=False)
    assert _kinds(broken) == {"units"}
    assert "trained on scaled activations" in broken.warnings[0].reason
    assert broken.fit.input_scale == pytest.approx(1 / 30, rel=0.3)


@pytest.mark.promise("qscope sae check warns of each kind of broken SAE, and of nothing in a good one")
@pytest.mark.parametrize(
    ("unit", "kinds"), [(1.0, set()), (1 / 40, {"units", "sparsity"}), (40.0, {"units", "sparsity"})]
)
def test_thresholds_in_other_units_show_in_scale_and_sparsity(
    measure, sae, trained, tiny_tokenizer, texts, unit, kinds
):
    x = activations(trained, tiny_tokenizer, texts, LAYER)
    quality = measure(_gated(sae, x, unit), losses=False, expected_l0=K)
    assert _kinds(quality) == kinds
    if kinds:
        assert quality.fit.input_scale == pytest.approx(unit, rel=0.5)


@pytest.mark.promise("qscope sae check warns of each kind of broken SAE, and of nothing in a good one")
@pytest.mark.parametrize("layer", [1, 3])
def test_another_layer_is_noticed_where_its_own_is_scanned(measure, sae, layer):
    moved = measure(dataclasses.replace(sae, layer=None), layer, losses=False)
    assert _kinds(moved) == {"layer"}
    assert f"on layer {LAYER} it leaves" in moved.warnings[0].reason


@pytest.mark.promise("qscope sae check warns of each kind of broken SAE, and of nothing in a good one")
def test_another_model_of_the_same_shape(sae, make_model, tiny_tokenizer, texts):
    fresh = make_model(seed=7)
    for model in (fresh, learned(fresh, tiny_tokenizer, texts)):
        other = measure_sae(model, tiny_tokenizer, texts, sae, losses=False)
        assert _kinds(other) == {"model"}, other.fit
        assert "another model or another site" in other.warnings[0].reason


@pytest.mark.promise("qscope sae check warns of each kind of broken SAE, and of nothing in a good one")
def test_a_permuted_decoder(measure, sae):
    order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(0))
    broken = measure(dataclasses.replace(sae, W_dec=sae.W_dec[order]))
    assert _kinds(broken) == {"decoder"}
    assert broken.recovered["mean"].estimate < 0.5


@pytest.mark.promise("qscope sae check warns of each kind of broken SAE, and of nothing in a good one")
def test_sparsity_other_than_promised(measure, sae):
    assert _kinds(measure(sae, losses=False, expected_l0=3 * K)) == {"sparsity"}
    closed = dataclasses.replace(sae, activation=TopK(WIDTH))
    few = measure(closed, losses=False)
    assert few.l0.estimate < WIDTH / 2
    assert "sparsity" in _kinds(few)


def test_negative_survivors_of_a_signed_topk_count(measure, sae):
    every = dataclasses.replace(sae, activation=TopK(WIDTH, "signed"))
    assert measure(every, losses=False).l0.estimate == WIDTH


RELEASE = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"


def test_the_catalogue_knows_the_model(measure, sae, make_model, tiny_tokenizer, texts):
    named = dataclasses.replace(sae, source=SAESource("/somewhere", release=RELEASE))
    found = measure(named, losses=False)
    assert [warning.kind for warning in found.warnings] == ["model"]
    assert "qwen3-1.7b-base-32k-l0-50 belongs to Qwen/Qwen3-1.7B-Base, but this model has layers 4" in (
        found.warnings[0].reason
    )
    entry = entry_of(named.source)
    assert entry is not None
    assert entry_of(SAESource("google/gemma-scope-2b-pt-res")) is None
    assert entry_of(SAESource("/x", origin=SAESource(entry.repository))) is entry


@pytest.mark.parametrize(
    ("name", "warns"), [("Qwen/Qwen3-1.7B", True), ("/data/Qwen3-1.7B-Base/", False), ("/data/my-sft", False)]
)
def test_base_against_instruct_by_name(name, warns, good, sae):
    from qscope_posttrain.sae.quality.fit import warnings_of

    model = {"name_or_path": name, "model_type": "qwen3", "hidden_size": 2048, "num_hidden_layers": 28}
    named = dataclasses.replace(sae, source=SAESource("/somewhere", release=RELEASE))
    found = warnings_of(good.fit, good.l0.estimate, named, LAYER, model, None)
    assert [warning.kind for warning in found] == ["tuning"] * warns
    assert all("was trained on Qwen3-1.7B-Base (base), and this is Qwen3-1.7B" in w.reason for w in found)


def test_outliers_are_left_out_and_left_alone(sae, trained, tiny_tokenizer, texts):
    """The share of outliers is that of the statistics pass, and they stay in place when x_hat is spliced in."""
    statistics = collect_statistics(trained, tiny_tokenizer, texts, {LAYER: None}, outlier_factor=1.1)
    quality = measure_sae(trained, tiny_tokenizer, texts, sae, outlier_factor=1.1)
    layer = statistics.layers[LAYER]
    assert quality.outliers == int(layer.outliers.sum()) > 0
    assert quality.tokens == int(layer.tokens.sum())
    assert quality.outlier_share.estimate == pytest.approx(quality.outliers / (quality.outliers + quality.tokens))
    everything = measure_sae(trained, tiny_tokenizer, texts, sae)
    assert quality.losses["zero"].estimate < everything.losses["zero"].estimate


def test_wrong_layer_and_width_are_refused(measure, sae, make_sae):
    with pytest.raises(ValueError, match="was trained on layer 2"):
        measure(sae, 1)
    with pytest.raises(ValueError, match=r"does not say which layer it reads: give layer="):
        measure(dataclasses.replace(sae, layer=None))
    with pytest.raises(ValueError, match="scan is a number of layers on either side, 0 or more; got -1"):
        measure(sae, scan=-1)
    with pytest.raises(ValueError, match="width 32, the model has 64: it belongs to another model"):
        measure(make_sae(layer=2, d_model=32))


def test_splicing_leaves_no_hook_behind(trained, tiny_tokenizer):
    ids = torch.tensor([[5, 6, 7]])
    before = trained(input_ids=ids).logits
    hooks = dict(decoder_layers(trained)[LAYER]._forward_hooks)
    wrong = pytest.raises(ValueError, match=r"Layer 2 returns \[1, 3, 64\], the states to put there \[1, 2, 64\]")
    with wrong, spliced(trained, LAYER, torch.zeros(1, 2, 64)):
        trained(input_ids=ids)
    with pytest.raises(RuntimeError, match="Layer 2 never ran"), spliced(trained, LAYER, torch.zeros(1, 3, 64)):
        pass
    assert dict(decoder_layers(trained)[LAYER]._forward_hooks) == hooks
    assert torch.equal(before, trained(input_ids=ids).logits)


def test_bootstrap_of_sums_is_the_bootstrap_of_a_ratio():
    generator = np.random.default_rng(0)
    rows = np.stack([generator.normal(3, 1, 400), np.ones(400)], axis=1)
    interval = bootstrap_of_sums(rows, lambda sums: sums[..., 0] / sums[..., 1], resamples=4000)
    assert interval.estimate == pytest.approx(rows[:, 0].mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * rows[:, 0].std() / 20, rel=0.1)
    with pytest.raises(ValueError, match="not empty"):
        bootstrap_of_sums(np.zeros((0, 2)), lambda sums: sums[..., 0])
