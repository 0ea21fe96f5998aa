"""Training on a stream: a run that is killed and goes on equals one that was not, and says what it did."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sae_training_case import LAYERS, STREAM, tensors, train

from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.training import SAETrainingConfig
from qscope_posttrain.sae.training.config import RunConfig
from qscope_posttrain.sae.training.records import write_results

CASE = Path(__file__).with_name("sae_training_case.py")


@pytest.fixture(scope="module")
def world(make_model, tiny_tokenizer, texts):
    return make_model(), tiny_tokenizer, texts


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    return train(world, tmp_path_factory.mktemp("whole"))


@pytest.mark.promise("Training an SAE, killed and resumed, equals an unbroken run bit for bit")
@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(whole, world, tiny_tokenizer, tmp_path):
    """SIGKILL as soon as the second checkpoint is there: bit for bit the same weights, and the same metrics."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    output = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(CASE.parents[3]), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [sys.executable, str(CASE), str(tmp_path / "tokenizer"), str(output), "topk", "23"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = output / "checkpoints" / "step-00000008"
    while not checkpoint.is_dir() and running.poll() is None:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (output / "result.pt").exists(), "the run was killed before its end"
    resumed = train(world, output)
    for name, value in tensors(whole).items():
        assert torch.equal(value, tensors(resumed)[name]), name
    assert resumed.facts["data"] == whole.facts["data"]
    assert [record["step"] for record in resumed.records] == [record["step"] for record in whole.records]
    assert resumed.quality == whole.quality
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == resumed.records


@pytest.mark.parametrize("architecture", ["batch_topk", "jumprelu"])
def test_other_architectures_resume_exactly(architecture, world, tmp_path):
    plain = train(world, tmp_path / "a", architecture, checkpoint_every=0, held_out_documents=0)
    train(world, tmp_path / "b", architecture, held_out_documents=0)
    last = sorted((tmp_path / "b" / "checkpoints").iterdir())
    assert [place.name for place in last] == ["step-00000016", "step-00000020"]
    resumed = train(world, tmp_path / "b", architecture, held_out_documents=0)
    for name, value in tensors(plain).items():
        assert torch.equal(value, tensors(resumed)[name]), name


def test_records_say_how_it_goes(whole):
    training = [record for record in whole.records if "layers" in record]
    assert [record["step"] for record in training] == [5, 10, 15, 20, 23]
    assert [record["k"] for record in training] == [5, 4, 4, 4, 4]
    first, last = (record["layers"]["1"] for record in (training[0], training[-1]))
    assert 0 < first["fvu"] < 1.2
    assert 0 < last["fvu"] < 1.2
    assert last["l0"] == 4
    assert set(whole.quality) == set(LAYERS)
    # Of a model with random weights no ablation costs anything, so that the share has no size to expect.
    assert math.isfinite(whole.quality[1]["loss_recovered_of_mean_ablation"])
    assert whole.facts["data"]["epochs"] >= 1
    assert whole.facts["tokens"] == 23 * 32


def test_checkpoint_of_other_settings_is_refused(world, tmp_path):
    train(world, tmp_path, steps=12, held_out_documents=0)
    with pytest.raises(ValueError, match="belongs to another training: steps was 12 and is 13") as refused:
        train(world, tmp_path, steps=13, held_out_documents=0)
    assert not hasattr(refused.value, "__notes__")  # such as that the same command goes on from it
    train(world, tmp_path, steps=13, held_out_documents=0, resume=False)
    (tmp_path / "checkpoints" / "step-00000012" / "layer1.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="layer 1 is missing or damaged"):
        train(world, tmp_path, steps=13, held_out_documents=0)


def test_results_can_be_loaded_and_say_where_they_come_from(whole, tmp_path):
    config = SAETrainingConfig(width=96, k=4, steps=23, batch_tokens=32)
    table = write_results(tmp_path, whole, config, STREAM, {"seed": 0})
    assert [row[0] for row in table.rows] == list(LAYERS)
    loaded = SparseAutoencoder.load(tmp_path, layer=3)
    assert torch.equal(loaded.W_enc, whole.saes[3].W_enc)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["results"]["data"]["fingerprint"] == whole.facts["data"]["fingerprint"]
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert whole.facts["data"]["fingerprint"] in card
    assert "SparseAutoencoder.load" in card
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"log_every": 0}, "log_every must be an integer from 1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be an integer from 1"),
        ({"evaluate_every": 5, "held_out_documents": 0}, "needs held_out_documents"),
    ],
)
def test_bad_run_settings(settings, says):
    with pytest.raises(ValueError, match=says):
        RunConfig(**settings)
