from __future__ import annotations

import fractions
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._utils import ExceptionWrapper

import qscope_posttrain
from qscope_posttrain import __version__
from qscope_posttrain.cli import main as module
from qscope_posttrain.cli.main import COMMANDS, main
from qscope_posttrain.errors import (
    UserError,
    UserFileNotFoundError,
    UserTypeError,
    UserValueError,
    library_refusals,
)


def test_the_package_runs_as_a_module_and_its_help_imports_nothing_heavy():
    code = (
        "import runpy, sys\nsys.argv = ['x', '--help']\n"
        "try:\n    runpy.run_module('qscope_posttrain', run_name='__main__')\n"
        "except SystemExit as end:\n    status = end.code\n"
        "print(status, sorted({'torch', 'trl', 'transformers', 'matplotlib', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert all(command in done.stdout for command in COMMANDS)


SUBCOMMANDS = {
    "features": ["find", "find-repetition", "contrast", "rank", "explain", "tokens", "show"],
    "sae": ["list", "show", "check", "convert", "train"],
    "evaluate": ["code-switching", "repetition", "safety"],
    "analyze": ["redundancy", "overlap"],
    "classify": ["fit", "predict", "report"],
}


def test_no_help_text_imports_torch_transformers_or_trl():
    """All commands and sub-commands in one process, and a command line of which only TRL's keys are missing."""
    lines = [[command] for command in COMMANDS]
    lines += [[command, name] for command, names in SUBCOMMANDS.items() for name in names]
    code = (
        "import contextlib, io, sys\nfrom qscope_posttrain.cli.main import main\n"
        f"for line in {lines!r}:\n"
        "    text = io.StringIO()\n"
        "    with contextlib.redirect_stdout(text):\n"
        "        try:\n            main([*line, '--help'])\n"
        "        except SystemExit as end:\n            assert not end.code, line\n"
        "    assert 'usage: qscope ' + ' '.join(line) in text.getvalue(), (line, text.getvalue())\n"
        "    heavy = {'torch', 'trl', 'transformers', 'datasets', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "    assert not heavy, (line, heavy)\n"
        "for command in ('sft', 'grpo'):\n"
        "    assert main([command]) == 2\n"
        "assert 'trl' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 2
    assert all("needs 'model_name_or_path'" in line and "'dataset_name' or as 'datasets'" in line for line in said)


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == __version__


def test_unknown_command_is_suggested(capsys):
    assert main(["featuers"]) == 2
    assert "Did you mean 'features'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "experiment"])
def test_what_needs_the_repository_says_so_where_there_is_none(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(qscope_posttrain, "__file__", str(tmp_path / "site" / "qscope_posttrain" / "__init__.py"))
    assert main([command, "--help"]) == 2
    said = capsys.readouterr().err
    assert f"`qscope {command}` needs a clone of the repository" in said
    assert str(tmp_path / "site") in said
    assert str(tmp_path / "site") not in sys.path


def test_every_command_has_a_module():
    for command in COMMANDS:
        assert callable(module._runner(command))


class _Failing:
    def __init__(self, error):
        self.error = error

    def run(self, arguments):
        raise self.error


@pytest.mark.parametrize("error", [UserValueError("bad"), UserTypeError("bad"), UserFileNotFoundError("bad")])
def test_mistakes_are_one_line_and_debug_shows_more(monkeypatch, capsys, error):
    monkeypatch.setattr(module, "_runner", lambda name: _Failing(error).run)
    assert main(["sft"]) == 2
    assert capsys.readouterr().err == "error: bad\n"
    with pytest.raises(type(error)):
        main(["sft", "--debug"])


def test_other_ranks_say_who_they_are(monkeypatch, capsys):
    monkeypatch.setattr(module, "_runner", lambda name: _Failing(UserValueError("bad")).run)
    monkeypatch.setenv("RANK", "3")
    assert main(["sft"]) == 2
    assert capsys.readouterr().err == "error (rank 3): bad\n"


@pytest.mark.parametrize(
    "error", [RuntimeError, ValueError, TypeError, OSError, ImportError, KeyError, BrokenPipeError]
)
def test_faults_of_the_program_are_not_hidden(monkeypatch, error):
    monkeypatch.setattr(module, "_runner", lambda name: _Failing(error("a bug")).run)
    with pytest.raises(error, match="a bug"):
        main(["sft"])


def test_a_message_of_several_lines_is_one(monkeypatch, capsys):
    monkeypatch.setattr(module, "_runner", lambda name: _Failing(UserValueError("first\n\n  second\n")).run)
    assert main(["sft"]) == 2
    assert capsys.readouterr().err == "error: first second\n"


def test_an_error_of_a_worker_that_loads_data_is_one_line(monkeypatch, capsys):
    try:
        raise UserValueError("no such\n  language")
    except UserValueError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UserValueError, match="Traceback") as caught:
        wrapped.reraise()
    monkeypatch.setattr(module, "_runner", lambda name: _Failing(caught.value).run)
    assert main(["sft"]) == 2
    assert capsys.readouterr().err == "error: no such language\n"


def _bug_in_the_package():
    return int("x")


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: json.loads("{"), UserValueError),
        (lambda: Path("/nowhere/at/all").read_text(), UserFileNotFoundError),
        (lambda: importlib.import_module("no.such.library"), UserValueError),
        (lambda: os.listdir("/nowhere/at/all"), UserFileNotFoundError),  # of the file system, wherever it is raised
        (lambda: torch.nn.Linear(2, 2)(torch.zeros(3)), UserValueError),  # RuntimeError
        (lambda: fractions.Fraction(None, "x"), UserTypeError),
    ],
)
def test_what_a_library_refuses_is_a_users_mistake(call, kind):
    with pytest.raises(kind, match="cannot do it: ") as caught, library_refusals("cannot do it"):
        call()
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (_bug_in_the_package, ValueError),
        (lambda: len(None), TypeError),
        (lambda: {}["x"], KeyError),
        (lambda: object().x, AttributeError),
        (lambda: pathlib_without_name(), NameError),  # noqa: F821
    ],
)
def test_a_bug_stays_one_where_a_library_may_refuse(call, kind):
    with pytest.raises(kind) as caught, library_refusals("cannot do it"):
        call()
    assert not isinstance(caught.value, UserError)


