"""Headers, directories and settings with anything in them: what comes out is an SAE or a mistake of the user's.

Nothing may be allocated that the file could not hold, whatever it claims. `make fuzz` looks further; what it finds
becomes an example here.
"""

from __future__ import annotations

import io
import json
import math
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from qscope_posttrain.errors import UserError
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

D_SAE, D_MODEL = 16, 4

fuzz = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def survives(path: Path) -> None:
    """Reading `path` gives an SAE or a refusal, and takes no memory to speak of."""
    status = Path("/proc/self/status")
    if status.exists():
        Path("/proc/self/clear_refs").write_text("5")
    before = _peak(status)
    reasons: list[str] = []
    for read in (lambda: SparseAutoencoder.load(path, k=3), lambda: SparseAutoencoder.rows(path, [0])):
        try:
            read()
        except UserError as error:
            reasons.append(str(error))
    assert all(str(path) in reason for reason in reasons)
    assert _peak(status) - before < 128 << 20


def _peak(status: Path) -> int:
    if not status.exists():
        return 0
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))


TENSORS = {
    "W_enc": torch.arange(1.0, 65.0).view(D_MODEL, D_SAE),
    "W_dec": torch.arange(1.0, 65.0).view(D_SAE, D_MODEL),
    "b_enc": torch.ones(D_SAE),
    "b_dec": torch.ones(D_MODEL),
}
SAE_LENS = {"d_in": D_MODEL, "d_sae": D_SAE, "architecture": "topk", "k": 3, "hook_name": "blocks.1.hook_resid_post"}
INTEGERS = st.integers(-2, 2) | st.integers(-(1 << 70), 1 << 70) | st.sampled_from([16, 4, 64, 256, 1 << 31, 1 << 63])
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
DTYPES = st.sampled_from(["F32", "F64", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X", ""])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": DTYPES | JSON,
        "shape": st.lists(INTEGERS, max_size=4) | JSON,
        "data_offsets": st.lists(INTEGERS, min_size=2, max_size=2) | JSON,
    },
)
NAMES = st.sampled_from([*TENSORS, "__metadata__", "threshold", "w_enc", "encoder.weight", "W_E", "W_D", "x"])


