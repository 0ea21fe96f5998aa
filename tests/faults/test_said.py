"""What a user reads when a command is stopped or a machine fails, and the exit status."""

from __future__ import annotations

import os
import resource
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from qscope_posttrain.cli import main as module
from qscope_posttrain.cli.main import main
from qscope_posttrain.cli.training.interruption import failures_in_words as _words
from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.chat import ChatRequest, Message, RequestFailed
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.errors import naming_what_is_kept
from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.models import calibration


@pytest.mark.promise(
    "Ctrl-C and SIGTERM end every command with status 130 and 143, no traceback, and name what is kept"
)
@pytest.mark.parametrize(("number", "status", "word"), [(2, 130, "interrupted"), (15, 143, "stopped by SIGTERM")])
def test_signals(monkeypatch, capsys, number, status, word):
    def work(arguments):
        with naming_what_is_kept(lambda: "40 answers are kept"):
            os.kill(os.getpid(), number)
            signal.pause()

    monkeypatch.setattr(module, "_runner", lambda name: work)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["sae"]) == status
    assert capsys.readouterr().err.splitlines() == [word, "40 answers are kept"]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.promise("A full disk is told in words, with the last checkpoint")
def test_a_checkpoint_that_cannot_be_written(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with (
            pytest.raises(OSError, match=r"cannot write a checkpoint in '.*', with .* free") as ended,
            _words(tmp_path),
        ):
            torch.save(torch.zeros(10_000), tmp_path / "optimizer.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "There is no checkpoint" in ended.value.__notes__[0]


def test_a_worker_that_died(tmp_path):
    with pytest.raises(OSError, match=r"a process that reads the data has died .* fewer"), _words(tmp_path):
        raise RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")


@pytest.mark.promise("A model whose activations are NaN gives no features: finding ends with an error")
def test_finding_in_a_model_that_breaks(make_model, tiny_tokenizer, texts, monkeypatch):
    monkeypatch.setattr(calibration, "CALIBRATION_TOKENS", 20)
    model = make_model()
    calls = 0

    def break_it(*_):
        nonlocal calls
        calls += 1
        if calls == 4:
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))

    model.model.register_forward_pre_hook(break_it)
    with pytest.raises(ValueError, match="layer 2 are not numbers"):
        collect_statistics(model, tiny_tokenizer, texts, {2: None}, tokens_per_batch=32)


def test_an_interrupted_wait_for_the_endpoint_ends_at_once(tmp_path):
    """The endpoint asks for a pause that the suite would not survive; other threads wait for it, too."""

    def complete(requests):
        os.kill(os.getpid(), signal.SIGINT)
        raise RequestFailed("busy", retry=True, retry_after=300.0)

    model = SimpleNamespace(identity={}, route={}, batch_size=1, concurrency=2, complete=complete)
    with CompletionCache(tmp_path / "answers.jsonl") as cache:
        requests = [ChatRequest((Message("user", word),)) for word in ("first", "second")]
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            ChatSession(model, cache).complete(requests)
        assert time.monotonic() - begun < 200
