"""Keys: they go to the server that the user named, and nowhere else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from endpoint_server import serving
from word_world import TOPIC, grammar, write_world

from qscope_posttrain.cli.main import main

KEY = "sk-canary-0f3a9c71d2"
COMMANDS = {
    "explain": ["features", "explain", "--layers", "1", "--feature-ids", "3", "5", "--min-texts", "1", "--tests", "1"],
    "synthesize": ["synthesize", "--topic", TOPIC, "--send-seed", "--features-at-once", "4", "--max-requests", "8"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("words"))


@pytest.mark.promise("A key goes to the server that the user named: it is in no file, no message and no log")
@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("explain", (401, {})),
        ("synthesize", (400, {})),
        *(pytest.param(name, fault, marks=pytest.mark.slow) for name in COMMANDS for fault in (None, (500, {}))),
    ],
    ids=str,
)
def test_no_file_message_or_log_has_the_key(world, tmp_path, capfd, caplog, monkeypatch, command, fault) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("QSCOPE_QUIET")
    caplog.set_level(logging.DEBUG)
    own = ["--texts", str(world / "natural.txt")] if command == "explain" else [
        "--explanations", str(world / "explanations.jsonl"), "--seed-data", str(world / "seed.txt"),
    ]  # fmt: skip
    with serving(grammar, [] if fault is None else [("status", fault)] * 3) as server:  # its errors repeat the key
        main([
            *COMMANDS[command], "--model", str(world / "model"), "--sae", str(world / "saes"), *own, "--device", "cpu",
            "--output", str(tmp_path / "out"), "--chat-model", "grammar", "--base-url", server.url, "--attempts", "1",
        ])  # fmt: skip
        assert server.keys == {f"Bearer {KEY}"}
    said = capfd.readouterr()
    assert fault is None or "told to fail" in said.err, "the server is quoted, without the key"
    for text in (said.out, said.err, caplog.text):
        assert KEY not in text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [str(path) for path in written if KEY.encode() in path.read_bytes()] == []


@pytest.mark.promise("A key goes to the server that the user named: it is in no file, no message and no log")
@pytest.mark.parametrize("server", [f"http://user:{KEY}@127.0.0.1:1/v1", f"http://127.0.0.1:1/v1?key={KEY}"])
def test_a_key_within_an_address_is_refused_unsaid(world, tmp_path, capfd, server) -> None:
    words = ["--model", str(world / "model"), "--sae", str(world / "saes"), "--texts", str(world / "natural.txt")]
    words += ["--output", str(tmp_path / "out"), "--chat-model", "m", "--base-url", server]
    assert main([*COMMANDS["explain"], *words]) == 2
    said = capfd.readouterr()
    assert "error: " in said.err
    assert KEY not in said.err + said.out
