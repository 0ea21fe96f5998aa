"""`vllm serve` in a process of its own: directions by /collective_rpc, steering by vllm_xargs, errors by HTTP."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import urllib.error
import urllib.request

import pytest
from integrations.vllm import plugin_cases as cases
from integrations.vllm.plugin_cases import KEY, edit
from integrations.vllm.serving import serving

SERVE = "import sys; from vllm.entrypoints.cli.main import main; sys.argv = ['vllm', *sys.argv[1:]]; main()"


class Server:
    def __init__(self, url, folder):
        self.url, self.folder = url, folder

    def post(self, path, body):
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def call(self, method, *args):
        return self.post("/collective_rpc", {"method": method, "args": list(args)})

    def complete(self, ids, edits=None, length=cases.LENGTH, row="row"):
        steering = {"vllm_xargs": {KEY: json.dumps({"row": row, "edits": edits})}} if edits else {}
        body = {"model": str(self.folder), "prompt": ids, "max_tokens": length, "temperature": 0}
        return self.post("/v1/completions", body | {"ignore_eos": True, "return_token_ids": True} | steering)


@pytest.fixture(scope="module")
def model_and_folder(make_model, tiny_tokenizer, tmp_path_factory):
    return cases.saved_model(make_model, tmp_path_factory.mktemp("qwen3"), tiny_tokenizer)


@pytest.fixture(scope="module")
def server(model_and_folder, vllm_settings, tmp_path_factory):
    folder = model_and_folder[1]
    paths = [path for path in sys.path if path]
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # The build for CPUs is another distribution, and the command asks for this one; "cpu" chooses its kernels.
        stand_in = tmp_path_factory.mktemp("named") / "vllm-0.31.0+cpu.dist-info"
        stand_in.mkdir()
        (stand_in / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+cpu\n")
        paths.append(str(stand_in.parent))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "VLLM_SERVER_DEV_MODE": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    options = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    command = [sys.executable, "-c", SERVE, "serve", str(folder), *options]
    with serving(command, environment, tmp_path_factory.mktemp("log") / "server.txt") as url:
        yield Server(url, folder)


def test_steering_through_a_server(server, model_and_folder, tiny_tokenizer, texts):
    model, ids = model_and_folder[0], cases.prompts(tiny_tokenizer, texts)
    status, answer = server.complete(ids[0], [edit()])
    assert (status, "unknown direction 'a'; held: none" in answer) == (400, True)

    status, answer = server.call("qscope_put_directions", {"a": [1.0]})
    assert (status >= 400, "must have 64 finite entries" in answer) == (True, True)

    sent = {name: vector.tolist() for name, vector in cases.DIRECTIONS.items()}
    description = {"layers": 3, "hidden_size": 64, "model": str(model_and_folder[1]), "runner": "v1"}
    assert server.call("qscope_put_directions", sent) == (200, {"results": [description]})

    expected = cases.in_transformers(model, ids)
    for place, (row, edits, length) in enumerate(zip(ids, cases.EDITS, cases.LENGTHS, strict=True)):
        status, answer = server.complete(row, edits, length, str(place))
        assert (status, answer["choices"][0]["token_ids"]) == (200, expected[place])
    assert server.call("qscope_take_counts") == (200, {"results": [cases.expected_counts()]})

    for edits, reason in [
        ([edit("c")], "unknown direction 'c'; held: a, b"),
        ([edit(layer=3)], "one of 0 to 2; got 3"),
    ]:
        status, answer = server.complete(ids[0], edits)
        assert (status, reason in answer) == (400, True)
    status, answer = server.complete(ids[0], cases.EDITS[0], cases.LENGTHS[0])
    assert (status, answer["choices"][0]["token_ids"]) == (200, expected[0])
