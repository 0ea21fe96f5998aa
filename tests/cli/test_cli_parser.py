from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from qscope_posttrain.cli.parsing.fields import field_help
from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.cli.training.sft import METHODS, config_class, parse_recipe
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.loading import parse_layers


@dataclass
class Arguments:
    rate: float = 1e-3
    steps: int | None = 5
    name: str = "x"
    layers: list[int] | None = None
    words: list[str] = field(default_factory=lambda: ["a"])
    mode: Literal["fast", "slow"] = "fast"
    save: Literal["no", "steps", "yes"] = "steps"
    first: bool = False
    second: bool = True
    either: list[str] | str | None = None
    options: dict[str, Any] | str | None = None


def _parse(tmp_path, text: str, *arguments: str) -> Arguments:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return CommandParser([Arguments]).build([f"--config={path}", *arguments])[0]


@pytest.mark.parametrize(
    ("text", "field_name", "value"),
    [
        ("rate: 1e-4", "rate", 1e-4),  # YAML reads 1e-4, without a dot, as text
        ("rate: 1", "rate", 1.0),
        ("steps: null", "steps", None),
        ("steps: 7", "steps", 7),
        ("layers: [1, 2]", "layers", [1, 2]),
        ("layers: 3", "layers", [3]),
        ("words: one", "words", ["one"]),
        ("save: no", "save", "no"),  # YAML reads a bare no as false
        ("first: yes", "first", True),
        ("second: false", "second", False),
        ("either: [a, b]", "either", ["a", "b"]),
        ("either: a", "either", "a"),
        ("name: 7", "name", "7"),
        ("name: 007", "name", "007"),
        ("name: no", "name", "no"),
        ("name: 1e5", "name", "1e5"),
        ("name: 12:30:45", "name", "12:30:45"),
        ("name: 2026-01-01", "name", "2026-01-01"),
        ("words: [1, yes, 1.50, a]", "words", ["1", "yes", "1.50", "a"]),
        ("steps: 010", "steps", 10),
        ("rate: 1_000", "rate", 1000.0),
        ("options: {rate: 1e-5, on: 1:30}", "options", {"rate": 1e-5, True: "1:30"}),
        ("layers: null", "layers", None),
        ("save: yes", "save", "yes"),
    ],
)
def test_values_from_a_file(tmp_path, text, field_name, value):
    found = getattr(_parse(tmp_path, text), field_name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raet: 1", r"unknown key 'raet' in .*recipe.yaml. Did you mean 'rate'\?"),
        ("zzzz: 1", r"unknown key 'zzzz' in .*recipe.yaml.$"),
        ("raet: 1\nstpes: 2", r"'raet'.*'stpes'"),
        ("steps: 1.5", "steps must be a whole number; got 1.5"),
        ("steps: [1]", "steps must be a single value"),
        ("rate: true", "rate must be a number; got True"),
        ("rate: fast", "rate: could not convert"),
        ("mode: 7", r"mode must be one of fast, slow; got '7'"),
        ("name: {a: 1}", "name must be text, a number, true, false or a list of them"),
        ("name: [a]", "name must be a single value"),
        ("words: [[a]]", "words must be text; got"),
        ("words: [null]", "words must be text; got None"),
        ("rate: null", "rate must be a number; got null"),
        ("zzzz: null", "unknown key 'zzzz'"),
        ("options: '{a'", "options: not JSON"),
        ("steps: 1.0", "steps must be a whole number; got 1.0"),
        ("steps: 2026-01-01", "steps: invalid literal"),
        ("rate: 1:30", "rate: could not convert"),
        ("steps: 1\nsteps: 2", "line 2.*'steps' is given twice"),
        ("either: a\nEither: b", "unknown key 'Either'"),
        ("mode: fast\nmo-de: slow", "unknown key 'mo_de'"),
        ("save: no\n'save': steps", "line 2.*'save' is given twice"),
        ("1: 2", "keys are names of options; got 1"),
        ("no: 2", "keys are names of options; got False"),
        ("{}", "has no keys"),
        ("", "must map keys to values"),
        ("config: other.yaml", "stands on the command line"),
        ("rewards: [a]", "It looks like a recipe for `qscope grpo`"),
        ("sasft_weight: 1\nmethod: sft", "It looks like a recipe for `qscope sft`"),
        ("layers: [a]", "layers: invalid literal"),
        ("layers: [1.5]", "layers must be a whole number; got 1.5"),
        ("mode: slwo", r"mode must be one of fast, slow; got 'slwo'. Did you mean 'slow'\?"),
        ("first: maybe", "first: Truthy value expected"),
        ("- a", "must map keys to values"),
        ("a: [", "not valid YAML"),
        ("env: 3", "'env' must map"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        _parse(tmp_path, text)


def test_yaml_runs_no_code(tmp_path):
    with pytest.raises(ValueError, match="not valid YAML"):
        _parse(tmp_path, "name: !!python/object/apply:os.getcwd []")


def test_command_line_overrides_and_is_as_strict(tmp_path):
    found = _parse(tmp_path, "rate: 0.5\nsteps: 3", "--steps", "4", "--layers", "1", "2", "--mode=slow", "--no_second")
    assert (found.rate, found.steps, found.layers, found.mode, found.second) == (0.5, 4, [1, 2], "slow", False)
    for arguments, message in [
        (["--raet", "1"], r"unknown option '--raet'. Did you mean '--rate'\?"),
        (["--ra", "1"], "unknown option '--ra'"),  # no abbreviation
        (["--rate", "x"], "invalid float value"),
        (["--mode", "x"], "invalid choice"),
        (["word"], "unexpected words on the command line: word"),
        (["--config"], "--config needs a file"),
        (["--config", "--rate"], "--config needs a file"),
        (["--config", "other.yaml"], "--config was given 2 times"),
    ]:
        with pytest.raises(ValueError, match=message):
            _parse(tmp_path, "rate: 0.5", *arguments)
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        CommandParser([Arguments]).build(["--config", "nowhere.yaml"])


def test_environment_block_gives_way_to_the_shell(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {"NCCL_DEBUG": "WARN"})
    _parse(tmp_path, "env:\n  NCCL_DEBUG: INFO\n  OMP_NUM_THREADS: 03\nrate: 1")
    assert os.environ == {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "03"}


@pytest.mark.parametrize("rest", ["raet: 1", "rate: x", "mode: slow"])
def test_a_recipe_that_is_refused_sets_nothing(tmp_path, monkeypatch, rest):
    def refuse(values):
        if values.mode == "slow":
            raise UserValueError("no")

    monkeypatch.setattr(os, "environ", {})
    path = tmp_path / "recipe.yaml"
    path.write_text(f"env: {{OMP_NUM_THREADS: 1}}\n{rest}")
    with pytest.raises(ValueError, match=r"raet|rate|no"):
        CommandParser([Arguments], before_build=refuse).build(["--config", str(path)])
    assert os.environ == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "{}", "--steps", "4", "--words", "b", "c", "--no-second", "--first"],
        ["--steps", "4", "--words", "b", "c", "--no_second", "--first", "--config={}"],
        ["--steps=4", "--config", "{}", "--words", "b", "c", "--second", "false", "--first=true"],
    ],
)
def test_the_command_line_wins_wherever_the_recipe_stands(tmp_path, arguments):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 3\nwords: [x, y, z]\nsecond: true\nfirst: false\nrate: 0.5\n")
    found = CommandParser([Arguments]).build([argument.format(path) for argument in arguments])[0]
    assert (found.steps, found.words, found.second, found.first, found.rate) == (4, ["b", "c"], False, True, 0.5)


