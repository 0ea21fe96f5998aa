"""SAEs made by dictionary_learning itself, saved as its trainers save them, compute here what they compute there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from parity import D_MODEL, D_SAE, assert_rows_agree, assert_same, randomise, tokens

from qscope_posttrain.sae.autoencoder import SparseAutoencoder

pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed (make test-peers)")
from dictionary_learning import dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK

CLASSES = {
    "AutoEncoder": lambda: dictionary.AutoEncoder(D_MODEL, D_SAE),
    "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D_MODEL, D_SAE),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D_MODEL, D_SAE, 7),
    "BatchTopKSAE": lambda: BatchTopKSAE(D_MODEL, D_SAE, 7),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D_MODEL, D_SAE, 7, [32, 64]),
    "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D_MODEL, D_SAE),
    "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D_MODEL, D_SAE),
}


def save(module: torch.nn.Module, folder: Path, name: str | None, **more: object) -> None:
    """As `trainSAE` does: the state dict on the CPU, and the trainer's settings."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({key: value.cpu() for key, value in module.state_dict().items()}, folder / "ae.pt")
    if name is not None:
        trainer = {"dict_class": name, "activation_dim": D_MODEL, "dict_size": D_SAE, "layer": 8, "lm_name": "x"}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer | more, "buffer": {"ctx_len": 128}}))


@pytest.mark.promise(
    "Files made by SAELens, sparsify and dictionary_learning give their codes and reconstructions to 1e-5"
)
@pytest.mark.parametrize("name", CLASSES)
def test_every_class(tmp_path: Path, name: str) -> None:
    theirs = CLASSES[name]()
    randomise(theirs)
    if hasattr(theirs, "threshold") and theirs.threshold.ndim == 0:
        theirs.threshold.fill_(0.8)
    save(theirs, tmp_path / "trainer_0", name, submodule_name="resid_post_layer_8")
    x = tokens()
    acts = theirs.encode(x)
    ours = SparseAutoencoder.load(tmp_path)
    assert_same(ours, acts, theirs.decode(acts), x)
    assert_rows_agree(tmp_path / "trainer_0" / "ae.pt", ours)
    assert (ours.layer, ours.source.format, ours.source.file) == (8, "dictionary_learning", "ae.pt")


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder"])
def test_without_settings_where_the_tensors_tell_the_class(tmp_path: Path, name: str) -> None:
    theirs = CLASSES[name]()
    randomise(theirs)
    save(theirs, tmp_path, None)
    x = tokens()
    acts = theirs.encode(x)
    assert_same(SparseAutoencoder.load(tmp_path), acts, theirs.decode(acts), x)


def test_without_settings_where_they_do_not(tmp_path: Path) -> None:
    save(CLASSES["BatchTopKSAE"](), tmp_path, None)
    with pytest.raises(ValueError, match=r"config.json is missing.* could be AutoEncoderTopK or BatchTopKSAE"):
        SparseAutoencoder.load(tmp_path)


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"dict_class": "IdentityDict"}, "dict_class is 'IdentityDict'; known are"),
        ({"dict_size": 4096}, r"states dict_size and activation_dim \(4096, 24\), it holds \(96, 24\)"),
        ({"k": 9}, "contradicting k: config.json says 9, the weights 7"),
        ({"submodule_name": "mlp_layer_8"}, "inside or behind the MLP"),
        ({"layer": 3, "submodule_name": "resid_post_layer_8"}, "says layer 3 and submodule_name"),
        ({"dict_class": "GatedAutoEncoder"}, "lacks decoder_bias, gate_bias, mag_bias, r_mag and has extra"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, more: dict[str, object], fault: str) -> None:
    save(CLASSES["AutoEncoderTopK"](), tmp_path, "AutoEncoderTopK", **more)
    with pytest.raises(ValueError, match=fault):
        SparseAutoencoder.load(tmp_path)
