"""README.md and docs/: short, linked, and true to the code: examples compile, names and options exist, figures fit."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import qscope_posttrain as qp
from benchmarks import render_docs
from qscope_posttrain.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in render_docs.pages()}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OPTION = re.compile(r"--[a-z][\w-]*")
LAUNCHERS = ("qscope_posttrain",)
OTHER_PROGRAMS = (
    "docs/developing.md",
    "docs/integrations.md",
    "docs/results/README.md",
    "docs/results/operators.md",
    "docs/results/cost.md",
)
"""Pages that also name options of make, benchmarks and render_docs.py outside of code blocks"""

pages = pytest.mark.parametrize("page", list(PAGES))


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 250


def test_figures_are_those_of_the_json_files(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["render_docs.py", "--check"])
    assert render_docs.main() == 0, capsys.readouterr().err


@pages
def test_links_resolve(page):
    for target in LINK.findall(FENCE.sub("", PAGES[page])):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {target}"


def test_every_page_is_linked_from_another():
    linked = set()
    for page, text in PAGES.items():
        for target in LINK.findall(text):
            linked.add(((ROOT / page).parent / target.partition("#")[0]).resolve())
    assert [page for page in PAGES if page not in ("README.md", "docs/README.md") and (ROOT / page) not in linked] == []


@pages
def test_python_examples_use_names_and_options_that_exist(page):
    for language, block in FENCE.findall(PAGES[page]):
        if language == "python":
            check_example(ast.parse(block))


@pages
def test_commands_and_options_exist(page):
    for command, options in commands(page):
        missing = {option for option in options if dashed(option) not in options_of(command)}
        assert not missing, f"{page}: qscope {' '.join(command)} has no {missing}"


@pages
def test_options_in_the_text_are_those_of_a_command(page):
    if page in OTHER_PROGRAMS:
        return
    known = {option for command, _ in every_command() for option in options_of(command)}
    for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", PAGES[page])):
        if span.startswith("--"):
            missing = {option for option in OPTION.findall(span) if dashed(option) not in known}
            assert not missing, f"{page}: no command has {missing}"


@pages
def test_named_files_exist(page):
    text = re.sub(r"<!--.*?-->", "", PAGES[page])
    for name in re.findall(r"(?<![\w/])(?:recipes|configs|benchmarks)/[\w./-]*\w", text):
        assert (ROOT / name).exists(), f"{page}: {name}"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_example(tree: ast.Module) -> None:
    """Whether the names that an example takes from the package exist, and functions have the keywords it gives."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qscope_posttrain"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "qp":
            assert hasattr(qp, node.attr), f"qp has no {node.attr}"
        if isinstance(node, ast.Call):
            called = qp_object(node.func)
            if callable(called):
                parameters = inspect.signature(called).parameters
                takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
                unknown = {keyword.arg for keyword in node.keywords} - set(parameters)
                assert takes_any or not unknown, f"{ast.unparse(node.func)} has no {unknown}"


def qp_object(node: ast.expr) -> object:
    """What `qp.Name` or `qp.Name.method` is; None for anything else."""
    if isinstance(node, ast.Name):
        return qp if node.id == "qp" else None
    if isinstance(node, ast.Attribute):
        return getattr(qp_object(node.value), node.attr, None)
    return None


def every_command() -> list[tuple[tuple[str, ...], set[str]]]:
    return [found for page in PAGES for found in commands(page)]


def commands(page: str) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """The `qscope` commands in the code blocks of a page, and the options that they are given."""
    for language, block in FENCE.findall(PAGES[page]):
        if language:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["qscope"]:
                words = words[1:]
            elif "-m" in words and words[words.index("-m") + 1] in LAUNCHERS:
                words = words[words.index("-m") + 2 :]
            else:
                continue
            inner = [word for word in words[1:2] if not word.startswith("-")]
            yield (words[0], *inner), {word.partition("=")[0] for word in words if OPTION.match(word)}


@cache
def options_of(command: tuple[str, ...]) -> frozenset[str]:
    """The options that the help of a command lists, with dashes."""

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown), pytest.raises(SystemExit) as ended:
        main([*command, "--help-all" if command[0] in ("sft", "grpo") else "--help"])
    assert ended.value.code == 0, f"qscope {' '.join(command)}: {shown.getvalue()}"
    return frozenset(map(dashed, [*OPTION.findall(shown.getvalue()), "--config", "--allow-code", "--debug", "--help"]))


def dashed(option: str) -> str:
    return option.replace("_", "-")
