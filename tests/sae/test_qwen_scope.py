from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from golden_sae import D_MODEL, D_SAE, RELEASE, K
from torch import Tensor

from qscope_posttrain.sae.activations import TopK
from qscope_posttrain.sae.autoencoder import SparseAutoencoder


def write(path: Path, tensors: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return path


@pytest.mark.promise(
    "Published layouts (Qwen-Scope, Gemma Scope, Llama Scope, lm-saes) are read as an independent reference writes them"
)
def test_parity_with_the_published_formula(release_folder: Path, qwen_tensors: dict[str, Tensor]) -> None:
    """Encode of the model card and decode of SAELens, written out on the tensors as they lie in the file."""
    sae = SparseAutoencoder.load(release_folder, layer=5)
    x = 2 * torch.randn(200, D_MODEL)
    pre = x @ qwen_tensors["W_enc"].T + qwen_tensors["b_enc"]
    top = pre.topk(K, dim=-1)
    assert (top.values > 0).all(), "the case on which all published variants agree"
    acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    values, indices = sae.encode(x)
    torch.testing.assert_close(values, top.values, rtol=1e-6, atol=1e-5)
    assert torch.equal(indices.long(), top.indices)
    x_hat = acts @ qwen_tensors["W_dec"].T + 5.0
    torch.testing.assert_close(sae.decode(values, indices), x_hat, rtol=1e-5, atol=1e-4)


def test_everything_the_place_says_is_kept(release_folder: Path) -> None:
    file = release_folder / "layer2.sae.pt"
    sae = SparseAutoencoder.load(file, k=K, layer=2, d_model=D_MODEL)
    assert (sae.d_sae, sae.d_model, sae.layer, sae.activation) == (D_SAE, D_MODEL, 2, TopK(K))
    assert sae.dtype == torch.float32
    assert sae.source.location == str(release_folder)
    assert (sae.source.file, sae.source.format, sae.source.release) == ("layer2.sae.pt", "qwen_scope", RELEASE)
    assert sae.source.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert SparseAutoencoder.load(file, checksum=False).source.sha256 is None


def test_the_loaded_sae_does_not_depend_on_the_file(release_folder: Path) -> None:
    file = release_folder / "layer0.sae.pt"
    sae = SparseAutoencoder.load(file)
    before = sae.W_dec.clone()
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(sae.W_dec, before)
    assert sae.W_dec.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_dtypes(tmp_path: Path, qwen_tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in qwen_tensors.items()}
    file = write(tmp_path / "layer0.sae.pt", stored)
    sae = SparseAutoencoder.load(file, k=3)
    assert sae.dtype == torch.float32
    assert torch.equal(sae.W_enc, stored["W_enc"].float())
    assert SparseAutoencoder.load(file, k=3, dtype=torch.float64).dtype == torch.float64


def test_k_is_given_or_parsed_and_never_contradicted(
    tmp_path: Path, release_folder: Path, qwen_tensors: dict[str, Tensor]
) -> None:
    bare = write(tmp_path / "plain" / "layer0.sae.pt", qwen_tensors)
    with pytest.raises(ValueError, match=r"k is not in the file.*give it with k=") as error:
        SparseAutoencoder.load(bare)
    assert str(bare) in str(error.value)
    assert SparseAutoencoder.load(bare, k=7).activation == TopK(7)
    with pytest.raises(ValueError, match=f"{RELEASE} says k=8, the caller says k=50"):
        SparseAutoencoder.load(release_folder, layer=0, k=50)
    deeper = write(release_folder / "copies" / "layer0.sae.pt", qwen_tensors)
    assert SparseAutoencoder.load(deeper).activation == TopK(8)
    with pytest.raises(ValueError, match="k=2000 latents, but the dictionary has only 1024"):
        SparseAutoencoder.load(bare, k=2000)
    with pytest.raises(ValueError, match="k must be at least 1"):
        SparseAutoencoder.load(bare, k=0)


def test_layer_by_folder_and_by_file(release_folder: Path) -> None:
    assert SparseAutoencoder.load(release_folder, layer=5).b_dec[0] == 5
    with pytest.raises(ValueError, match=r"holds layers 0\.\.2, 5: say which one"):
        SparseAutoencoder.load(release_folder)
    with pytest.raises(ValueError, match=r"has no layer 3; it holds layers 0\.\.2, 5"):
        SparseAutoencoder.load(release_folder, layer=3)
    with pytest.raises(ValueError, match=r"layer 3 was asked for, but by its name .*layer5\.sae\.pt holds layer 5"):
        SparseAutoencoder.load(release_folder / "layer5.sae.pt", layer=3)
    with pytest.raises(ValueError, match="integer from 0, got -1"):
        SparseAutoencoder.load(release_folder, layer=-1)


def test_the_only_layer_of_a_folder_needs_no_number(tmp_path: Path, qwen_tensors: dict[str, Tensor]) -> None:
    write(tmp_path / "layer17.sae.pt", qwen_tensors)
    assert SparseAutoencoder.load(tmp_path, k=1).layer == 17


def test_file_name_without_a_layer(tmp_path: Path, qwen_tensors: dict[str, Tensor]) -> None:
    file = write(tmp_path / "mine.pt", qwen_tensors)
    assert SparseAutoencoder.load(file, k=1).layer is None
    assert SparseAutoencoder.load(file, k=1, layer=4).layer == 4


def test_wrong_model_or_width(tmp_path: Path, release_folder: Path, qwen_tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="width 24, but the model has 4096"):
        SparseAutoencoder.load(release_folder, layer=0, d_model=4096)
    with pytest.raises(ValueError, match="width 24, but the model has 4096"):
        SparseAutoencoder.rows(release_folder, [0], layer=0, d_model=4096)
    other = tmp_path / "SAE-Res-Tiny-1M-Base-W32K-L0_8" / "layer0.sae.pt"
    with pytest.raises(ValueError, match=r"holds 1024 latents, but its release .*W32K-L0_8 has 32768"):
        SparseAutoencoder.load(write(other, qwen_tensors))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: {**t, "W_enc": t["W_dec"], "W_dec": t["W_enc"]}, r"W_enc and W_dec \(or b_enc and b_dec\) are swap"),
        (lambda t: {**t, "b_enc": t["b_dec"], "b_dec": t["b_enc"]}, r"W_enc and W_dec \(or b_enc and b_dec\) are swap"),
        (lambda t: {**t, "W_dec": t["W_dec"].T.contiguous()}, "W_dec is transposed"),
        (lambda t: {**t, "W_enc": t["W_enc"].T.contiguous()}, "W_enc is transposed"),
        (lambda t: {**t, "W_enc": t["W_enc"][:100]}, "the shapes do not belong together"),
        (lambda t: {**t, "b_enc": t["b_enc"][:, None]}, r"b_enc has shape \[1024, 1\]"),
        (lambda t: {key: t[key] for key in ("W_enc", "b_enc", "b_dec")}, "lacks W_dec; expected are W_dec, W_enc"),
        (lambda t: {**t, "threshold": t["b_enc"]}, "has extra threshold"),
        (lambda t: {"state_dict": t}, "lacks W_dec, W_enc, b_dec, b_enc and has extra state_dict"),
        (lambda t: list(t.values()), "holds a list"),
        (lambda t: {**t, "b_dec": t["b_dec"].to(torch.int32)}, "b_dec has dtype int32"),
        (lambda t: {**t, "b_dec": t["b_dec"].to(torch.complex64)}, "b_dec has dtype complex64"),
        (lambda t: {**t, "b_dec": 3.0}, "b_dec must be a tensor, got float"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_structural_faults_are_named(tmp_path: Path, qwen_tensors: dict[str, Tensor], change, fault: str) -> None:  # type: ignore[no-untyped-def]
    file = write(tmp_path / "layer0.sae.pt", change(qwen_tensors))
    for read in (lambda: SparseAutoencoder.load(file, k=K), lambda: SparseAutoencoder.rows(file, [0])):
        with pytest.raises(ValueError, match=fault) as error:
            read()
        assert str(file) in str(error.value)


def test_square_matrices_are_refused_and_the_reason_said(tmp_path: Path) -> None:
    square = {"W_enc": torch.eye(8), "W_dec": torch.eye(8), "b_enc": torch.zeros(8), "b_dec": torch.zeros(8)}
    with pytest.raises(ValueError, match="do not show their orientation"):
        SparseAutoencoder.load(write(tmp_path / "layer0.sae.pt", square), k=2)


@pytest.mark.parametrize("key", ["W_enc", "W_dec", "b_enc", "b_dec"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(tmp_path: Path, qwen_tensors: dict[str, Tensor], key: str, value: float) -> None:
    tensors = {name: tensor.clone() for name, tensor in qwen_tensors.items()}
    tensors[key].view(-1)[7] = value
    file = write(tmp_path / "layer0.sae.pt", tensors)
    with pytest.raises(ValueError, match=f"layer0.sae.pt: {key} holds NaN or infinite values"):
        SparseAutoencoder.load(file, k=K)


def test_tensors_that_are_views_or_parameters_are_read_right(tmp_path: Path, qwen_tensors: dict[str, Tensor]) -> None:
    """A file may hold a transposed view of a contiguous matrix, or parameters: the values count, not their strides."""
    stored = {
        **qwen_tensors,
        "W_dec": qwen_tensors["W_dec"].T.contiguous().T,
        "W_enc": torch.nn.Parameter(qwen_tensors["W_enc"].T.contiguous().T),
    }
    file = write(tmp_path / "layer0.sae.pt", stored)
    sae = SparseAutoencoder.load(file, k=K)
    assert torch.equal(sae.W_dec, qwen_tensors["W_dec"].T)
    assert torch.equal(sae.W_enc, qwen_tensors["W_enc"])
    assert not sae.W_enc.requires_grad
    rows = SparseAutoencoder.rows(file, [9, 900])
    assert torch.equal(rows.encoder, qwen_tensors["W_enc"][[9, 900]])
    assert torch.equal(rows.decoder, qwen_tensors["W_dec"].T[[9, 900]])
