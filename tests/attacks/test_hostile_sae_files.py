"""Files that a user can be sent instead of an SAE: each is refused with a ValueError that names it."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.formats import qwen_scope

CANARY = "canary-of-the-sae-attack"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        "W_enc": torch.ones(32, 8),
        "W_dec": torch.ones(8, 32),
        "b_enc": torch.zeros(32),
        "b_dec": torch.zeros(8),
    }


@pytest.fixture
def good(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    path = tmp_path / "good" / "layer0.sae.pt"
    path.parent.mkdir()
    torch.save(tensors, path)
    assert SparseAutoencoder.load(path, k=2).d_sae == 32
    return path


def refuses(path: Path, says: str) -> None:
    """Full load and row read both raise a ValueError that names the file and matches `says`, at little memory."""
    for read in (lambda: SparseAutoencoder.load(path, k=2), lambda: SparseAutoencoder.rows(path, [0])):
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=says) as error:
                read()
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
        finally:
            tracemalloc.stop()
        assert path.name in str(error.value)


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes], compress: bool = False) -> Path:
    """Copy a torch archive record by record, with `change(name, content)` applied."""
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record)))
    return target


class Payload:
    """Runs a command when unpickled by a naive reader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder / CANARY),)


@pytest.mark.promise("A pickle in an SAE file never runs")
def test_pickle_that_runs_code(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "layer0.sae.pt"
    torch.save({**tensors, "b_dec": Payload(tmp_path)}, path)
    refuses(path, r"was refused: .*could run code.*weights_only=True")
    assert not (tmp_path / CANARY).exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / CANARY).exists(), "the payload is live: only the loader stood in its way"


@pytest.mark.promise("A pickle in an SAE file never runs")
def test_bare_pickle_that_runs_code(tmp_path: Path) -> None:
    path = tmp_path / "layer0.sae.pt"
    path.write_bytes(pickle.dumps(Payload(tmp_path)))
    refuses(path, "is not a torch.save archive")
    assert not (tmp_path / CANARY).exists()


