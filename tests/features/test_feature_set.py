"""FeatureSet: selection, exact statistics of combinations, the file and its enemies."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from qscope_posttrain.features import feature_set_file
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.feature_set_file import FORMAT
from qscope_posttrain.features.layer_features import TENSOR_FIELDS, LayerFeatures

LANGUAGES = ("zh", "en", "fr")
D, ROWS = 6, 4


def sample_layer(seed: int = 0, tokens: tuple[int, ...] = (40, 70, 90)) -> tuple[LayerFeatures, list[torch.Tensor]]:
    """LayerFeatures computed from explicit residual vectors, and those vectors by language."""
    generator = torch.Generator().manual_seed(seed)
    h = [torch.randn(n, D, generator=generator, dtype=torch.float64) * (i + 1) + i for i, n in enumerate(tokens)]
    encoder, decoder = (torch.randn(ROWS, D, generator=generator) for _ in range(2))
    bias = torch.randn(ROWS, generator=generator)

    def moments(rows, shift):
        values = [x @ rows.double().T + shift for x in h]
        return torch.stack([v.mean(0) for v in values]).float(), torch.stack(
            [torch.cov(v.T, correction=0) for v in values]
        ).float()

    encoder_mean, encoder_covariance = moments(encoder, bias.double())
    decoder_mean, decoder_covariance = moments(decoder, 0.0)
    return LayerFeatures(
        feature_ids=torch.tensor([5, 3, 9, 3]),
        labels=("zh", "zh", "en", "en"),
        names=("zh #5", "zh #3", "en #9", "en #3"),
        encoder=encoder,
        encoder_bias=bias,
        decoder=decoder,
        scores=torch.tensor([0.5, 0.8, 0.3, 0.2]),
        effects=torch.tensor([0.1, -0.2, math.nan, math.nan]),
        mean_activation=torch.rand(3, ROWS, generator=generator),
        firing_rate=torch.rand(3, ROWS, generator=generator),
        tokens=torch.tensor(tokens),
        mean_residual=torch.stack([x.mean(0) for x in h]).float(),
        residual_median_norm=2.5,
        encoder_mean=encoder_mean,
        encoder_covariance=encoder_covariance,
        decoder_mean=decoder_mean,
        decoder_covariance=decoder_covariance,
    ), h


def sample_set() -> FeatureSet:
    return FeatureSet(
        model={
            "name_or_path": "tiny",
            "model_type": "qwen3",
            "hidden_size": D,
            "num_hidden_layers": 4,
            "vocab_size": 9,
        },
        languages=LANGUAGES,
        layers={3: sample_layer(3)[0], 1: sample_layer(1)[0]},
        settings={"top": 2, "note": "中文"},
        provenance={"versions": {"torch": "2"}},
    )


class TestCombinations:
    @settings(max_examples=25, deadline=None)
    @given(
        weights=st.lists(st.floats(-3, 3), min_size=ROWS, max_size=ROWS),
        languages=st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=3, unique=True),
        kind=st.sampled_from(["encoder", "decoder"]),
    )
    def test_pooled_statistics_of_any_combination_are_exact(self, weights, languages, kind):
        layer, h = sample_layer()
        w = torch.tensor(weights, dtype=torch.float64)
        rows, bias, _, _ = layer.readout(kind)
        values = torch.cat([h[i] for i in languages]) @ rows.double().T + bias.double()
        for weight, expected in ((w, values @ w), (None, values)):
            torch.testing.assert_close(
                layer.pooled_std(kind, languages, weight), expected.std(0, correction=0), rtol=1e-4, atol=2e-3
            )

    @pytest.mark.parametrize("kind", ["encoder", "decoder"])
    def test_combine_is_the_weighted_sum_with_its_own_statistics(self, kind):
        layer, h = sample_layer()
        w = torch.tensor([0.5, -1.0, 2.0, 0.25])
        one = layer.combine(w, "sum", label="zh")
        rows, bias, mean, covariance = one.readout(kind)
        assert len(one) == 1
        assert one.labels == ("zh",)
        assert one.names == ("sum",)
        assert one.feature_ids.tolist() == [-1]
        for i, x in enumerate(h):
            values = x @ rows[0].double() + bias[0].double()
            original = (x @ layer.readout(kind).rows.double().T + layer.readout(kind).bias.double()) @ w.double()
            torch.testing.assert_close(values, original, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mean[i, 0].double(), values.mean(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(covariance[i, 0, 0].double(), values.var(correction=0), rtol=1e-4, atol=1e-4)
        assert one.firing_rate.isnan().all()
        torch.testing.assert_close(one.scores[0], layer.scores @ w)
        torch.testing.assert_close(one.mean_activation[:, 0], layer.mean_activation @ w)

    def test_combine_needs_a_label_for_mixed_rows_and_good_weights(self):
        layer, _ = sample_layer()
        with pytest.raises(ValueError, match="need a label"):
            layer.combine(torch.ones(ROWS), "sum")
        for weights in (torch.ones(3), torch.full((ROWS,), math.nan)):
            with pytest.raises(ValueError, match="4 finite weights"):
                layer.combine(weights, "sum", label="zh")

    def test_std_without_second_moments_is_an_error(self):
        layer, _ = sample_layer()
        layer = replace(layer, decoder_covariance=torch.full_like(layer.decoder_covariance, math.nan))
        with pytest.raises(ValueError, match="second_moments=True"):
            layer.pooled_std("decoder", [1])

    def test_unknown_readout(self):
        with pytest.raises(ValueError, match="'middle'"):
            sample_layer()[0].readout("middle")


class TestSelect:
    def test_language_and_layers(self):
        chosen = sample_set().select(language="zh", layers=[3])
        assert list(chosen.layers) == [3]
        assert chosen.layers[3].names == ("zh #5", "zh #3")
        assert torch.equal(chosen.layers[3].decoder, sample_layer(3)[0].decoder[:2])
        full = sample_layer(3)[0].encoder_covariance
        assert torch.equal(chosen.layers[3].encoder_covariance, full[:, :2, :2])

    def test_top_takes_the_best_score_per_layer_and_language(self):
        assert sample_set().select(top=1).layers[1].names == ("zh #3", "en #9")
        assert sample_set().select("zh", top=5).layers[1].names == ("zh #3", "zh #5")

    def test_ids(self):
        assert sample_set().select(feature_ids=3, layers=1).layers[1].names == ("zh #3", "en #3")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"language": "xx"}, "language 'xx' is not in this FeatureSet; it has zh, en, fr"),
            ({"layers": 2}, "layer 2 is not in this FeatureSet; it has 1, 3"),
            ({"feature_ids": [5, 77]}, r"\[77\] are not among"),
            ({"language": "fr"}, "no row for language 'fr'"),
            ({"language": "zh", "feature_ids": 9, "layers": [1]}, "no row for language 'zh' and feature ids"),
            ({"top": 0}, "top must be at least 1"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            sample_set().select(**arguments)


def test_check_model_names_both_sides(make_model):
    features = sample_set()
    with pytest.raises(ValueError, match="hidden_size 6 in the features, 64 in the model"):
        features.check_model(make_model())
    with pytest.raises(ValueError, match="model_type qwen3 in the features, llama in the model"):
        features.check_model(make_model("llama", hidden_size=D, num_attention_heads=2))
    features.check_model(make_model(hidden_size=D, head_dim=2))


def test_print_is_a_table():
    text = str(sample_set())
    assert "zh #5" in text
    assert "fires outside" in text
    assert text.count("\n| ") == 1 + 8 + 1


class TestFile:
    def test_round_trip_and_equal_bytes(self, tmp_path):
        features = sample_set()
        features.save(tmp_path / "a.safetensors")
        loaded = FeatureSet.load(tmp_path / "a.safetensors")
        assert (loaded.model, loaded.languages, loaded.settings, loaded.provenance) == (
            features.model,
            features.languages,
            features.settings,
            features.provenance,
        )
        assert list(loaded.layers) == [1, 3]
        for layer in features.layers:
            for name in TENSOR_FIELDS:
                ours, theirs = getattr(loaded.layers[layer], name), getattr(features.layers[layer], name)
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
            assert loaded.layers[layer].labels == features.layers[layer].labels
            assert loaded.layers[layer].residual_median_norm == 2.5
        loaded.save(tmp_path / "b.safetensors")
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()

    def test_unknown_norm_survives(self, tmp_path):
        layer = replace(sample_layer()[0], residual_median_norm=math.nan)
        replace(sample_set(), layers={0: layer}).save(tmp_path / "a")
        assert math.isnan(FeatureSet.load(tmp_path / "a").layers[0].residual_median_norm)

    def test_failed_write_keeps_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a"
        sample_set().save(path)
        before = path.read_bytes()
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            sample_set().select("zh").save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_what_cannot_be_written(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            sample_set().save(tmp_path / "no" / "a")
        for value in (math.nan, object()):
            with pytest.raises(ValueError, match="JSON values"):
                replace(sample_set(), settings={"a": value}).save(tmp_path / "a")

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="No FeatureSet file"):
            FeatureSet.load(tmp_path / "a")
        with pytest.raises(
            FileNotFoundError, match=r"features\.safetensors: give features\.safetensors, or the folder"
        ):
            FeatureSet.load(tmp_path)

    def test_the_folder_stands_for_the_file_in_it(self, tmp_path):
        assert sample_set().save(tmp_path) == tmp_path / FeatureSet.FILE_NAME
        assert str(FeatureSet.load(tmp_path)) == str(FeatureSet.load(tmp_path / "features.safetensors"))

    def test_rows_of_one_tensor(self, tmp_path):
        found = sample_set()
        layers = {
            layer: replace(rows, decoder=rows.encoder, decoder_mean=rows.encoder_mean)
            for layer, rows in found.layers.items()
        }
        loaded = FeatureSet.load(replace(found, layers=layers).save(tmp_path))
        assert torch.equal(loaded.layers[3].decoder, found.layers[3].encoder)

    @pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, pickle.dumps({"a": 1})])
    def test_not_safetensors(self, content, tmp_path):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            FeatureSet.load(tmp_path / "a")

    @pytest.mark.promise("A FeatureSet that was edited or cut is refused")
    @settings(max_examples=40, deadline=None)
    @given(cut=st.floats(0, 0.999))
    def test_truncated_anywhere(self, cut, tmp_path_factory):
        path = tmp_path_factory.mktemp("cut") / "a"
        sample_set().save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(cut * len(content))])
        with pytest.raises(ValueError, match="safetensors"):
            FeatureSet.load(path)

    def test_too_large(self, tmp_path, monkeypatch):
        sample_set().save(tmp_path / "a")
        monkeypatch.setattr(feature_set_file, "MAX_BYTES", 100)
        with pytest.raises(ValueError, match="at most 100"):
            FeatureSet.load(tmp_path / "a")

    def test_other_safetensors(self, tmp_path):
        save_file({"a": torch.ones(2)}, tmp_path / "a")
        with pytest.raises(ValueError, match="is not a FeatureSet"):
            FeatureSet.load(tmp_path / "a")

    @pytest.mark.promise("A FeatureSet that was edited or cut is refused")
    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda d: d.update(version=2), "version 2; this package reads version 1"),
            (lambda d: d.update(extra=1), r"unexpected \['extra'\]"),
            (lambda d: d.pop("settings"), r"missing \['settings'\]"),
            (lambda d: d.update(languages=["zh", 3, "fr"]), "languages must be a list of strings"),
            (lambda d: d.update(languages=["zh", "zh", "fr"]), "distinct languages"),
            (lambda d: d.update(languages=["zh", "en"]), "statistics of 3 languages, expected 2"),
            (lambda d: d.update(languages=["ru", "en", "fr"]), "language 'zh' is not in this FeatureSet"),
            (lambda d: d.update(layers=[]), "layers must be an object"),
            (lambda d: d.update(model=[]), "model must be an object"),
            (lambda d: d["model"].update(hidden_size=7), "width 6, the model's hidden size is 7"),
            (lambda d: d["model"].update(num_hidden_layers=3), r"Layer 3 is outside the model's layers 0\.\.2"),
            (lambda d: d["model"].update(hidden_size="6"), "must be a positive integer"),
            (lambda d: d["model"].pop("model_type"), "missing: model_type"),
            (lambda d: d["layers"].update({"01": d["layers"].pop("1")}), "'01' is not a layer number"),
            (lambda d: d["layers"].pop("1"), "unexpected .'layers.1.decoder'"),
            (lambda d: d["layers"]["1"].update(labels=["zh"]), "as many labels and names, got 1 and 4"),
            (lambda d: d["layers"]["1"].update(names="zh"), "must be a list of strings"),
            (lambda d: d["layers"]["1"].update(residual_median_norm=True), "must be a number"),
            (lambda d: d["layers"]["1"].update(residual_median_norm=-1), "must be a positive number"),
            (lambda d: d["layers"]["1"].update(more=1), r"unexpected \['more'\]"),
        ],
    )
    def test_edited_document(self, edit, message, tmp_path):
        def rewrite(tensors, document):
            edit(document)
            return tensors, json.dumps(document)

        with pytest.raises(ValueError, match=message):
            FeatureSet.load(_rewritten(tmp_path / "a", rewrite))

    @pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '"text"'])
    def test_document_that_is_no_document(self, text, tmp_path):
        with pytest.raises(ValueError, match="the FeatureSet document"):
            FeatureSet.load(_rewritten(tmp_path / "a", lambda tensors, _: (tensors, text)))

    @pytest.mark.promise("A FeatureSet that was edited or cut is refused")
    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("encoder", lambda t: t[:, :3], r"layer 1: LayerFeatures.*float32 \[4, 3\]"),
            ("encoder", lambda t: t.half(), "float32.*got torch.float16"),
            ("encoder", lambda t: t.index_fill(0, torch.tensor([0]), math.nan), "6 values that are not finite"),
            ("decoder_mean", lambda t: t + math.nan, "not finite"),
            ("scores", lambda t: t + math.inf, "not finite"),
            ("tokens", lambda t: -t, "cannot be negative"),
            ("feature_ids", lambda t: t - 9, "Feature ids start at 0"),
            ("feature_ids", lambda t: t.float(), "must be torch.int64"),
            ("encoder_covariance", lambda t: t[:, :2], r"\[3, 4, 4\]"),
            ("decoder", lambda t: t[:0], r"decoder must be torch.float32 \[4, 6\]"),
        ],
    )
    def test_edited_tensor(self, name, change, message, tmp_path):
        def rewrite(tensors, document):
            tensors[f"layers.1.{name}"] = change(tensors[f"layers.1.{name}"]).contiguous()
            return tensors, json.dumps(document)

        with pytest.raises(ValueError, match=message):
            FeatureSet.load(_rewritten(tmp_path / "a", rewrite))

    def test_surplus_tensor(self, tmp_path):
        with pytest.raises(ValueError, match=r"unexpected \['layers.1.more'\]"):
            FeatureSet.load(
                _rewritten(tmp_path / "a", lambda t, d: ({**t, "layers.1.more": torch.ones(1)}, json.dumps(d)))
            )


def _rewritten(path, rewrite):
    """Save the sample set, then write it again with edited tensors or document."""
    sample_set().save(path)
    with safe_open(str(path), framework="pt") as file:
        document = json.loads(file.metadata()[FORMAT])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open has no __iter__
    tensors, text = rewrite(tensors, document)
    save_file(tensors, path, metadata={FORMAT: text})
    return path
