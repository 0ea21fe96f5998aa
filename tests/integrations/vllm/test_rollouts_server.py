"""Training through a `vllm serve` of its own, as TRL asks it.

A server on a CPU has no engine for the transfer of weights, so that TRL's sync is left out here and every run makes one
step, with the weights of the files. All else is as users have it: one server, two processes that share groups.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not installed here: make test-vllm")

import torch
from free_port import free_port
from integrations.vllm.rollout_cases import (
    GREEDY,
    KINDS,
    SEEDED,
    STEERED,
    G,
    build,
    no_weight_transfer,
    save_model,
    train,
)
from integrations.vllm.serving import serving

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.rl.rollouts.vllm_plugin import ENVIRONMENT

HERE = Path(__file__).resolve().parent
TWO_PROCESSES = {
    "seeded": {**SEEDED, "per_device_train_batch_size": 2},
    "steered": {**STEERED, "per_device_train_batch_size": 2, "negatives_per_group": 2},
    "several groups": {**SEEDED, "per_device_train_batch_size": 6},
}  # fmt: skip
"""With groups of 4 that both processes share, and a process without any negative"""


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """The URL of a server with the plug-in."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "float32",
        "--max-model-len", "128", "--enforce-eager", "--logprobs-mode", "processed_logprobs",
    ]  # fmt: skip
    environment = os.environ | {ENVIRONMENT: "1", "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(HERE.parents[2])}
    with serving(command, environment, tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def through(server, **options):
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server, "max_steps": 1, **options}


@pytest.mark.promise("Rollouts of vLLM have the tokens and gradients of transformers")
@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_are_those_of_transformers(model, server, kind):
    ours = train(model, max_steps=1, **GREEDY, **KINDS[kind])
    with no_weight_transfer():
        servers = train(model, **through(server), **GREEDY, **KINDS[kind])
    assert servers.said == ours.said
    assert servers.flags == ours.flags


def test_ratios_and_log_probabilities(model, server):
    with no_weight_transfer():
        run = train(model, **through(server, vllm_importance_sampling_correction=True), **SEEDED)
    batch = run.batches[0]
    negative = batch["steered"]
    assert torch.equal(batch["importance_sampling_ratio"][negative], torch.ones(2, 1))
    assert (batch["importance_sampling_ratio"][~negative] - 1).abs().max() < 1e-3
    mask = batch["completion_mask"].bool() & negative[:, None]
    drawn = batch["behavior_logps"][mask] != 0
    torch.testing.assert_close(
        batch["behavior_logps"][mask][drawn], batch["old_per_token_logps"][mask][drawn], atol=1e-4, rtol=1e-4
    )
    rows = [tuple(ids) for ids in run.said[0] if len(ids) > 6]
    assert len(set(rows)) == len(rows) >= 3


def test_log_probabilities_of_another_distribution_are_left_out(model, server):
    with no_weight_transfer(logprobs_mode="raw_logprobs"):
        run = train(model, **through(server), **SEEDED)
    own = run.batches[0]["completion_mask"].bool() & run.batches[0]["steered"][:, None]
    copied = run.batches[0]["behavior_logps"][own] == 0
    assert run.batches[0]["behavior_logps"][own][~copied].isnan().all()
    assert "negative/log_ratio" not in run.log[0]
    assert "negative/gradient_share" in run.log[0]


@pytest.fixture(scope="module")
def ranks(model, server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    cases = {name: {**through(server), **GREEDY, **options} for name, options in TWO_PROCESSES.items()}
    torch.save({"model": model, "cases": cases}, folder / "job.pt")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}",
        str(HERE / "server_worker.py"), str(folder),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_rows_of_two_processes_come_back_in_their_order(model, ranks, name):
    options = TWO_PROCESSES[name]
    both = {**options, "per_device_train_batch_size": 2 * options["per_device_train_batch_size"]}
    single = train(model, max_steps=1, **GREEDY, **both)
    assert [row for said, _ in ranks[name] for row in said[0]] == single.said[0]
    assert [flag for _, flags in ranks[name] for flag in flags[0]] == single.flags[0]
    assert sum(single.flags[0]) == options.get("negatives_per_group", 1) * len(single.said[0]) // G


def test_a_server_without_the_plug_in(model, server, monkeypatch):
    """A method that its workers do not have is what a server without the plug-in says of all of them."""
    from qscope_posttrain.rl.rollouts import vllm

    inner = vllm.Server.call
    monkeypatch.setattr(vllm.Server, "call", lambda self, method, *args: inner(self, f"other_{method}", *args))
    with no_weight_transfer(), pytest.raises(RuntimeError, match=f"plug-in.*not loaded.*{ENVIRONMENT}=1 .*vllm serve"):
        build(model, **through(server), **STEERED)
    with no_weight_transfer():
        build(model, **through(server), **SEEDED)  # needs none


@pytest.mark.parametrize("options", [SEEDED, STEERED])
def test_another_model_in_the_server(server, make_model, tiny_tokenizer, tmp_path, options):
    other = save_model(tmp_path / "other", make_model, tiny_tokenizer)
    with (
        no_weight_transfer(),
        pytest.raises(UserValueError, match=r"holds the model '.*model[0-9]+', and '.*other' is trained"),
    ):
        build(other, **through(server), **options)


def test_a_model_of_that_name_but_another_size(server, model, make_model, tiny_tokenizer, tmp_path):
    other = save_model(tmp_path / Path(model).name, make_model, tiny_tokenizer, num_hidden_layers=2)
    with no_weight_transfer(), pytest.raises(UserValueError, match="3 layers of width 64, and one with 2"):
        build(other, **through(server), **STEERED)


def test_steering_that_the_server_does_not_know(model, server):
    """An error, and never an unsteered row."""
    with no_weight_transfer():
        trainer = build(model, **through(server), **STEERED)
    inner = trainer._engine._steerings
    trainer._engine._steerings = lambda plan: (
        {row: {**asked, "layers": 1} for row, asked in inner(plan)[0].items()},
        inner(plan)[1],
    )
    with no_weight_transfer(), pytest.raises(Exception, match="unknown: layers"):
        trainer.train()