def test_format_of_old_torch(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "layer0.sae.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    refuses(path, "is not a torch.save archive: .*torch before 1.6")


def test_objects_in_place_of_tensors(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = tmp_path / "layer0.sae.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    refuses(path, "was refused")
    torch.save({**tensors, "config": {"k": 50}}, path)
    refuses(path, "has extra config")
    torch.save({**tensors, "W_enc": tensors["W_enc"].to_sparse()}, path)
    refuses(path, "W_enc must be a dense tensor")
    torch.save({**tensors, "W_enc": tensors["W_enc"].to("meta")}, path)
    refuses(path, "W_enc must be a dense tensor with data")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_empty_file_and_pointer(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"layer0.sae.{suffix}"
    path.write_bytes(b"")
    refuses(path, "is empty")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 537000000\n")
    refuses(path, "Git LFS pointer")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("content", [b"\0", b"\0" * 4096, b"<html>404</html>", b"PK\x03\x04", b"\xff" * 100])
def test_garbage(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"layer0.sae.{suffix}"
    path.write_bytes(content)
    refuses(path, "is not a")


def test_truncation_anywhere(good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    path = tmp_path / "layer0.sae.pt"
    for length in range(1, len(content), 97):
        path.write_bytes(content[:length])
        refuses(path, "is not a torch.save archive: it is truncated")


def test_truncation_of_a_native_file_anywhere(good: Path, tmp_path: Path) -> None:
    whole = SparseAutoencoder.load(good, k=2).save(tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(1, len(whole), 97):
        path.write_bytes(whole[:length])
        refuses(path, "is not a valid")


@pytest.mark.slow
def test_no_flipped_byte_does_more_than_raise_value_error(good: Path, tmp_path: Path) -> None:
    """Every byte of directory and pickle in turn: the result is a ValueError, or still an SAE of four tensors."""
    content = good.read_bytes()
    path = tmp_path / "layer0.sae.pt"
    positions = [at for at in range(len(content)) if not 700 < at < len(content) - 900]
    for at in positions[::3]:
        damaged = bytearray(content)
        damaged[at] ^= 0x55
        path.write_bytes(damaged)
        try:
            sae = SparseAutoencoder.load(path, k=2, checksum=False)
        except ValueError as error:
            assert "layer0.sae.pt" in str(error)  # noqa: PT017 - raising is allowed here, not demanded
        else:
            assert (sae.d_sae, sae.d_model) == (32, 8)


@pytest.mark.promise("A file allocates no more than it holds, whatever it claims")
def test_tiny_file_that_claims_a_huge_tensor(tmp_path: Path) -> None:
    """Strides of 0 describe a terabyte in a few bytes; it would appear when the tensor is copied."""
    path = tmp_path / "layer0.sae.pt"
    latents, width = 1 << 22, 1 << 16
    expanded = {
        "W_enc": torch.zeros(1, 1).expand(latents, width),
        "W_dec": torch.zeros(1, 1).expand(width, latents),
        "b_enc": torch.zeros(1).expand(latents),
        "b_dec": torch.zeros(1).expand(width),
    }
    torch.save(expanded, path)
    assert path.stat().st_size < 10_000
    refuses(path, "W_enc claims the shape .*which no record of the file holds")


@pytest.mark.promise("A file allocates no more than it holds, whatever it claims")
@pytest.mark.parametrize("shape_too", [False, True])
def test_pickle_that_claims_more_than_its_record(good: Path, tmp_path: Path, shape_too: bool) -> None:
    """256 elements become 2**24: with memory-mapping, a read past the end of the file would kill the process."""

    def inflate(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        inflated = content.replace(b"M\x00\x01", b"J\x00\x00\x00\x01")
        assert inflated != content
        return inflated.replace(b"K K\x08\x86", b"J\x00\x00\x20\x00K\x08\x86") if shape_too else inflated

    refuses(rewrite(good, tmp_path / "layer0.sae.pt", inflate), "which no record .* holds|was refused: it is damaged")


@pytest.mark.promise("A file allocates no more than it holds, whatever it claims")
def test_compressed_records(good: Path, tmp_path: Path) -> None:
    """A deflated record is how a zip bomb is packed; torch.save never writes one."""
    bomb = tmp_path / "layer0.sae.pt"
    rewrite(good, bomb, lambda name, content: content + b"\0" * (1 << 19), compress=True)
    refuses(bomb, "holds compressed records")


def test_huge_pickle(good: Path, tmp_path: Path) -> None:
    path = rewrite(
        good,
        tmp_path / "layer0.sae.pt",
        lambda name, content: content + b"\0" * (2 << 20) if name.endswith("data.pkl") else content,
    )
    refuses(path, "holds a pickle of .* bytes")


def test_thousands_of_records(good: Path, tmp_path: Path) -> None:
    path = rewrite(good, tmp_path / "layer0.sae.pt", lambda name, content: content)
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(1000):
            archive.writestr(f"archive/data/x{number}", b"")
    refuses(path, "it has 10.. records")


def test_two_pickles(good: Path, tmp_path: Path) -> None:
    path = rewrite(good, tmp_path / "layer0.sae.pt", lambda name, content: content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps(Payload(tmp_path)))
    refuses(path, "not a torch.save archive of a few tensors")


def test_other_byte_order(good: Path, tmp_path: Path) -> None:
    path = rewrite(
        good,
        tmp_path / "layer0.sae.pt",
        lambda name, content: b"big" if name.endswith("byteorder") else content,
    )
    refuses(path, "other byte order")


def test_torch_with_a_known_hole_refuses_pickles(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    refuses(good, "torch 2.9.1 can be attacked.*use torch 2.10")
    assert qwen_scope.LAYOUT.format == "qwen_scope"


def safetensors_bytes(header: object, data: bytes = b"", claimed: int | None = None) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


@pytest.mark.parametrize(
    "content",
    [
        safetensors_bytes(b"{}", claimed=1 << 63),
        safetensors_bytes(b"{}", claimed=(1 << 64) - 1),
        safetensors_bytes(b"{}", claimed=50 << 20),
        safetensors_bytes(b"{" + b" " * (2 << 20) + b"}"),
        safetensors_bytes(b"[" * 100_000),
        safetensors_bytes(b"not json"),
        safetensors_bytes({"W_enc": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 8]}}, b"\0" * 8),
        safetensors_bytes({"W_enc": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 40]}}, b"\0" * 8),
        safetensors_bytes({"W_enc": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"\0" * 8),
        safetensors_bytes({"W_enc": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, b"\0" * 8),
        safetensors_bytes(
            {
                "W_enc": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "W_dec": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            b"\0" * 12,
        ),
        safetensors_bytes({"W_enc": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 64),
    ],
    ids=[
        "header-2^63",
        "header-2^64-1",
        "header-longer-than-file",
        "header-above-cap",
        "nested-header",
        "no-json",
        "shape-overflow",
        "offset-outside",
        "offset-reversed",
        "offset-negative",
        "overlap",
        "data-without-owner",
    ],
)
def test_safetensors_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "layer0.sae.safetensors"
    path.write_bytes(content)
    refuses(path, "is not a valid")


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "layer0.sae.pt").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no file named"):
        SparseAutoencoder.load(tmp_path, layer=0, k=2)


def test_a_file_object_in_memory_is_no_source() -> None:
    with pytest.raises(TypeError):
        SparseAutoencoder.load(io.BytesIO(b""), k=2)  # type: ignore[arg-type]
