"""Importing the package is quick, quiet and loads no trainer."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qscope_posttrain as qp


def test_import_loads_no_heavy_package():
    probe = (
        "import sys, qscope_posttrain\n"
        "heavy = {'torch', 'trl', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", probe], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in qp.__all__ if name != "__version__"])
def test_every_public_name_resolves(name):
    assert getattr(qp, name).__doc__


def test_unknown_name_lists_what_exists():
    with pytest.raises(AttributeError, match="SASFTCallback"):
        qp.no_such_name  # noqa: B018


ROOMS = [
    "kernels",
    "text",
    "report",
    "models",
    "sae",
    "endpoint",
    "features",
    "sft",
    "rl",
    "evaluation",
    "analysis",
    "synthesis",
    "integrations",
    "cli",
]
"""The folders of the package; each imports only from those before it (and the top files, which import none of them)."""


def _arrows() -> list[tuple[str, str, str]]:
    root = Path(qp.__file__).parent
    found = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        room = parts[0] if len(parts) > 1 else ""
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                target = name.split(".")
                if target[0] == "qscope_posttrain" and len(target) > 1 and (root / target[1]).is_dir():
                    found.append((str(file.relative_to(root)), room, target[1]))
    return found


def test_imports_point_one_way():
    arrows = _arrows()
    assert {room for _, room, _ in arrows if room} | {target for *_, target in arrows} <= set(ROOMS)
    wrong = [
        f"{file} imports {target}"
        for file, room, target in arrows
        if file not in ("__init__.py", "__main__.py") and (not room or ROOMS.index(target) > ROOMS.index(room))
    ]
    assert not wrong


def _run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The import statements below a node that importing its file runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not typing_only and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _run_on_import(child)


def test_only_grpo_and_the_commands_need_trl_to_be_imported():
    """Callbacks attach to plain trainers and to frameworks, beside an old TRL or none."""
    root = Path(qp.__file__).parent
    needing = set()
    for file in root.rglob("*.py"):
        for node in _run_on_import(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if any(name.split(".")[0] == "trl" for name in names):
                needing.add(file.relative_to(root).parts[0])
    assert needing == {"rl", "cli"}
