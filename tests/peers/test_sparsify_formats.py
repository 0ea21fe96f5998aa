"""SAEs made and saved by EleutherAI's sparsify itself load here and compute what it computes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from parity import D_MODEL, D_SAE, assert_rows_agree, assert_same, dense, randomise, tokens

from qscope_posttrain.sae.autoencoder import SparseAutoencoder

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # where triton is installed, its decoder works on CUDA only
sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is not installed (make test-peers)")


def made(folder: Path, **options: object):  # type: ignore[no-untyped-def]
    coder = sparsify.SparseCoder(D_MODEL, sparsify.SparseCoderConfig(**{"num_latents": D_SAE, "k": 7, **options}))
    randomise(coder)
    coder.save_to_disk(folder)
    return coder


@pytest.mark.promise(
    "Files made by SAELens, sparsify and dictionary_learning give their codes and reconstructions to 1e-5"
)
@pytest.mark.parametrize(
    "options",
    [{}, {"normalize_decoder": False}, {"num_latents": 0, "expansion_factor": 4}],
)
def test_saes(tmp_path: Path, options: dict[str, object]) -> None:
    theirs = made(tmp_path / "layers.10", **options)
    ours = SparseAutoencoder.load(tmp_path / "layers.10")
    x = tokens()
    top = theirs.encode(x)
    acts = dense(top.top_acts, top.top_indices)
    assert_same(ours, acts, theirs.decode(top.top_acts, top.top_indices), x)
    assert_rows_agree(tmp_path / "layers.10", ours)
    assert (ours.layer, ours.source.format) == (10, "sparsify")


def test_a_run_of_several_layers(tmp_path: Path) -> None:
    for layer in (3, 4):
        made(tmp_path / f"layers.{layer}")
    assert SparseAutoencoder.load(tmp_path, layer=4).layer == 4
    with pytest.raises(ValueError, match=r"holds layers 3\.\.4: say which one"):
        SparseAutoencoder.load(tmp_path)


@pytest.mark.parametrize(
    ("hookpoint", "options", "fault"),
    [
        ("layers.3", {"transcode": True}, "it is a transcoder"),
        ("layers.3", {"skip_connection": True}, "has a skip connection"),
        ("layers.3.mlp", {}, "inside or behind the MLP"),
        ("embed_tokens", {}, "the embedding, before any layer"),
    ],
)
def test_what_is_no_sae_of_the_stream_is_refused(
    tmp_path: Path, hookpoint: str, options: dict[str, object], fault: str
) -> None:
    made(tmp_path / hookpoint, **options)
    with pytest.raises(ValueError, match=fault):
        SparseAutoencoder.load(tmp_path / hookpoint)


def test_bfloat16(tmp_path: Path) -> None:
    coder = sparsify.SparseCoder(D_MODEL, sparsify.SparseCoderConfig(num_latents=D_SAE, k=7), dtype=torch.bfloat16)
    randomise(coder)
    coder.save_to_disk(tmp_path / "layers.0")
    ours = SparseAutoencoder.load(tmp_path / "layers.0")
    theirs = coder.float()
    top = theirs.encode(tokens())
    acts = dense(top.top_acts, top.top_indices)
    assert_same(ours, acts, theirs.decode(top.top_acts, top.top_indices), tokens())
