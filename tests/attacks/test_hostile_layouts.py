"""Broken and hostile files in the layouts of other libraries: each is refused for the reason it deserves."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qscope_posttrain.sae import layout, weights_file
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.layout import choose

D_SAE, D_MODEL = 32, 8
CANARY = "canary-of-the-layout-attack"


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder / CANARY),)


def refuses(source: Path, says: str) -> None:
    """Whole load and row read raise an error that names the file and matches `says`, without much memory."""
    before = peak_bytes(reset=True)
    for read in (SparseAutoencoder.load, lambda path: SparseAutoencoder.rows(path, [0])):
        with pytest.raises(ValueError, match=says) as error:
            read(source)
        assert str(source if source.is_dir() else source.parent) in str(error.value)
    assert peak_bytes() - before < 64 << 20


def peak_bytes(reset: bool = False) -> int:
    """Largest resident memory of this process since the last reset; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))


# --- numpy archives -----------------------------------------------------------------------------------------------


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=True)
    return stream.getvalue()


def gemma(**changes: Any) -> dict[str, bytes]:
    """Members of a good file, with some replaced: an array, bytes as they are, or None to leave it out."""
    arrays: dict[str, Any] = {
        "W_enc": np.ones((D_MODEL, D_SAE), np.float32),
        "W_dec": np.ones((D_SAE, D_MODEL), np.float32),
        "b_enc": np.ones(D_SAE, np.float32),
        "b_dec": np.ones(D_MODEL, np.float32),
        "threshold": np.ones(D_SAE, np.float32),
    }
    arrays |= changes
    named = {f"{name}.npy" if "." not in name else name: value for name, value in arrays.items() if value is not None}
    return {name: value if isinstance(value, bytes) else npy(value) for name, value in named.items()}


def write_npz(folder: Path, members: dict[str, bytes], compress: bool = False) -> Path:
    path = folder / "layer_3" / "params.npz"
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def header(text: str) -> bytes:
    body = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


OBJECTS = np.array([{"a": 1}] * D_SAE, dtype=object)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"b_enc": OBJECTS}, "holds pickled objects, which could run code"),
        ({"b_enc": np.ones(D_SAE, ">f4")}, r"b_enc\.npy is of the other byte order"),
        ({"b_enc": np.ones(D_SAE, "U4")}, r"b_enc\.npy has the dtype <U4"),
        ({"b_enc": np.ones(D_SAE, np.int32)}, "b_enc has dtype int32"),
        ({"b_enc": np.ones(D_SAE, np.float128) if hasattr(np, "float128") else OBJECTS}, "dtype|objects"),
        ({"b_enc": np.full(D_SAE, np.nan, np.float32)}, "NaN or infinite"),
        ({"W_dec": np.full((D_SAE, D_MODEL), np.inf, np.float32)}, "NaN or infinite"),
        ({"W_enc": np.ones((D_SAE, D_MODEL), np.float32)}, "W_enc is transposed"),
        ({"W_dec": np.ones((D_MODEL, D_SAE), np.float32)}, "W_dec is transposed"),
        ({"W_enc": np.ones((D_MODEL, 31), np.float32)}, r"W_enc has shape \[8, 31\], expected \[8, 32\]"),
        ({"b_dec": np.ones(9, np.float32)}, r"W_enc has shape \[8, 32\], expected \[9, 32\]"),
        ({"b_enc": np.ones(D_MODEL, np.float32), "b_dec": np.ones(D_SAE, np.float32)}, "is transposed"),
        ({"b_enc": np.ones((0,), np.float32)}, r"b_enc has shape \[0\]"),
        ({"threshold": None}, "lacks threshold"),
        ({"more": np.ones(3, np.float32)}, "has extra more"),
        (
            {"b_enc": header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }")},
            "claims the shape",
        ),
        ({"b_enc": header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }")}, "claims the shape"),
        (
            {"b_enc": header("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2}")},
            "not a valid .npz|Cannot parse",
        ),
        ({"b_enc": header("__import__('os').system('true')")}, "not a valid|Cannot parse|not a dictionary"),
        (
            {"b_enc": header("{'descr': '<f4'," + " " * 20_000 + "'fortran_order': False, 'shape': (1,)}")},
            "not a valid|large",
        ),
        ({"b_enc": b"\x93NUMPY\x09\x00"}, "is a .npy of version"),
        ({"b_enc": b"not an array"}, "magic string|not a valid"),
        ({"evil.txt": b"x"}, "not all of .* are .npy"),
        ({f"x{i}": np.ones(1, np.float32) for i in range(100)}, "has 105 members"),
    ],
)
def test_numpy_archives(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    refuses(write_npz(tmp_path, gemma(**changes)), says)


def test_the_good_one_is_good(tmp_path: Path) -> None:
    assert SparseAutoencoder.load(write_npz(tmp_path, gemma())).d_sae == D_SAE
    fortran = gemma(W_enc=np.asfortranarray(np.arange(D_MODEL * D_SAE, dtype=np.float32).reshape(D_MODEL, D_SAE)))
    assert SparseAutoencoder.load(write_npz(tmp_path, fortran)).W_enc[3, 2] == 2 * D_SAE + 3


@pytest.mark.promise("A pickle in an SAE file never runs")
def test_pickled_objects_do_not_run(tmp_path: Path) -> None:
    array = np.empty(1, dtype=object)
    array[0] = Payload(tmp_path)
    path = write_npz(tmp_path, gemma(b_enc=array))
    refuses(path, "holds pickled objects")
    assert not (tmp_path / CANARY).exists()
    np.load(path, allow_pickle=True)["b_enc"]
    assert (tmp_path / CANARY).exists(), "the payload is live: only the loader stood in its way"


@pytest.mark.promise("A file allocates no more than it holds, whatever it claims")
def test_numpy_archive_that_unpacks_to_a_gigabyte(tmp_path: Path) -> None:
    bomb = header("{'descr': '<f4', 'fortran_order': False, 'shape': (67108864,), }") + b"\0" * (256 << 20)
    path = write_npz(tmp_path, gemma(b_enc=bomb), compress=True)
    del bomb
    assert path.stat().st_size < 1 << 20
    refuses(path, "claims to hold .* weights do not compress like that")


def test_numpy_archive_cut_anywhere(tmp_path: Path) -> None:
    path = write_npz(tmp_path, gemma())
    content = path.read_bytes()
    for length in range(1, len(content), 61):
        path.write_bytes(content[:length])
        refuses(path, "is not a valid .npz|is not a torch.save")


def test_numpy_archive_whose_directory_lies(tmp_path: Path) -> None:
    """The same name twice; a member that begins in the middle of another."""
    path = write_npz(tmp_path, gemma())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("b_enc.npy", npy(np.zeros(D_SAE, np.float32)))
    refuses(path, "or some twice")
    path = write_npz(tmp_path, gemma())
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 42 : entry + 46] = struct.pack("<I", 7)
    path.write_bytes(content)
    refuses(path, "is not a valid .npz")


