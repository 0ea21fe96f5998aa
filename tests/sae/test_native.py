from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qscope_posttrain.sae.activations import BatchTopK, JumpReLU, ReLU, TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.formats import native

MakeSAE = Callable[..., SparseAutoencoder]


@pytest.mark.parametrize(
    "activation",
    [TopK(4, "signed"), ReLU(), BatchTopK(0.5), JumpReLU(torch.linspace(0, 1, 64))],
    ids=lambda a: repr(a)[:24],
)
def test_round_trip(make_sae: MakeSAE, tmp_path: Path, activation) -> None:  # type: ignore[no-untyped-def]
    sae = make_sae(activation=activation)
    path = sae.save(tmp_path / "deep" / "er" / "layer3.sae.safetensors")
    again = SparseAutoencoder.load(path)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(again, name), getattr(sae, name))
    x = torch.randn(20, sae.d_model)
    for left, right in zip(sae.encode(x), again.encode(x), strict=True):
        assert torch.equal(left, right)
    assert type(again.activation) is type(activation)
    assert again.layer == 3
    assert again.source.format == "native"
    assert again.source.origin == sae.source
    assert os.listdir(path.parent) == [path.name], "no temporary file is left"


def test_folder_of_native_files(make_sae: MakeSAE, tmp_path: Path) -> None:
    for layer in (3, 4):
        replace(make_sae(), layer=layer).save(tmp_path / f"layer{layer}.sae.safetensors")
    assert SparseAutoencoder.load(tmp_path, layer=4).layer == 4


def test_origin_survives_conversion_and_another_save(release_folder: Path, tmp_path: Path) -> None:
    original = SparseAutoencoder.load(release_folder, layer=1)
    once = SparseAutoencoder.load(original.save(tmp_path / "a.safetensors"))
    twice = SparseAutoencoder.load(once.save(tmp_path / "b.safetensors"))
    assert once.source.origin == twice.source.origin == original.source
    assert twice.source.release == original.source.release
    assert twice.activation == TopK(8)


def test_equal_dictionaries_have_equal_files(make_sae: MakeSAE, tmp_path: Path) -> None:
    first, second = (make_sae().save(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert first.read_bytes() == second.read_bytes()


def test_failed_write_leaves_the_old_file_and_nothing_else(
    make_sae: MakeSAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_sae().save(tmp_path / "layer3.sae.safetensors")
    before = path.read_bytes()

    def disk_full(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        make_sae(d_sae=128).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_save_needs_the_suffix(make_sae: MakeSAE, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"end the file name in \.safetensors, got 'sae\.pt'"):
        make_sae().save(tmp_path / "sae.pt")


def test_contradictions_with_the_caller(make_sae: MakeSAE, tmp_path: Path) -> None:
    path = make_sae().save(tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"layer 2 was asked for, but .*mine.safetensors holds layer 3"):
        SparseAutoencoder.load(path, layer=2)
    with pytest.raises(ValueError, match="the file says k=4, the caller says k=5"):
        SparseAutoencoder.load(path, k=5)
    assert SparseAutoencoder.load(path, k=4, layer=3, d_model=16).activation == TopK(4)
    with pytest.raises(ValueError, match="width 16, but the model has 32"):
        SparseAutoencoder.load(path, d_model=32)
    with pytest.raises(ValueError, match="ReLU activation, so k=4 means nothing"):
        SparseAutoencoder.load(make_sae(activation=ReLU()).save(tmp_path / "relu.safetensors"), k=4)


def described(**changes: object) -> dict[str, object]:
    return {
        "version": 1,
        "activation": {"name": "topk", "k": 2, "variant": "signed"},
        "layer": 0,
        "source": {"location": "somewhere"},
    } | changes


@pytest.mark.parametrize(
    ("metadata", "tensors", "fault"),
    [
        (
            None,
            {},
            "of no known SAE format: it holds W_dec, W_enc, b_dec, b_enc with no settings.*'qscope_posttrain.sae'",
        ),
        ("{", {}, "not JSON"),
        ("[" * 100_000, {}, "not JSON"),
        ("[]", {}, "expected a JSON object, got list"),
        ("{}", {}, "format version None"),
        (json.dumps(described(version=2)), {}, "format version 2, but .* reads 1"),
        (json.dumps(described(more=1)), {}, "has the entries"),
        (json.dumps(described(layer="3")), {}, "layer is '3'"),
        (json.dumps(described(layer=True)), {}, "layer is True"),
        (json.dumps(described(activation={"name": "exec"})), {}, "unknown activation"),
        (json.dumps(described(activation={"name": "topk", "k": 99, "variant": "signed"})), {}, "k=99"),
        (json.dumps(described(activation={"name": "topk", "k": "2"})), {}, "k must be an integer"),
        (json.dumps(described(source={"location": 3})), {}, "not a description of an SAE source"),
        (json.dumps(described(source=None)), {}, "not a description of an SAE source"),
        (json.dumps(described()), {"W_dec": None}, "lacks W_dec; expected are W_dec, W_enc, b_dec, b_enc"),
        (json.dumps(described()), {"extra": torch.zeros(1)}, "has extra extra; expected"),
        (json.dumps(described()), {"activation.threshold": torch.zeros(8)}, "unexpected keyword argument 'threshold'"),
        (
            json.dumps(described()),
            {"W_dec": torch.zeros(4, 8)},
            r"W_dec is transposed: it has shape \[4, 8\], expected \[8, 4\]",
        ),
        (json.dumps(described()), {"b_enc": torch.zeros(8, dtype=torch.int64)}, "b_enc has dtype int64"),
        (json.dumps(described()), {"b_enc": torch.full((8,), float("nan"))}, "b_enc holds NaN"),
    ],
)
def test_faults_are_named(tmp_path: Path, metadata: str | None, tensors: dict[str, Tensor | None], fault: str) -> None:
    good = {"W_enc": torch.ones(8, 4), "b_enc": torch.ones(8), "W_dec": torch.ones(8, 4), "b_dec": torch.ones(4)}
    content = {name: tensor for name, tensor in (good | tensors).items() if tensor is not None}
    path = tmp_path / "bad.safetensors"
    save_file(content, path, metadata=None if metadata is None else {"qscope_posttrain.sae": metadata})
    with pytest.raises(ValueError, match=fault) as error:
        SparseAutoencoder.load(path)
    assert str(path) in str(error.value)
