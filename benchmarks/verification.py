"""The table of docs/verification.md: the promises that tests are marked with, the tests, and what runs them.

A test says what it proves by `@pytest.mark.promise("...")`, on itself, its class or its file. Markers are read from the
source, so that neither torch nor vLLM has to be there; which `make` target runs a test follows from the Makefile. The
table is written by benchmarks/render_docs.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qscope_posttrain.report.tables import Table

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
SECTIONS = {
    "SFT": ("sft", "invariants"),
    "GRPO": ("rl", "invariants/test_grpo"),
    "Many processes": ("distributed", "cli/test_cli_features"),
    "Faults and resuming": (
        "faults",
        "cli/test_interruption",
        "features/test_pass_checkpoint",
        "endpoint",
        "sae/test_download",
    ),
    "Models, features and steering": ("models", "features"),
    "SAEs and operators": ("sae", "kernels", "peers"),
    "Data, evaluation and analysis": ("text", "evaluation", "analysis", "synthesis", "benchmarks"),
    "Commands and reports": ("",),
    "Other frameworks": ("integrations",),
    "Security": ("attacks", "features/test_feature_set"),
}
"""Heading -> beginnings of paths below tests/, the longest counts; a promise stands where its first test does"""
NAMES_OF_ONE_FILE = 4
NEVER = "never: no machine here has a GPU"


@dataclass(frozen=True)
class Proof:
    """A test function and one promise that it is marked with."""

    promise: str
    file: str  # Path below tests/
    function: str
    marks: frozenset[str]

    @property
    def heading(self) -> str:
        fitting = {
            start: heading for heading, starts in SECTIONS.items() for start in starts if self.file.startswith(start)
        }
        return fitting[max(fitting, key=len)]


def table() -> str:
    """Markdown: under each heading its promises, the tests that prove them, and what runs those."""
    proofs, targets = sorted(find(), key=lambda one: (one.file, one.function)), make_targets()
    by_promise: dict[str, list[Proof]] = {}
    for proof in proofs:
        by_promise.setdefault(proof.promise, []).append(proof)
    parts = []
    for heading in SECTIONS:
        rows = [
            [promise, _tests(found), _where(found, targets)]
            for promise, found in sorted(by_promise.items())
            if found[0].heading == heading
        ]
        if rows:
            parts.append(f"## {heading}\n\n" + Table("", ["promise", "proved by", "run by make"], rows).to_markdown())
    return "\n\n".join(part.strip() for part in parts) + "\n"


def find() -> Iterator[Proof]:
    """Every promise of every test. ValueError for a promise that is no sentence in plain text."""
    for path in sorted(TESTS.rglob("test_*.py")):
        file = path.relative_to(TESTS).as_posix()
        source = path.read_text(encoding="utf-8")
        if "promise" in source:
            tree = ast.parse(source)
            yield from _below(tree.body, _of_file(tree, file), file)


def _below(body: Sequence[ast.stmt], outer: list[tuple[str, str]], file: str) -> Iterator[Proof]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not node.name.lower().startswith("test"):
            continue
        marks = outer + [mark for one in node.decorator_list for mark in _marks(one, file)]
        if isinstance(node, ast.ClassDef):
            yield from _below(node.body, marks, file)
            continue
        names = frozenset(name for name, _ in marks)
        for promise in dict.fromkeys(text for name, text in marks if name == "promise"):
            yield Proof(promise, file, node.name, names)


def _of_file(tree: ast.Module, file: str) -> list[tuple[str, str]]:
    """The marks that `pytestmark = ...` gives to every test of a file."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            given = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]
            return [mark for one in given for mark in _marks(one, file)]
    return []


def _marks(node: ast.expr, file: str) -> Iterator[tuple[str, str]]:
    """(name, its sentence or "") of `pytest.mark.NAME(...)`."""
    call = node if isinstance(node, ast.Call) else None
    words = ast.unparse(call.func if call else node)
    if not words.startswith("pytest.mark."):
        return
    name, text = words.removeprefix("pytest.mark."), ""
    if name == "promise":
        given = call.args[0] if call and call.args else None
        if not isinstance(given, ast.Constant) or not isinstance(given.value, str):
            raise ValueError(f"{file}, line {node.lineno}: a promise is one sentence in quotes.")
        text = given.value.strip().rstrip(".")
    yield name, text


def make_targets() -> dict[str, list[str]]:
    """{target of the Makefile that runs pytest on some paths: those paths below tests/}."""
    found: dict[str, list[str]] = {}
    target = ""
    for line in (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if match := re.match(r"([\w-]+):(?! export)", line):
            target = match[1]
        if "-m pytest" in line and (paths := re.findall(r"\btests/(\S+)", line)):
            found[target] = [*found.get(target, []), *paths]
    return found


def runs(proof: Proof, targets: dict[str, list[str]]) -> list[str]:
    """The `make` targets that run a test. One that needs a package of an environment of its own is skipped in others;
    one for a GPU is skipped everywhere, for no machine here has one."""
    if "cuda" in proof.marks:
        return [NEVER]
    listed = [
        target
        for target, paths in targets.items()
        if target != "fuzz" and any(proof.file == path or proof.file.startswith(f"{path}/") for path in paths)
    ]
    others = [target for target in listed if target != "test-oldest"]
    alone = "importorskip(" in (TESTS / proof.file).read_text(encoding="utf-8")
    if others and (alone or proof.file.startswith(("integrations/", "peers/"))):
        return others
    slow = "slow" in proof.marks
    oldest = ["test-oldest"] if "test-oldest" in listed and not slow else []
    return ["test-all" if slow else "test", *oldest, *others]


def _where(proofs: Sequence[Proof], targets: dict[str, list[str]]) -> str:
    return ", ".join(sorted({target for proof in proofs for target in runs(proof, targets)}))


def _tests(proofs: Sequence[Proof]) -> str:
    """Files with links, and the names of the tests, or their number."""
    by_file: dict[str, list[str]] = {}
    for proof in proofs:
        by_file.setdefault(proof.file, []).append(proof.function)
    words = []
    for file, functions in by_file.items():
        names = functions if len(functions) <= NAMES_OF_ONE_FILE else [f"{len(functions)} tests"]
        words.append(f"[{file}](../tests/{file})::" + ", ".join(names))
    return "; ".join(words)
