"""A hub of one repository on the loopback interface: enough of the protocol for huggingface_hub, and it can stall."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


@dataclass
class LoopbackHub:
    """Serves `files` of `repository`; usable as a context manager."""

    repository: str
    files: dict[str, bytes]
    stall_after: int | None = None
    """Bytes of a body after which nothing more is sent, until `resume` is set."""
    promised_etag: str | None = None
    """What to state in place of the sha256 of a file."""
    ranges: list[str | None] = field(default_factory=list)
    """The Range header of each GET of a file."""
    stalled: threading.Event = field(default_factory=threading.Event)
    resume: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> LoopbackHub:
        hub = self

        class Handler(_Handler):
            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.resume.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    served: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub = self.served
        path = self.path.partition("?")[0]
        prefix = f"/{hub.repository}/resolve/"
        if path.startswith(f"/api/models/{hub.repository}/tree/"):
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in hub.files.items()
            ]
            self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"}, body)
        elif not path.startswith(prefix):
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        else:
            revision, _, name = path.removeprefix(prefix).partition("/")
            if revision not in ("main", COMMIT):
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
            elif name not in hub.files:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
            else:
                self._file(hub.files[name], body)

    def _file(self, data: bytes, body: bool) -> None:
        hub = self.served
        etag = hub.promised_etag or hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if body:
            hub.ranges.append(wanted)
        if wanted is None:
            self._send(200, data, headers, body)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206, data[start:], headers, body)

    def _send(self, code: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        hub = self.served
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        if hub.stall_after is None or len(data) <= hub.stall_after:
            self.wfile.write(data)
            return
        self.wfile.write(data[: hub.stall_after])
        self.wfile.flush()
        hub.stalled.set()
        hub.resume.wait(60)
        self.close_connection = True
