"""What is saved in another library's layout is read back as the same function; what cannot be expressed is refused.

That SAELens itself reads what is written here, tests/peers shows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qscope_posttrain.sae.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

MakeSAE = Callable[..., SparseAutoencoder]
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
RELEASE = "SAE-Res-Tiny-W1K-L0_4"


def assert_same_function(left: SparseAutoencoder, right: SparseAutoencoder) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(left, name), getattr(right, name))
    x = torch.randn(30, left.d_model, dtype=left.dtype, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(left.encode(x), right.encode(x), strict=True):
        assert torch.equal(ours, theirs)
    assert left.layer == right.layer


@pytest.mark.parametrize(
    "activation",
    [TopK(4), TopK(4, "relu_before"), ReLU(), BatchTopK(0.25), JumpReLU(torch.linspace(-1, 1, 64))],
    ids=lambda a: repr(a)[:24],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sae_lens_round_trip(make_sae: MakeSAE, tmp_path: Path, activation: Activation, dtype: torch.dtype) -> None:
    sae = make_sae(activation=activation).to(dtype=dtype)
    folder = sae.save(tmp_path / "deep" / "er", format="sae_lens")
    assert sorted(os.listdir(folder)) == ["cfg.json", "sae_weights.safetensors"]
    assert_same_function(SparseAutoencoder.load(folder, dtype=dtype), sae)
    settings = json.loads((folder / "cfg.json").read_text())
    assert settings["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert (settings["d_in"], settings["d_sae"], settings["dtype"]) == (16, 64, str(dtype).removeprefix("torch."))


def test_sae_without_a_layer(make_sae: MakeSAE, tmp_path: Path) -> None:
    sae = replace(make_sae(), layer=None)
    sae.save(tmp_path / "a", format="sae_lens")
    assert SparseAutoencoder.load(tmp_path / "a").layer is None
    with pytest.raises(ValueError, match="is named after its layer, and this SAE knows none"):
        sae.save(tmp_path / RELEASE, format="qwen_scope")


def test_a_folder_with_a_copy_in_qwen_scopes_layout_is_loaded_by_layer(make_sae: MakeSAE, tmp_path: Path) -> None:
    sae = make_sae(d_sae=1024)
    sae.save(tmp_path / "layer3.sae.safetensors")
    sae.save(tmp_path / RELEASE, format="qwen_scope")
    loaded = SparseAutoencoder.load(tmp_path, layer=3)
    assert_same_function(loaded, sae)
    assert loaded.source.file == "layer3.sae.safetensors"


@pytest.mark.parametrize("target", ["folder", "file"])
@pytest.mark.parametrize("variant", ["relu_after", "relu_before"])
def test_qwen_scope_round_trip(make_sae: MakeSAE, tmp_path: Path, target: str, variant: str) -> None:
    sae = make_sae(d_sae=1024, activation=TopK(4, variant))
    path = tmp_path / RELEASE / "layer3.sae.pt"
    assert sae.save(path if target == "file" else path.parent, format="qwen_scope") == path
    assert_same_function(SparseAutoencoder.load(tmp_path / RELEASE), sae)
    content = torch.load(path, weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in content.items()} == {
        "W_enc": (1024, 16),
        "W_dec": (16, 1024),
        "b_enc": (1024,),
        "b_dec": (16,),
    }
    assert all(tensor.is_contiguous() for tensor in content.values())
    assert path.stat().st_size < 4 * (2 * 16 * 1024 + 1024 + 16) + 4096, "no storage larger than its tensor"


@pytest.mark.parametrize(
    ("format", "activation", "fault"),
    [
        ("sae_lens", TopK(4, "signed"), r"SAELens has no architecture for TopK\(k=4, variant='signed'\)"),
        ("qwen_scope", TopK(4, "signed"), "cannot express TopK"),
        ("qwen_scope", ReLU(), "cannot express ReLU"),
        ("qwen_scope", BatchTopK(0.5), "cannot express BatchTopK"),
        ("qwen_scope", JumpReLU(torch.ones(1024)), "cannot express JumpReLU"),
        ("gguf", TopK(4), "unknown format 'gguf'; an SAE can be saved as native, sae_lens, qwen_scope"),
    ],
)
def test_what_a_layout_cannot_express(
    make_sae: MakeSAE, tmp_path: Path, format: str, activation: Activation, fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        make_sae(d_sae=1024, activation=activation).save(tmp_path / RELEASE, format=format)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("d_sae", "k", "name", "fault"),
    [
        (1024, 4, "mine", r"must be SAE-Res-<model>-W1K-L0_4, got 'mine'"),
        (1024, 4, "SAE-Res-Tiny-W2K-L0_4", r"must be SAE-Res-<model>-W1K-L0_4"),
        (1024, 5, RELEASE, r"must be SAE-Res-<model>-W1K-L0_5"),
        (1000, 4, RELEASE, "in units of 1024, which 1000 latents are not"),
        (1024, 4, f"{RELEASE}/layer2.sae.pt", r"is named layer3\.sae\.pt, got layer2\.sae\.pt"),
    ],
)
def test_qwen_scope_names(make_sae: MakeSAE, tmp_path: Path, d_sae: int, k: int, name: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        make_sae(d_sae=d_sae, activation=TopK(k)).save(tmp_path / name, format="qwen_scope")
    assert os.listdir(tmp_path) == []


def test_paths_that_do_not_fit(make_sae: MakeSAE, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a folder"):
        make_sae().save(tmp_path / "sae_weights.safetensors", format="sae_lens")
    square = make_sae(d_sae=1024, d_model=1024)
    with pytest.raises(ValueError, match="would be ambiguous"):
        square.save(tmp_path / RELEASE, format="qwen_scope")


@pytest.mark.parametrize("format", ["native", "sae_lens", "qwen_scope"])
def test_a_tied_dictionary_is_saved(make_sae: MakeSAE, tmp_path: Path, format: str) -> None:
    """Tensors of one memory, which safetensors does not take."""
    plain = make_sae(1024, activation=TopK(4))
    tied = replace(plain, W_dec=plain.W_enc, layer=3)
    path = {"native": "a.safetensors", "sae_lens": "a", "qwen_scope": f"{RELEASE}/layer3.sae.pt"}[format]
    loaded = SparseAutoencoder.load(tied.save(tmp_path / path, format=format))
    assert torch.equal(loaded.W_dec, tied.W_enc)
    assert torch.equal(loaded.W_enc, tied.W_enc)
