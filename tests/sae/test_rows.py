"""Rows are read without the dictionary: the same numbers as a full load, and memory and disk traffic to match."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from golden_sae import D_SAE, K
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qscope_posttrain.sae import loading, weights_file
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.weights_file import open_weights

MIB = 1 << 20


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, D_SAE - 1), min_size=1, max_size=40))
def test_rows_are_those_of_the_full_load(release_folder: Path, ids: list[int]) -> None:
    full = SparseAutoencoder.load(release_folder, layer=2, checksum=False).select(ids)
    rows = SparseAutoencoder.rows(release_folder, ids, layer=2)
    assert rows.feature_ids.tolist() == ids
    for name in ("encoder", "encoder_bias", "decoder"):
        assert torch.equal(getattr(rows, name), getattr(full, name))
    assert rows.layer == 2
    assert rows.source == full.source


def test_rows_of_a_native_file(make_sae: Callable[..., SparseAutoencoder], tmp_path: Path) -> None:
    sae = make_sae()
    rows = SparseAutoencoder.rows(sae.to(dtype=torch.float64).save(tmp_path / "a.safetensors"), [9, 0])
    assert torch.equal(rows.decoder, sae.W_dec[[9, 0]])
    assert torch.equal(rows.encoder, sae.W_enc[[9, 0]])
    assert rows.encoder.dtype == torch.float32
    assert rows.layer == 3


@pytest.mark.parametrize("block_bytes", [1, 3 * 4 * D_SAE, 1 << 30])
def test_columns_are_gathered_in_blocks(
    release_folder: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(loading, "_MAPPED_BYTES", block_bytes)
    rows = SparseAutoencoder.rows(release_folder, [1023, 4, 4], layer=0)
    full = SparseAutoencoder.load(release_folder, layer=0)
    assert torch.equal(rows.decoder, full.W_dec[[1023, 4, 4]])


def test_rows_need_no_k_but_good_ids(tmp_path: Path, qwen_tensors: dict[str, torch.Tensor]) -> None:
    file = tmp_path / "layer0.sae.pt"
    torch.save(qwen_tensors, file)
    assert len(SparseAutoencoder.rows(file, torch.tensor([3]))) == 1
    with pytest.raises(ValueError, match=r"\[1024\] are out of range: the dictionary has features 0\.\.1023"):
        SparseAutoencoder.rows(file, [1024])


def test_only_the_rows_read_have_to_be_finite(tmp_path: Path, qwen_tensors: dict[str, torch.Tensor]) -> None:
    qwen_tensors["W_dec"][3, 77] = float("nan")
    file = tmp_path / "layer0.sae.pt"
    torch.save(qwen_tensors, file)
    assert len(SparseAutoencoder.rows(file, [76, 78])) == 2
    with pytest.raises(ValueError, match=r"layer0\.sae\.pt: decoder of features \[77, 5\] holds NaN"):
        SparseAutoencoder.rows(file, [77, 5])
    with pytest.raises(ValueError, match="W_dec holds NaN"):
        SparseAutoencoder.load(file, k=K)


MEASURE = """
import json, os, sys
import torch
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.weights_file import open_weights

def status(file, key):
    return next(int(line.split()[1]) for line in open(f"/proc/self/{file}") if line.startswith(key + ":"))

