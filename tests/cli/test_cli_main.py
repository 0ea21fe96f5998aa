from __future__ import annotations

import subprocess
import sys

import pytest

from qscope_posttrain import __version__
from qscope_posttrain.cli import main as module
from qscope_posttrain.cli.main import COMMANDS, main


@pytest.mark.parametrize("name", ["qscope_posttrain", "qscope_posttrain.cli"])
def test_both_modules_run_and_help_imports_nothing_heavy(name):
    code = (
        f"import runpy, sys\nsys.argv = ['x', '--help']\n"
        f"try:\n    runpy.run_module('{name}', run_name='__main__')\nexcept SystemExit as end:\n    status = end.code\n"
        "print(status, sorted({'torch', 'trl', 'transformers', 'matplotlib', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == __version__


def test_unknown_command_is_suggested(capsys):
    assert main(["featuers"]) == 2
    assert "Did you mean 'features'?" in capsys.readouterr().err


def test_every_command_has_a_module():
    for command in COMMANDS:
        assert callable(module._module(command).run)


class _Failing:
    def __init__(self, error):
        self.error = error

    def run(self, arguments):
        raise self.error


@pytest.mark.parametrize("error", [ValueError("bad"), TypeError("bad"), FileNotFoundError("bad")])
def test_mistakes_are_one_line_and_debug_shows_more(monkeypatch, capsys, error):
    monkeypatch.setattr(module, "_module", lambda name: _Failing(error))
    assert main(["sft"]) == 2
    assert capsys.readouterr().err == "error: bad\n"
    with pytest.raises(type(error)):
        main(["sft", "--debug"])


def test_other_ranks_say_who_they_are(monkeypatch, capsys):
    monkeypatch.setattr(module, "_module", lambda name: _Failing(ValueError("bad")))
    monkeypatch.setenv("RANK", "3")
    assert main(["sft"]) == 2
    assert capsys.readouterr().err == "error (rank 3): bad\n"


def test_faults_of_the_program_are_not_hidden(monkeypatch):
    monkeypatch.setattr(module, "_module", lambda name: _Failing(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["sft"])


def test_interruption(monkeypatch, capsys):
    monkeypatch.setattr(module, "_module", lambda name: _Failing(KeyboardInterrupt()))
    assert main(["sft"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
