"""The world of words on disk, and one unbroken run of `qscope synthesize` against a server on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import load_from_disk
from endpoint_server import serving
from word_world import TOPIC, grammar, write_world

from qscope_posttrain.cli.main import main


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="session")
def arguments(world):
    """arguments(server, output, *more): a command line of `qscope`."""

    def build(server, output, *more):
        return [
            "synthesize", "--model", str(world / "model"), "--sae", str(world / "saes"), "--device", "cpu",
            "--explanations", str(world / "explanations.jsonl"), "--topic", TOPIC,
            "--seed-data", str(world / "seed.txt"), "--natural", str(world / "natural.txt"), "--measure-layers", "0",
            "--chat-model", "grammar", "--base-url", server.url, "--api-key-env", "NO_SUCH_KEY", "--send-seed",
            "--concurrency", "2", "--timeout", "2", "--features-at-once", "4", "--output", str(output), *more,
        ]  # fmt: skip

    return build


@pytest.fixture(scope="session")
def whole(arguments, tmp_path_factory):
    """(output folder, server) of one unbroken run."""
    output = tmp_path_factory.mktemp("whole")
    with serving(grammar) as server:
        assert main(arguments(server, output)) == 0
        yield output, server


@pytest.fixture(scope="session")
def rows_of():
    """rows_of(output, ids=True): the rows of the data, with or without the server's names for its answers."""

    def read(output: Path, ids: bool = True):
        rows = load_from_disk(str(output / "data"))
        return [{key: row[key] for key in row if ids or not key.endswith("request")} for row in rows]

    return read