# --- safetensors and their settings ---------------------------------------------------------------------------------


def sae_lens_folder(folder: Path, settings: bytes | dict[str, Any] | None = None, **tensors: Any) -> Path:
    good = {"W_enc": torch.ones(D_MODEL, D_SAE), "W_dec": torch.ones(D_SAE, D_MODEL)}
    good |= {"b_enc": torch.ones(D_SAE), "b_dec": torch.ones(D_MODEL)}
    kept = {name: tensor for name, tensor in (good | tensors).items() if tensor is not None}
    save_file(kept, folder / "sae_weights.safetensors")
    if not isinstance(settings, bytes):
        stated = {"d_in": D_MODEL, "d_sae": D_SAE, "architecture": "topk", "k": 3} | (settings or {})
        settings = json.dumps({key: value for key, value in stated.items() if value != "absent"}).encode()
    (folder / "cfg.json").write_bytes(settings)
    return folder / "sae_weights.safetensors"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (b"", "cfg.json: not JSON"),
        (b"{", "cfg.json: not JSON"),
        (b"\xff\xfe{}", "cfg.json: not JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"[" * 100_000, "cfg.json: not JSON"),
        (b'{"a":' * 100_000, "cfg.json: not JSON"),
        (b'{"d_in": 8, "d_sae": 32, "d_sae": 8}', "the key 'd_sae' occurs twice"),
        (b'{"d_in": 8, "d_sae": 32, "k": ' + b"9" * 5000 + b"}", "cfg.json: not JSON|must be an integer"),
        (b" " * (2 << 20), "settings of an SAE have a few thousand"),
        ({"d_sae": 64}, r"b_enc has shape \[32\], expected \[64\]"),
        ({"d_sae": 8, "d_in": 32}, r"b_enc has shape \[32\], expected \[8\]"),
        ({"d_sae": -32}, "d_sae in cfg.json must be an integer from 1, got -32"),
        ({"d_sae": 1 << 62}, r"b_enc has shape \[32\], expected \[4611686018427387904\]"),
        ({"d_sae": 32.0}, "d_sae in cfg.json must be an integer"),
        ({"d_sae": True}, "d_sae in cfg.json must be an integer"),
        ({"d_sae": {"a": 1}}, "d_sae in cfg.json must be an integer"),
        ({"d_sae": "absent"}, "it is of no known SAE format"),
        ({"k": 33}, "TopK keeps k=33 latents, but the dictionary has only 32"),
        ({"k": 0}, "k in cfg.json must be an integer from 1, got 0"),
        ({"k": -1}, "k in cfg.json must be an integer from 1, got -1"),
        ({"k": None}, "its architecture is 'topk', but cfg.json lacks k"),
        ({"k": "3"}, "k in cfg.json must be an integer"),
        ({"architecture": "../../etc"}, "its architecture is '../../etc'"),
        ({"architecture": "abstopk"}, "its architecture is 'abstopk'; known are"),
        ({"architecture": "jumprelu"}, "lacks threshold"),
        ({"architecture": "gated"}, "lacks b_gate, b_mag, r_mag"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input in cfg.json must be true or false"),
        ({"normalize_activations": ["none"]}, "normalize_activations is"),
        ({"normalize_activations": "expected_average_only_in"}, "whose factor is not in the file"),
        ({"metadata": {"hook_name": "blocks.-1.hook_resid_post"}}, "a site of unknown meaning"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "the embedding, before any layer"),
        ({"metadata": {"hook_name": "blocks.9999999999.hook_resid_post"}}, "a site of unknown meaning"),
        ({"metadata": {"hook_name": 3}}, "hook_name in metadata of cfg.json must be a text"),
        ({"metadata": "x"}, "metadata in cfg.json must be an object"),
        ({"hook_name": "blocks.3.attn.hook_z", "hook_head_index": 0}, "heads of an attention layer|attention"),
        ({"reshape_activations": "hook_z"}, "heads of an attention layer"),
    ],
)
def test_settings_that_lie(tmp_path: Path, settings: bytes | dict[str, Any], says: str) -> None:
    refuses(sae_lens_folder(tmp_path, settings), says)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"W_enc": torch.ones(D_SAE, D_MODEL)}, "W_enc is transposed"),
        ({"W_dec": None}, "no known SAE format"),
        ({"b_enc": torch.ones(D_SAE, dtype=torch.int64)}, "b_enc has dtype int64"),
        ({"b_enc": torch.full((D_SAE,), float("nan"))}, "NaN or infinite"),
        ({"threshold": torch.ones(D_SAE)}, "has extra threshold"),
        ({"scaling_factor": torch.full((D_SAE,), 2.0)}, "do not enable it"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, tensors: dict[str, Any], says: str) -> None:
    refuses(sae_lens_folder(tmp_path, None, **tensors), says)