def test_defaults_of_the_caller_give_way_to_file_and_command_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 3\n")
    found = CommandParser([Arguments]).build(
        [f"--config={path}", "--name", "n"], {"steps": 1, "name": "d", "rate": 2.0}
    )
    assert (found[0].steps, found[0].name, found[0].rate) == (3, "n", 2.0)


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_method_is_a_documented_key(method):
    kind, prefix = config_class(method), METHODS[method][1]
    parser = CommandParser([(kind, prefix)])
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    documented = field_help(kind)
    assert set(actions) == {f"{prefix}{name}" for name in kind.__dataclass_fields__}
    for name, option in kind.__dataclass_fields__.items():
        assert documented[name]
        assert actions[prefix + name].default is None
        if option.default is not None:
            assert f"(default: {option.default!s})" in actions[prefix + name].help


def test_the_help_shows_each_default_once(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "lambda, for readouts in standard deviations." in shown
    for key, default in (("sasft_weight", "0.1"), ("token_penalty_weight", "20.0"), ("anchor_weight", "1.0")):
        entry = shown[shown.rindex(f"--{key} ") :]
        assert entry[entry.index("(default: ") :].startswith(f"(default: {default}) --")


@pytest.mark.parametrize(
    ("words", "layers"), [(["all"], (0, 1, 2, 3)), (["2"], (2,)), (["3", "0-1", "1"], (0, 1, 3)), (["2-2"], (2,))]
)
def test_layers(words, layers):
    assert parse_layers(words, 4) == layers


@pytest.mark.parametrize("words", [["4"], ["-1"], ["1-"], ["x"], ["1-9"], ["3-2"], []])
def test_no_layers(words):
    with pytest.raises(ValueError, match=r"layer|gives"):
        parse_layers(words, 4)