small, big, cold, ids = sys.argv[1], sys.argv[2], sys.argv[3] == "cold", json.loads(sys.argv[4])
SparseAutoencoder.rows(small, [0])  # whatever is imported and allocated on first use
if cold:
    with open(big, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before, disk = status("status", "VmRSS"), status("io", "read_bytes")
rows = SparseAutoencoder.rows(big, ids)
print(json.dumps({
    "peak_bytes": 1024 * (status("status", "VmHWM") - before),
    "disk_bytes": status("io", "read_bytes") - disk,
    "sum": rows.decoder.double().sum().item() + rows.encoder.double().sum().item(),
}))
"""


def measure(small: Path, big: Path, cold: bool, ids: list[int]) -> dict[str, float]:
    """Growth of peak memory, and bytes read from the disk, while rows of `big` are read in a fresh process."""
    arguments = [str(small), str(big), "cold" if cold else "warm", json.dumps(ids)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write_big(folder: Path, d_sae: int, d_model: int) -> tuple[Path, Path]:
    """(a small file, a big one of 2 * 4 * d_sae * d_model bytes, on the disk and not only in its cache)."""
    small, big = folder / "layer0.sae.pt", folder / "layer1.sae.pt"
    for path, latents, width in ((small, 16, 8), (big, d_sae, d_model)):
        tensors = {
            "W_enc": torch.ones(latents, width),
            "W_dec": torch.ones(width, latents),
            "b_enc": torch.zeros(latents),
            "b_dec": torch.zeros(width),
        }
        tensors["W_enc"] += torch.arange(latents)[:, None]
        tensors["W_dec"] += torch.arange(latents)
        torch.save(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return small, big


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_memory_of_reading_rows_of_64_mib(tmp_path: Path, cold: bool) -> None:
    d_sae, d_model = 16384, 512
    small, big = write_big(tmp_path, d_sae, d_model)
    measured = measure(small, big, cold, [3, 9000])
    assert measured["sum"] == 2 * d_model * (4 + 9001)
    assert measured["peak_bytes"] < 24 * MIB, "64 MiB file; one 16 MiB block of pages and some slack"


@pytest.fixture(scope="module")
def half_a_gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    small, big = write_big(tmp_path_factory.mktemp("half_a_gigabyte"), 32768, 2048)
    yield small, big
    big.unlink()


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("ids", [[20000], [3, 20000], list(range(0, 32000, 1000))], ids=["1", "2", "32"])
def test_rows_of_half_a_gigabyte(half_a_gigabyte: tuple[Path, Path], ids: list[int]) -> None:
    small, big = half_a_gigabyte
    assert big.stat().st_size > 512 * MIB
    cold, warm = (measure(small, big, is_cold, ids) for is_cold in (True, False))
    assert cold["sum"] == warm["sum"] == 2 * 2048 * sum(number + 1 for number in ids)
    assert cold["peak_bytes"] < 40 * MIB
    assert warm["peak_bytes"] < 40 * MIB
    if len(ids) < 3:  # beyond, the column pages add up to W_dec
        assert cold["disk_bytes"] < (len(ids) * 8 + 24) * MIB, "8 MiB of column pages a feature, and file headers"
    assert cold["disk_bytes"] < 300 * MIB, "never W_enc"


@needs_linux
def test_only_pages_of_files_are_handed_back(tmp_path: Path, qwen_tensors: dict[str, torch.Tensor]) -> None:
    """Handing back memory that is not a file's would zero it, so what a library really mapped is looked up."""
    torch.save(qwen_tensors, tmp_path / "layer0.sae.pt")
    opened = open_weights(tmp_path / "layer0.sae.pt")
    assert opened.memory_mapped
    mapped_tensors = [tensor for tensor in opened.entries.values() if isinstance(tensor, torch.Tensor)]
    assert weights_file.lies_in_a_file(mapped_tensors)
    assert not weights_file.lies_in_a_file([*mapped_tensors, torch.ones(100)])


@pytest.mark.parametrize("memory_mapped", [True, False])
@pytest.mark.parametrize("block_bytes", [1, 5 * 4 * D_SAE, 1 << 30])
def test_blocks_are_copied_whole(
    release_folder: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, memory_mapped: bool
) -> None:
    monkeypatch.setattr(loading, "_MAPPED_BYTES", block_bytes)
    decoder = open_weights(release_folder / "layer0.sae.pt").tensor("W_dec", None, None)
    for view in (decoder.t()[10:300], decoder[3:9], decoder.t()[:1], decoder[:, :5].t()):
        before = view.clone()
        copy = loading.copy_block(view, memory_mapped)
        assert copy.is_contiguous()
        assert torch.equal(copy, before)
        assert torch.equal(view, before), "pages come again from the file"