def test_factor_that_lies(tmp_path: Path) -> None:
    path = sae_lens_folder(tmp_path, {"normalize_activations": "expected_average_only_in"})
    for factor, says in ((0, "above 0"), (-1, "above 0"), ("1", "finite number"), (float("nan"), "finite number")):
        (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
        refuses(path, f"scaling_factor in activation_scaler.json must be .*{says}")
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.5}))
    with pytest.raises(ValueError, match=r"input_scale=0\.7 was given, but activation_scaler\.json says 0\.5"):
        SparseAutoencoder.load(path, input_scale=0.7)


def test_header_with_a_name_twice(tmp_path: Path) -> None:
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f'{{"W_enc":{entry},"W_enc":{entry}}}'.encode()
    path = tmp_path / "sae.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    refuses(path, "the key 'W_enc' occurs twice")


def test_header_of_thousands_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "sae.safetensors"
    save_file({f"t{i}": torch.zeros(1) for i in range(2000)}, path)
    refuses(path, "it has 2000 tensors, at most")


# --- torch archives -------------------------------------------------------------------------------------------------


def ae_folder(folder: Path, trainer: dict[str, Any] | None = None, **tensors: Any) -> Path:
    good = {"encoder.weight": torch.ones(D_SAE, D_MODEL), "encoder.bias": torch.ones(D_SAE)}
    good |= {"decoder.weight": torch.ones(D_MODEL, D_SAE), "b_dec": torch.ones(D_MODEL), "k": torch.tensor(3)}
    torch.save({name: tensor for name, tensor in (good | tensors).items() if tensor is not None}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK"} | (trainer or {})}))
    return folder / "ae.pt"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"encoder.weight": torch.ones(1, 1).expand(D_SAE, D_MODEL)}, "which no record of the file holds"),
        ({"encoder.weight": torch.ones(D_MODEL, D_SAE)}, "encoder.weight is transposed"),
        ({"k": torch.tensor(33)}, "TopK keeps k=33"),
        ({"k": torch.tensor(-3)}, "k must be at least 1"),
        ({"k": torch.tensor(float("nan"))}, "NaN|cannot convert"),
        ({"k": torch.ones(7)}, "k must be a tensor of one number"),
        ({"k": "3"}, "k must be a tensor of one number"),
        ({"encoder.bias": {"x": torch.ones(3)}}, "encoder.bias must be a tensor, got dict"),
        ({"decoder.weight": None}, "lacks|no known SAE format"),
    ],
)
def test_torch_archives(tmp_path: Path, tensors: dict[str, Any], says: str) -> None:
    refuses(ae_folder(tmp_path, None, **tensors), says)