def test_variables_of_a_recipe_are_there_before_the_command_is_imported(monkeypatch, tmp_path, capsys):
    class Looking:
        def run(self, arguments):
            if "fail" in arguments:
                raise UserValueError("bad")
            return 0

    seen = []
    monkeypatch.setattr(module, "_runner", lambda name: (seen.append(dict(os.environ)) or Looking()).run)
    monkeypatch.setattr(os, "environ", {"NCCL_DEBUG": "WARN"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("env: {OMP_NUM_THREADS: 1, NCCL_DEBUG: INFO}\n")
    wanted = {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "1"}
    assert main(["sft", "fail", "--config", str(recipe)]) == 2
    assert os.environ == {"NCCL_DEBUG": "WARN"}
    assert main(["sft", f"--config={recipe}"]) == 0
    assert os.environ == wanted
    assert seen == [wanted, wanted]


def test_a_reader_that_is_gone_ends_the_command_quietly(monkeypatch, capfd):
    class Talking:
        def run(self, arguments):
            for _ in range(1000):
                print("x" * 1000)

    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(module, "_runner", lambda name: Talking().run)
    with open(writing, "w", closefd=False) as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["sae"]) == 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # what is left in the buffer goes nowhere
    os.close(writing)
    assert capfd.readouterr().err == ""


def test_interruption(monkeypatch, capsys):
    monkeypatch.setattr(module, "_runner", lambda name: _Failing(KeyboardInterrupt()).run)
    assert main(["sft"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_colocated_vllm_leaves_its_groups_before_the_command_ends(monkeypatch):
    """It would look for them in the group of the launcher when the interpreter ends."""
    done = []
    vllm = {
        name: lambda name=name: done.append(name)
        for name in ("destroy_model_parallel", "destroy_distributed_environment")
    }
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", SimpleNamespace(**vllm))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    module._leave_process_group()
    assert done == ["destroy_model_parallel", "destroy_distributed_environment"]
