"""SAEs made and saved by SAELens itself load here and compute what it computes, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from parity import D_MODEL, D_SAE, assert_rows_agree, assert_same, randomise, tokens

from qscope_posttrain.sae.activations import BatchTopK, JumpReLU, ReLU, TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (make test-peers)")

SITE = {"hook_name": "blocks.5.hook_resid_post"}


def made(architecture: str, **options: object):  # type: ignore[no-untyped-def]
    """An inference SAE of SAELens with random weights."""
    settings = {"d_in": D_MODEL, "d_sae": D_SAE, "metadata": dict(SITE), "architecture": architecture, **options}
    sae = sae_lens.SAE.from_dict(settings)
    randomise(sae)
    return sae


@pytest.mark.promise(
    "Files made by SAELens, sparsify and dictionary_learning give their codes and reconstructions to 1e-5"
)
@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {}),
        ("topk", {"k": 7}),
        ("topk", {"k": 7, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
        ("gated", {}),
    ],
)
def test_inference_saes(tmp_path: Path, architecture: str, options: dict[str, object], apply_b_dec: bool) -> None:
    theirs = made(architecture, apply_b_dec_to_input=apply_b_dec, **options)
    theirs.save_model(tmp_path)
    ours = SparseAutoencoder.load(tmp_path)
    x = tokens()
    acts = theirs.encode(x)
    assert_same(ours, acts, theirs.decode(acts), x)
    assert_rows_agree(tmp_path, ours)
    assert (ours.layer, ours.source.format) == (5, "sae_lens")


@pytest.mark.promise(
    "Files made by SAELens, sparsify and dictionary_learning give their codes and reconstructions to 1e-5"
)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("StandardTrainingSAE", {}),
        ("TopKTrainingSAE", {"k": 7}),
        ("BatchTopKTrainingSAE", {"k": 7}),
        ("MatryoshkaBatchTopKTrainingSAE", {"k": 7, "matryoshka_widths": [32, 96]}),
        ("JumpReLUTrainingSAE", {}),
        ("GatedTrainingSAE", {}),
    ],
)
def test_training_saes_saved_for_inference(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    config = getattr(sae_lens, name.replace("SAE", "SAEConfig"))(d_in=D_MODEL, d_sae=D_SAE, **options)
    training = getattr(sae_lens, name)(config)
    randomise(training)
    if hasattr(training, "topk_threshold"):
        training.topk_threshold.fill_(0.7)
    training.save_inference_model(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    x = tokens()
    acts = theirs.encode(x)
    ours = SparseAutoencoder.load(tmp_path)
    assert_same(ours, acts, theirs.decode(acts), x)
    assert_rows_agree(tmp_path, ours)


def test_expected_average_norm_is_folded_as_sae_lens_folds_it(tmp_path: Path) -> None:
    theirs = made("jumprelu", normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    with pytest.raises(ValueError, match="whose factor is not in the file: give it with input_scale"):
        SparseAutoencoder.load(tmp_path)
    theirs.fold_activation_norm_scaling_factor(0.37)
    x = tokens()
    acts = theirs.encode(x)
    assert_same(SparseAutoencoder.load(tmp_path, input_scale=0.37), acts, theirs.decode(acts), x)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.37, "has_whitening": False}))
    assert_same(SparseAutoencoder.load(tmp_path), acts, theirs.decode(acts), x)


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale", "covariance_whitening"])
def test_normalisations_of_each_token_are_refused(tmp_path: Path, kind: str) -> None:
    made("standard", normalize_activations=kind).save_model(tmp_path)
    with pytest.raises(ValueError, match=f"normalize_activations '{kind}'"):
        SparseAutoencoder.load(tmp_path)


def test_what_is_no_sae_of_the_stream_is_refused(tmp_path: Path) -> None:
    made("transcoder", d_out=D_MODEL, apply_b_dec_to_input=False).save_model(tmp_path / "a")
    with pytest.raises(ValueError, match="it is a transcoder"):
        SparseAutoencoder.load(tmp_path / "a")
    made("standard", metadata={"hook_name": "blocks.5.attn.hook_z"}).save_model(tmp_path / "b")
    with pytest.raises(ValueError, match=r"hook_z', inside or behind the attention"):
        SparseAutoencoder.load(tmp_path / "b")
    made("matching_pursuit").save_model(tmp_path / "c")
    with pytest.raises(ValueError, match="its architecture is 'matching_pursuit'"):
        SparseAutoencoder.load(tmp_path / "c")


def test_settings_of_before_version_6(tmp_path: Path) -> None:
    theirs = made("topk", k=7)
    theirs.save_model(tmp_path)
    old = {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "hook_point": "blocks.3.hook_resid_pre",
        "hook_point_head_index": None,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 7},
        "normalize_activations": False,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    x = tokens()
    acts = theirs.encode(x)
    ours = SparseAutoencoder.load(tmp_path)
    assert_same(ours, acts, theirs.decode(acts), x)
    assert ours.layer == 2, "before block 3 is behind block 2"


@pytest.mark.parametrize(
    "activation",
    [TopK(7), TopK(7, "relu_before"), ReLU(), BatchTopK(0.5), JumpReLU(torch.linspace(0, 1, D_SAE))],
)
def test_ours_are_loaded_by_sae_lens(tmp_path: Path, activation) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.4

    ours = SparseAutoencoder(
        draw(D_SAE, D_MODEL), draw(D_SAE), draw(D_SAE, D_MODEL), draw(D_MODEL), activation, layer=4
    )
    ours.save(tmp_path, format="sae_lens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.metadata.hook_name == "blocks.4.hook_resid_post"
    x = tokens()
    acts = theirs.encode(x)
    assert_same(ours, acts, theirs.decode(acts), x)
    again = SparseAutoencoder.load(tmp_path)
    assert all(torch.equal(getattr(again, name), getattr(ours, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    assert_same(again, acts, theirs.decode(acts), x)