@pytest.mark.promise("A pickle in an SAE file never runs")
def test_torch_archive_in_a_wrapper_that_runs_code(tmp_path: Path) -> None:
    torch.save({"sae": {"W_E": Payload(tmp_path)}, "version": "2"}, tmp_path / "sae_weights.pt")
    refuses(tmp_path / "sae_weights.pt", "was refused: .*could run code")
    assert not (tmp_path / CANARY).exists()


# --- names, folders and mislabelled files ---------------------------------------------------------------------------


def test_a_container_in_the_name_of_another(tmp_path: Path) -> None:
    npz = write_npz(tmp_path, gemma())
    as_safetensors = tmp_path / "sae.safetensors"
    as_safetensors.write_bytes(npz.read_bytes())
    refuses(as_safetensors, "is not a valid")
    safetensors = sae_lens_folder(tmp_path)
    as_npz = tmp_path / "params.npz"
    as_npz.write_bytes(safetensors.read_bytes())
    refuses(as_npz, "is not a valid .npz archive")


def test_layer_of_the_folder_and_of_the_settings(tmp_path: Path) -> None:
    folder = tmp_path / "layers.4"
    folder.mkdir()
    refuses(sae_lens_folder(folder, {"metadata": {"hook_name": "blocks.5.hook_resid_post"}}), "by its path .* layer 4")


def test_folders_that_link_to_themselves_or_hold_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae_lens_folder(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert SparseAutoencoder.load(tmp_path).d_sae == D_SAE
    monkeypatch.setattr(layout, "_MAX_FILES", 2)
    with pytest.raises(ValueError, match="holds more than 2 files: give a folder nearer to the SAE"):
        SparseAutoencoder.load(tmp_path)


@pytest.mark.promise("A name from a hub, a folder or a file never leaves its folder")
@pytest.mark.parametrize(
    "name", ["../layer1.sae.pt", "/layer1.sae.pt", "a/../layer1.sae.pt", "a//layer1.sae.pt", "~/ae.pt"]
)
def test_names_that_leave_their_folder(name: str) -> None:
    with pytest.raises(FileNotFoundError):
        choose([name], None, "here")


@pytest.mark.promise("A name from a hub, a folder or a file never leaves its folder")
@pytest.mark.parametrize("source", ["../etc/passwd", "owner/name/../../x", "owner/name//x", "owner", "a/b/c d"])
def test_sources_that_are_no_repository(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="no SAE at"):
        SparseAutoencoder.load(source, layer=1)


def test_settings_above_the_weights_are_read_for_checkpoints_only(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    path = sae_lens_folder(folder)
    (folder / "cfg.json").rename(tmp_path / "cfg.json")
    refuses(path, "no known SAE format: .* with no settings beside it")


def refusal_readers() -> list[Callable[[Path], object]]:
    return [weights_file.open_weights, SparseAutoencoder.load]


@pytest.mark.promise("A device or a pipe in place of a file does not hang a command")
@pytest.mark.parametrize("read", refusal_readers())
def test_devices_and_pipes_are_no_files(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "ae.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "ae.pt")


def test_sparsify_groupmax_is_no_topk(tmp_path: Path) -> None:
    tensors = {"encoder.weight": torch.ones(D_SAE, D_MODEL), "encoder.bias": torch.ones(D_SAE)}
    save_file(
        tensors | {"W_dec": torch.ones(D_SAE, D_MODEL), "b_dec": torch.ones(D_MODEL)}, tmp_path / "sae.safetensors"
    )
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D_MODEL, "num_latents": D_SAE, "activation": "groupmax"}))
    refuses(tmp_path / "sae.safetensors", "its activation is 'groupmax'; known is topk")
