"""The file of answers: written before use, repaired after a crash at any byte, never shared by two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.chat import ChatCompletion, ChatRequest, Message, RequestFailed, Sampling

MODEL = {"name": "m"}


def request(text: str) -> ChatRequest:
    return ChatRequest((Message("user", text),))


def completion(text: str) -> ChatCompletion:
    return ChatCompletion(text, "stop", 3, 2, "id")


def fill(path, count):
    with CompletionCache(path) as cache:
        for n in range(count):
            cache.put(request(str(n)).key(MODEL), MODEL, request(str(n)), completion(f"é {n}\u2028"))


def test_read_back_what_was_written(tmp_path):
    path = tmp_path / "answers.jsonl"
    fill(path, 3)
    with CompletionCache(path) as cache:
        assert len(cache) == 3
        assert cache.get(request("1").key(MODEL)) == completion("é 1\u2028")
        assert cache.get("unknown") is None
    record = json.loads(path.read_text().splitlines()[0])
    assert record["request"]["messages"] == [{"role": "user", "content": "0"}]
    assert record["model"] == MODEL


@pytest.mark.promise("An answer of an endpoint that was received is never lost nor asked for again")
def test_a_crash_at_any_byte_loses_at_most_the_line_being_written(tmp_path):
    path = tmp_path / "answers.jsonl"
    fill(path, 3)
    whole = path.read_bytes()
    two = len(b"".join(whole.splitlines(keepends=True)[:2]))
    for cut in range(two, len(whole)):
        path.write_bytes(whole[:cut])
        with CompletionCache(path) as cache:
            assert len(cache) == 2
            cache.put(request("2").key(MODEL), MODEL, request("2"), completion("é 2\u2028"))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"{}\n", b"not json\n", b'{"key": "k", "completion": {"text": "a"}}\n', b"\n"])
def test_a_damaged_line_is_an_error_and_changes_nothing(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    fill(path, 1)
    content = path.read_bytes() + line + path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(ValueError, match="line 2"):
        CompletionCache(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [b"notes without a line end", b'{"key": "value"}', b'{"a": 1}', b'["key"]', "é".encode(), b'{"key":"cut'],
)
def test_a_foreign_file_is_not_cut(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not written here"):
        CompletionCache(path)
    assert path.read_bytes() == content


def test_it_knows_which_ways_were_answered(tmp_path):
    refused = ChatCompletion("", "refused", 0, 0, "", "status 400: no")
    with CompletionCache(tmp_path / "answers.jsonl") as cache:
        cache.put("a", MODEL, request("a"), completion("a"), "one way")
    for _ in range(2):
        with CompletionCache(tmp_path / "answers.jsonl") as cache:
            for way in ("one way", "another"):
                cache.put(way, MODEL, request("b"), refused, way, content=False)
                assert cache.get(way) == refused
            with pytest.raises(RequestFailed, match="status 400: no"):
                cache.check(["one way", "another"])
    with CompletionCache(tmp_path / "answers.jsonl") as cache:
        assert (cache.get("one way"), cache.get("another")) == (refused, None)


def test_key_depends_on_everything_that_an_answer_depends_on():
    base = ChatRequest((Message("user", "a"),), Sampling(0.7, 0.9, 50), 0)
    others = [
        ChatRequest((Message("user", "b"),), Sampling(0.7, 0.9, 50), 0),
        ChatRequest((Message("system", "a"),), Sampling(0.7, 0.9, 50), 0),
        ChatRequest((Message("user", "a"), Message("user", "a")), Sampling(0.7, 0.9, 50), 0),
        ChatRequest((Message("user", "a"),), Sampling(0.8, 0.9, 50), 0),
        ChatRequest((Message("user", "a"),), Sampling(0.7, 0.8, 50), 0),
        ChatRequest((Message("user", "a"),), Sampling(0.7, 0.9, 51), 0),
        ChatRequest((Message("user", "a"),), Sampling(0.7, 0.9, 50), 1),
    ]
    keys = {entry.key(MODEL) for entry in [base, *others]} | {base.key({"name": "n"})}
    assert len(keys) == 9
    assert base.key(MODEL) == ChatRequest((Message("user", "a"),), Sampling(0.7, 0.9, 50)).key(dict(MODEL))


def test_two_processes_cannot_share_it_and_a_killed_one_lets_go(tmp_path):
    path = tmp_path / "answers.jsonl"
    script = """
        import sys, time
        from qscope_posttrain.endpoint.cache import CompletionCache
        cache = CompletionCache(sys.argv[1])
        print("held", flush=True)
        time.sleep(60)
    """
    arguments = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process"):
            CompletionCache(path)
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while True:
        try:
            CompletionCache(path).close()
            break
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_needs_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        CompletionCache(tmp_path / "missing" / "answers.jsonl")


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "pipe", "folder"])
def test_answers_are_kept_in_a_file_and_nothing_else(tmp_path, place):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError if place == "folder" else ValueError, match=r"is a folder|a pipe or a device"):
        CompletionCache(tmp_path / place)
