from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from qscope_posttrain.cli.config_arguments import arguments_of, field_docstrings
from qscope_posttrain.cli.inputs import parse_layers, read_prompts, read_texts
from qscope_posttrain.cli.parser import RecipeParser
from qscope_posttrain.cli.sft_arguments import METHODS, parse_recipe


@dataclass
class Arguments:
    rate: float = 1e-3
    steps: int | None = 5
    name: str = "x"
    layers: list[int] | None = None
    words: list[str] = field(default_factory=lambda: ["a"])
    mode: Literal["fast", "slow"] = "fast"
    save: Literal["no", "steps"] = "steps"
    first: bool = False
    second: bool = True
    either: list[str] | str | None = None


def _parse(tmp_path, text: str, *arguments: str) -> Arguments:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return RecipeParser([Arguments]).parse([f"--config={path}", *arguments])[0]


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
        ("name: 7", "name", 7),
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
        ("name: no", "name must be text; got False"),
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
        (["--raet", "1"], r"unknown key 'raet' in the command line. Did you mean 'rate'\?"),
        (["--ra", "1"], "unknown key 'ra'"),  # no abbreviation
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
        RecipeParser([Arguments]).parse(["--config", "nowhere.yaml"])


def test_environment_block(tmp_path, monkeypatch):
    monkeypatch.setenv("QSCOPE_TEST_VARIABLE", "before")
    _parse(tmp_path, "env:\n  QSCOPE_TEST_VARIABLE: 3\nrate: 1")
    assert os.environ["QSCOPE_TEST_VARIABLE"] == "3"


@pytest.mark.parametrize("method", METHODS)
def test_every_option_of_a_method_is_a_documented_key(method):
    kind, prefix = METHODS[method]
    documented, keys = field_docstrings(kind), arguments_of(kind, prefix).__dataclass_fields__
    assert set(keys) == {f"{prefix}{name}" for name in kind.__dataclass_fields__}
    assert all(documented[name] for name in kind.__dataclass_fields__)
    assert all(f"(default: {option.default})" in keys[prefix + name].metadata["help"]
               for name, option in kind.__dataclass_fields__.items())  # fmt: skip


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


def test_texts_by_line_with_limit(tmp_path):
    (tmp_path / "en.txt").write_text("one\n\n  two  \nthree\n", encoding="utf-8")
    (tmp_path / "zh.txt").write_text("一\u2028二\r\n三\n", encoding="utf-8")
    assert read_texts(tmp_path, limit=2) == {"en": ["one", "two"], "zh": ["一\u2028二", "三"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "line 2: expected strings"),
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected a JSON object"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "a", "language": "en"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_texts(path)


def test_prompts_are_text_or_messages(tmp_path):
    path = tmp_path / "prompts.jsonl"
    messages = '[{"role": "user", "content": "a"}]'
    path.write_text(f'{{"prompt": "a", "language": "en"}}\n\n{{"prompt": {messages}, "language": "en"}}\n')
    assert read_prompts(path) == {"en": ["a", [{"role": "user", "content": "a"}]]}
    path.write_text('{"prompt": 3, "language": "en"}\n')
    with pytest.raises(ValueError, match="line 1: expected 'prompt'"):
        read_prompts(path)
    for label in ("null", '""', "3", '["en"]'):
        path.write_text(f'{{"prompt": "a", "language": "en"}}\n{{"prompt": "a", "language": {label}}}\n')
        shown = re.escape(repr(json.loads(label)))
        with pytest.raises(ValueError, match=f"line 2: expected .* got 'prompt': 'a' and 'language': {shown}"):
            read_prompts(path)
        path.write_text(path.read_text().replace("prompt", "text"))
        with pytest.raises(ValueError, match=f"line 2: expected .* got 'text': 'a' and 'language': {shown}"):
            read_texts(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(path)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "en.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"en.txt' is not UTF-8"):
        read_texts(tmp_path)
