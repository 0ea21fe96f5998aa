"""Checkpoints of our own with anything in them: they are gone on from, passed over, or refused by name."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qscope_posttrain.cli.training.interruption import STATE, last_checkpoint
from qscope_posttrain.cli.training.run import check_checkpoint
from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.chat import ChatCompletion, ChatRequest, Message
from qscope_posttrain.errors import UserError
from qscope_posttrain.features.sums import FORMAT, LayerSums, PassCheckpoint
from qscope_posttrain.sae.training import SAETrainingConfig
from qscope_posttrain.sae.training.parameters import calibrate
from qscope_posttrain.sae.training.records import TrainingState, checkpoints, read_checkpoint, write_checkpoint
from qscope_posttrain.sae.training.text_stream import StreamPosition
from qscope_posttrain.sae.training.update import LayerTraining

pytestmark = pytest.mark.promise("A checkpoint with anything in it is gone on from, passed over, or refused by name")
fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
INTEGERS = st.integers(-2, 3) | st.integers(-(1 << 70), 1 << 70) | st.sampled_from([10**400, 1 << 63])
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
DEEP = "[" * 100_000


def damaged(content: bytes, at: int, byte: int, cut: int) -> bytes:
    """The content with one byte changed, and its end cut off."""
    changed = bytearray(content)
    changed[at % len(changed)] = byte
    return bytes(changed[: len(changed) - cut])


def survives(path: Path, read: Callable[[], Any]) -> None:
    said = str(path)
    try:
        read()
    except UserError as error:
        said = str(error)
    assert str(path) in said


DAMAGE = {"at": st.integers(0, 1 << 14), "byte": st.integers(0, 255), "cut": st.just(0) | st.integers(0, 400)}


@pytest.mark.slow
@fuzz
@given(changes=st.dictionaries(st.sampled_from(["key", "medians", "batches", "1"]), JSON, max_size=2), **DAMAGE)
def test_sums_of_a_feature_pass(tmp_path: Path, changes: dict[str, Any], at: int, byte: int, cut: int) -> None:
    def empty() -> dict[int, LayerSums]:
        return {1: LayerSums.zeros(2, 3, None, True, torch.device("cpu"))}

    saved = PassCheckpoint(tmp_path / "pass", {"model": "m"}, {1: 2.0}, 0, 1)
    saved.write(empty(), 5)
    content = saved.path.read_bytes()
    if changes:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        header["__metadata__"][FORMAT] = json.dumps(json.loads(header["__metadata__"][FORMAT]) | changes)
        text = json.dumps(header).encode()
        saved.path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    else:
        saved.path.write_bytes(damaged(content, at, byte, cut))
    assert isinstance(saved.resume(empty()), int)


def test_sums_with_a_document_nested_too_deeply(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"1.tokens": torch.zeros(2)}, str(tmp_path / "pass"), metadata={FORMAT: DEEP})
    sums = {1: LayerSums.zeros(2, 3, None, True, torch.device("cpu"))}
    assert PassCheckpoint(tmp_path / "pass", {"model": "m"}, {1: 2.0}, 0, 1).resume(sums) == 0


SETTINGS = {"width": 16}
CONFIG = SAETrainingConfig(width=16, k=2, steps=4)
FIELDS = ["settings", "step", "block", "update", "position", "medians", "left_out", "seconds", "epoch", "digest"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of a tiny dictionary, with Adam's state in it."""
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    training = LayerTraining(0, calibrate(0, x), CONFIG)
    training.update(x, len(x), 0)
    folder = tmp_path_factory.mktemp("sae")
    write_checkpoint(
        folder, TrainingState(1, 0, 1, StreamPosition(), {0: 2.0}, {0: 0}, 1.0), {0: training}, SETTINGS, 2
    )
    return checkpoints(folder)[0]


@pytest.mark.slow
@fuzz
@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
    tensors=st.dictionaries(
        st.sampled_from(["center", "silent", "batch_threshold", "adam.W_enc.step", "adam.W_enc.exp_avg", "x"]),
        st.sampled_from(
            [torch.zeros(0), torch.zeros(2, 2), torch.zeros((), dtype=torch.int64), torch.zeros(16).half()]
        ),
        max_size=2,
    ),
    **DAMAGE,
)
def test_sae_training(tmp_path, trained, changes, tensors, at, byte, cut) -> None:
    from safetensors.torch import load_file, save_file

    place = tmp_path / trained.name
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(trained, place)
    content = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps(content | changes))
    file = place / "layer0.safetensors"
    if tensors:
        save_file(load_file(str(file)) | {name: value.clone() for name, value in tensors.items()}, str(file))
    elif not changes:
        file.write_bytes(damaged(file.read_bytes(), at, byte, cut))
    survives(place, lambda: read_checkpoint(place, SETTINGS, CONFIG, {0: torch.device("cpu")}))


def test_sae_training_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(DEEP)
    with pytest.raises(UserError, match="is not a checkpoint"):
        read_checkpoint(tmp_path, SETTINGS, CONFIG, {})


KEPT = ["epoch", "global_step", "max_steps", "log_history", "stateful_callbacks", "best_model_checkpoint", "x"]


@pytest.mark.slow
@fuzz
@given(state=JSON | st.dictionaries(st.sampled_from(KEPT), JSON, max_size=3), raw=st.none() | st.binary(max_size=40))
@example(state={}, raw=DEEP.encode())
@example(state={}, raw=b"9" * 5000)
def test_state_of_a_trainer(tmp_path: Path, state: Any, raw: bytes | None) -> None:
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
    (tmp_path / "checkpoint-2" / STATE).write_text("{}")
    newest = tmp_path / "checkpoint-10" / STATE
    newest.write_bytes(json.dumps(state).encode() if raw is None else raw)
    assert last_checkpoint(tmp_path) in (newest.parent, tmp_path / "checkpoint-2")
    training = SimpleNamespace(resume_from_checkpoint=str(newest.parent))
    recipe: Any = SimpleNamespace(training=training, output=tmp_path)
    survives(newest, lambda: check_checkpoint(recipe))


@pytest.mark.slow
@fuzz
@given(rows=st.lists(JSON | st.fixed_dictionaries({"key": JSON, "completion": JSON}), max_size=3), **DAMAGE)
@example(rows=[{"key": [], "completion": {}}], at=0, byte=0, cut=0)
def test_answers_of_an_endpoint(tmp_path: Path, rows: list[Any], at: int, byte: int, cut: int) -> None:
    path = tmp_path / "answers.jsonl"
    path.unlink(missing_ok=True)
    with CompletionCache(path) as cache:
        answer = ChatCompletion("a", "stop", 1, 1, "id")
        cache.put("k", {"model": "m"}, ChatRequest((Message("user", "q"),)), answer)
    more = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(path.read_bytes() + more if rows else damaged(path.read_bytes(), at, byte, cut))
    survives(path, lambda: CompletionCache(path).close())