@pytest.mark.promise("Any bytes given as an SAE, a FeatureSet, a recipe, JSONL or a table are read or refused by name")
@fuzz
@given(changes=st.dictionaries(NAMES, ENTRIES | JSON | st.just("absent"), max_size=3), tail=st.integers(-300, 300))
def test_safetensors_headers(tmp_path: Path, changes: dict[str, Any], tail: int) -> None:
    content = save(TENSORS)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    for name, value in changes.items():
        good = header.get(name)
        header[name] = good | value if isinstance(good, dict) and isinstance(value, dict) else value
    text = json.dumps({name: value for name, value in header.items() if value != "absent"}).encode()
    data = content[8 + length :]
    data = data[:tail] if tail < 0 else data + b"\0" * tail
    (tmp_path / "sae_weights.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (tmp_path / "cfg.json").write_text(json.dumps(SAE_LENS))
    survives(tmp_path / "sae_weights.safetensors")


@pytest.mark.promise("Any bytes given as an SAE, a FeatureSet, a recipe, JSONL or a table are read or refused by name")
@fuzz
@given(claimed=st.integers(0, (1 << 64) - 1) | st.integers(0, 400), body=st.binary(max_size=200))
def test_safetensors_that_begin_with_anything(tmp_path: Path, claimed: int, body: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", claimed) + body)
    survives(tmp_path / "a.safetensors")


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, threshold=np.ones(D_SAE, np.float32), **{name: t.numpy() for name, t in TENSORS.items()})
    return stream.getvalue()


def pt(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


LINEAR = {"encoder.weight": TENSORS["W_dec"].clone(), "encoder.bias": torch.ones(D_SAE), "bias": torch.ones(D_MODEL)}
LINEAR["decoder.weight"] = TENSORS["W_enc"].clone()
FILES: dict[str, Callable[[], bytes]] = {
    "params.npz": npz,
    "layer0.sae.pt": lambda: pt(
        {"W_enc": TENSORS["W_dec"], "W_dec": TENSORS["W_enc"]} | {k: TENSORS[k] for k in ("b_enc", "b_dec")}
    ),
    "ae.pt": lambda: pt(LINEAR),
}


@pytest.mark.promise("Any bytes given as an SAE, a FeatureSet, a recipe, JSONL or a table are read or refused by name")
@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@fuzz
@given(data=st.data())
def test_zip_archives_with_bytes_changed(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = bytearray(FILES[name]())
    if name in ("layer0.sae.pt", "ae.pt"):
        assert torch.load(io.BytesIO(bytes(content)), weights_only=True)
    directory = content.rindex(b"PK\x05\x06")
    for _ in range(data.draw(st.integers(1, 4))):
        near_end = st.integers(max(0, directory - 700), len(content) - 1)
        at = data.draw(st.integers(0, len(content) - 1) | near_end)
        content[at] = data.draw(st.integers(0, 255))
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        survives(tmp_path / name)


@pytest.mark.promise("Any bytes given as an SAE, a FeatureSet, a recipe, JSONL or a table are read or refused by name")
@fuzz
@given(
    descr=st.sampled_from(["<f4", ">f4", "<f8", "|O", "<i8", "<U9", "<c8", "|V9", "<M8[s]", "f4,f4", ""]) | JSON,
    fortran=st.booleans() | JSON,
    shape=st.lists(INTEGERS, max_size=4).map(tuple) | JSON,
    compress=st.booleans(),
)
def test_numpy_headers(tmp_path: Path, descr: Any, fortran: Any, shape: Any, compress: bool) -> None:
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode() + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0" * 64
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(npz())) as good, zipfile.ZipFile(tmp_path / "params.npz", "w", method) as archive:
        for info in good.infolist():
            archive.writestr(info.filename, member if info.filename == "b_enc.npy" else good.read(info))
    survives(tmp_path / "params.npz")


SETTINGS = {
    "cfg.json": SAE_LENS | {"metadata": {}, "normalize_activations": "none", "activation_fn_kwargs": {}},
    "config.json": {
        "hook_point_in": "blocks.3.hook_resid_post",
        "d_model": D_MODEL,
        "expansion_factor": 4,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "trainer": {"dict_class": "AutoEncoder", "dict_size": D_SAE},
        "hf_hook_point_in": "model.layers.3.output",
    },
    "hyperparams.json": {
        "hook_point_in": "blocks.3.hook_resid_post",
        "d_model": D_MODEL,
        "d_sae": D_SAE,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.5,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 3.0, "out": 3.0},
    },
}
OLD_AND_NEW = {
    "cfg.json": [TENSORS],
    "config.json": [
        {"W_E": TENSORS["W_enc"], "b_E": torch.ones(D_SAE), "W_D": TENSORS["W_dec"], "b_D": torch.ones(D_MODEL)},
        {
            "w_enc": TENSORS["W_enc"],
            "w_dec": TENSORS["W_dec"],
            "b_enc": torch.ones(D_SAE),
            "b_dec": torch.ones(D_MODEL),
        },
    ],
    "hyperparams.json": [{k: v for k, v in LINEAR.items() if k != "bias"} | {"decoder.bias": torch.ones(D_MODEL)}],
}


STATED = sorted({key for stated in SETTINGS.values() for key in stated})


def write_settings(folder: Path, name: str, changes: dict[str, Any], layout: int = 0) -> Path:
    tensors = OLD_AND_NEW[name]
    (folder / "sae_weights.safetensors").write_bytes(save(tensors[layout % len(tensors)]))
    (folder / name).write_text(json.dumps(SETTINGS[name] | changes))
    return folder / "sae_weights.safetensors"


@pytest.mark.promise("Any bytes given as an SAE, a FeatureSet, a recipe, JSONL or a table are read or refused by name")
@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@fuzz
@given(changes=st.dictionaries(st.sampled_from(STATED), JSON, max_size=3), layout=st.integers(0, 1))
@example(changes={"jump_relu_threshold": 3.402823466385289e38}, layout=0)
def test_settings(tmp_path: Path, name: str, changes: dict[str, Any], layout: int) -> None:
    survives(write_settings(tmp_path, name, changes, layout))


NO_NUMBERS = [3.402823466385289e38, -1e39, 1e308, 10**400, 1e-46, math.inf, -math.inf, math.nan]
NO_NUMBERS += [True, "4", 1.5, -1, 2**53 + 1, 2**63, 10**30, [4]]
NUMBERS = ["d_in", "d_sae", "d_model", "k", "top_k", "jump_relu_threshold", "expansion_factor", "hook_head_index"]


@pytest.mark.slow
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_of_settings_that_do_not_fit(tmp_path: Path, name: str, value: Any) -> None:
    """Every number of every file of settings, one at a time, on its own and inside of its object."""
    changes: list[dict[str, Any]] = [{key: value} for key in NUMBERS]
    for key, stated in SETTINGS[name].items():
        if isinstance(stated, dict):
            changes += [{key: stated | {part: value}} for part in (*stated, "k", "dict_size", "layer")]
    for number, changed in enumerate(changes):
        survives(write_settings(tmp_path, name, {"act_fn": "jumprelu", **changed}, number))
        if "top_k" in changed:
            survives(write_settings(tmp_path, name, {"act_fn": "topk", **changed}, number))


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("key", ["threshold", "k"])
def test_numbers_of_our_own_file_that_do_not_fit(tmp_path: Path, key: str, value: Any) -> None:
    kind = {"threshold": "batchtopk", "k": "topk"}[key]
    for activation, layer in (({"name": kind, key: value}, 1), ({"name": "relu"}, value)):
        described = {"version": 1, "activation": activation, "layer": layer, "source": {"location": "x"}}
        tensors = TENSORS | {"W_enc": TENSORS["W_dec"].clone()}
        metadata = {"qscope_posttrain.sae": json.dumps(described)}
        (tmp_path / "own.safetensors").write_bytes(save(tensors, metadata))
        survives(tmp_path / "own.safetensors")
        if layer is value and type(value) is not int:
            with pytest.raises(UserError, match="layer"):
                SparseAutoencoder.load(tmp_path / "own.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39, 1.5, -3.0, 0.0])
def test_numbers_in_tensors_that_do_not_fit(tmp_path: Path, value: float) -> None:
    linear = {**{k: v for k, v in LINEAR.items() if k != "bias"}, "b_dec": torch.ones(D_MODEL)}
    number = torch.tensor(value, dtype=torch.float64)
    for changes, kind in (({"k": number}, "AutoEncoderTopK"), ({"k": number, "threshold": number}, "BatchTopKSAE")):
        (tmp_path / "ae.pt").write_bytes(pt(linear | changes))
        (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind}}))
        survives(tmp_path / "ae.pt")
        if kind == "AutoEncoderTopK":
            with pytest.raises(UserError, match="k"):
                SparseAutoencoder.load(tmp_path / "ae.pt")


@pytest.mark.promise("Any bytes given as an SAE, a FeatureSet, a recipe, JSONL or a table are read or refused by name")
@pytest.mark.slow
@fuzz
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@example(content=b"[" * 200_000)
@example(content=b'{"a": 1' + b"0" * sys.get_int_max_str_digits() + b"}")
def test_settings_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "sae_weights.safetensors").write_bytes(save(TENSORS))
    (tmp_path / "cfg.json").write_bytes(content)
    survives(tmp_path / "sae_weights.safetensors")
