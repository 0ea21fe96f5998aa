"""An OpenAI-compatible server on loopback, for tests: answers by a function, and fails as it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[dict[str, Any]], str]


@dataclass
class Server:
    """What a test reads and sets. `faults` are used up in order by the requests that come, one each."""

    reply: Reply
    faults: list[tuple[str, Any]] = field(default_factory=list)
    """("status", (number, headers[, code])), ("body", bytes), ("drop", None), ("slow", seconds), ("ok", None)"""
    delay: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies in the order of arrival, failed ones included"""
    answered: list[str] = field(default_factory=list)
    """Bodies, as JSON, of the requests that got their answer"""
    keys: set[str] = field(default_factory=set)
    at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    times: list[float] = field(default_factory=list)


@contextmanager
def serving(reply: Reply, faults: Sequence[tuple[str, Any]] = (), delay: float = 0.0) -> Iterator[Server]:
    state = Server(reply, list(faults), delay)
    open_now = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one write for an answer: two would wait for the client's delayed acknowledgement

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            nonlocal open_now
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.requests.append(body)
                state.times.append(time.monotonic())
                state.keys.add(self.headers.get("Authorization", ""))
                fault, detail = state.faults.pop(0) if state.faults else ("ok", None)
                open_now += 1
                state.at_once = max(state.at_once, open_now)
            try:
                self._respond(body, fault, detail)
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                with state.lock:
                    open_now -= 1

        def _respond(self, body: dict[str, Any], fault: str, detail: Any) -> None:
            if fault == "drop":
                self.close_connection = True
                self.connection.close()
                return
            if fault == "status":
                status, headers, *code = detail
                error = {"message": f"told to fail {self._key()}", "code": code[0] if code else None}
                self._send(json.dumps({"error": error}).encode(), status, headers)
                return
            if fault == "body":
                self._send(detail)
                return
            time.sleep(detail if fault == "slow" else state.delay)
            answer = {
                "id": f"answer-{len(state.requests)}",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": state.reply(body)},
                    }
                ],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
            }
            self._send(json.dumps(answer).encode())
            with state.lock:
                state.answered.append(json.dumps(body, sort_keys=True))

        def _key(self) -> str:
            return self.headers.get("Authorization", "").removeprefix("Bearer ")

        def _send(self, content: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
