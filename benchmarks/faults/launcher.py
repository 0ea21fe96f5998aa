"""`qscope` with a fault: counts the points of progress of a run, and does harm at one of them.

A point is a forward pass of a model, an update of an SAE, a request to an endpoint, or a file of the output folder that
is opened for writing, renamed or removed. Nothing in the package knows of this file. The environment variable
QSCOPE_FAULT holds the fault as JSON: `output` (folder), `count` (file for the number of points), and perhaps `kind`,
`at` (number of the point, from 1; with `of` "work", of the points that are no files), `rank`, `argument`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULT = "QSCOPE_FAULT"
_CALLS = (
    ("transformers.models.qwen3.modeling_qwen3", "Qwen3Model", "forward"),
    ("qscope_posttrain.sae.training.update", "LayerTraining", "update"),
    ("qscope_posttrain.endpoint.models", "OpenAIChatModel", "complete"),
)
_FILE_EVENTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"})


class Fault:
    """The points of this process, and what happens at one of them."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.kind, self.at, self.spec = spec.get("kind"), spec.get("at", 0), spec
        self.output, self.points, self.work = str(spec["output"]), 0, 0
        self.harmed = 0.0  # The time at which the harm was done
        self.here = int(os.environ.get("RANK", "0")) == spec.get("rank", 0)
        self._lock, self._process = threading.Lock(), os.getpid()

    def point(self, subject: Any = None) -> None:
        """Count a point, which is work where it has a subject; at the one that was asked for, do the harm."""
        if os.getpid() != self._process:  # a worker of a data loader, forked from here
            return
        with self._lock:
            self.points += 1
            self.work += subject is not None
            done = self.work if self.spec.get("of") == "work" else self.points
            due = done >= self.at > 0 and self.here
            due = due and self.kind in _HARMS and (self.kind != "NaN" or hasattr(subject, "layers"))
            self.at = 0 if due else self.at
        if due:
            self.harmed = time.time()
            self.write()
            _HARMS[self.kind](self, subject)

    def write(self) -> None:
        """Write the numbers of points and of those that are work, and the time of the harm, of the harmed rank."""
        if self.here:
            text = f"{self.points} {self.work} {self.harmed}"
            Path(self.spec["count"]).write_text(text, encoding="utf-8")

    def watch_files(self) -> None:
        """Make points of what is done to files of the output folder."""

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                path, mode, flags = arguments
                writes = isinstance(mode, str) and not set(mode).isdisjoint("wax+")
                if not (writes or flags & (os.O_WRONLY | os.O_RDWR)):
                    return
            elif event in _FILE_EVENTS:
                path = arguments[0]
            else:
                return
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.output):
                self.point()

        sys.addaudithook(watch)

    def watch_calls(self) -> None:
        """Make points of the calls that are progress."""
        for module, kind, name in _CALLS:
            owner = getattr(importlib.import_module(module), kind)
            setattr(owner, name, _counted(self, getattr(owner, name)))
        if self.kind == "worker":
            fetch: Any = importlib.import_module("torch.utils.data._utils.fetch")
            fetch._MapDatasetFetcher.fetch = self._dying(fetch._MapDatasetFetcher.fetch)
        if self.kind == "slow clock":  # hours of waiting in seconds
            session: Any = importlib.import_module("qscope_posttrain.endpoint.session").ChatSession
            made, scale = session.__init__, float(self.spec["argument"])
            session.__init__ = lambda *a, **more: made(*a, **more, sleep=lambda seconds: time.sleep(seconds * scale))

    def _dying(self, fetch: Callable[..., Any]) -> Callable[..., Any]:
        fetched = 0

        def counted(*arguments: Any) -> Any:
            nonlocal fetched
            fetched += 1
            if os.getpid() != self._process and fetched == self.at and self.here:
                os.kill(os.getpid(), signal.SIGKILL)
            return fetch(*arguments)

        return counted


def _counted(fault: Fault, call: Callable[..., Any]) -> Callable[..., Any]:
    def counted(self: Any, *arguments: Any, **more: Any) -> Any:
        fault.point(self)
        return call(self, *arguments, **more)

    return counted


def _nan(fault: Fault, subject: Any) -> None:
    import torch

    with torch.no_grad():
        for weight in subject.layers[1].mlp.parameters():
            weight.fill_(float("nan"))


def _raise(fault: Fault, subject: Any) -> None:
    raise RuntimeError("made-up failure of this rank")


_HARMS: dict[str, Callable[[Fault, Any], Any]] = {
    "kill": lambda fault, _: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda fault, _: os.kill(os.getpid(), signal.SIGTERM),
    "Ctrl-C": lambda fault, _: os.kill(os.getpid(), signal.SIGINT),
    "SIGTERM to the launcher": lambda fault, _: os.kill(os.getppid(), signal.SIGTERM),
    "Ctrl-C to all": lambda fault, _: os.killpg(os.getpgid(0), signal.SIGINT),
    "freeze": lambda fault, _: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda fault, _: time.sleep(10**6),
    "read-only": lambda fault, _: subprocess.run(["mount", "-o", "remount,ro", fault.output], check=True),
    "raise": _raise,
    "NaN": _nan,
}


def run(arguments: list[str]) -> int:
    """Run one command, and write the number of its points where it ends by itself."""
    spec = json.loads(os.environ[FAULT])
    fault = Fault(spec)
    fault.watch_calls()
    fault.watch_files()
    main = importlib.import_module("qscope_posttrain.cli.main").main
    try:
        return int(main(arguments))
    finally:
        fault.write()


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
