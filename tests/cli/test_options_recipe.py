"""Options kept in a YAML file, for the commands that do not train."""

from __future__ import annotations

import argparse
import os

import pytest

from qscope_posttrain.cli.parsing.parser import CommandParser


@pytest.fixture
def parser():
    parser = CommandParser(prog="qscope something")
    actions = parser.add_subparsers(dest="action", required=True)
    new = actions.add_parser("do")
    new.add_argument("--model", required=True)
    new.add_argument("--layers", nargs="+", type=int)
    new.add_argument("--top-p", type=float, default=1.0)
    new.add_argument("--chat", action="store_true")
    new.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    new.add_argument("--strengths", nargs="+", type=float)
    new.add_argument("--window", nargs=2, type=int)
    prompt = new.add_mutually_exclusive_group()
    prompt.add_argument("--prompt")
    prompt.add_argument("--prompts")
    old = actions.add_parser("show")
    old.add_argument("path")
    old.add_argument("--layer", nargs="+", type=int)
    return parser


def test_recipe_stands_for_its_options_and_what_follows_wins(parser, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: some folder\nlayers: [2, 3]\ntop_p: 0.9\nchat: true\ncausal: false\nstrengths: [-1, 0.5]\n"
    )
    options = parser.parse(["do", "--config", str(recipe), "--top_p", "0.8"])
    assert vars(options) == {
        "action": "do",
        "model": "some folder",
        "layers": [2, 3],
        "top_p": 0.8,
        "chat": True,
        "causal": False,
        "strengths": [-1.0, 0.5],
        "window": None,
        "prompt": None,
        "prompts": None,
    }
    assert parser.parse(["do", f"--config={recipe}"]).top_p == 0.9


@pytest.mark.parametrize("place", range(3))
def test_the_command_line_wins_wherever_the_recipe_stands(parser, tmp_path, place):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\nlayers: [2, 3]\ntop-p: 0.9\ncausal: true\nchat: true\nprompt: a\n")
    arguments = ["do", "--layers", "5", "--top_p=0.8", "--no-causal", "--prompts", "b"]
    places = (0, 1, len(arguments))
    arguments.insert(places[place], f"--config={recipe}")
    options = parser.parse(arguments)
    assert (options.model, options.layers, options.top_p, options.causal, options.chat) == ("m", [5], 0.8, False, True)
    assert (options.prompt, options.prompts) == (None, "b")  # what excludes an option replaces it


def test_text_is_text_and_a_file_may_give_what_a_group_needs(parser, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: 007\nprompt: -x\nlayers: 3\nwindow: [1, 2]\nchat: no\n")
    options = parser.parse(["do", "--config", str(recipe)])
    assert (options.model, options.prompt, options.layers, options.window) == ("007", "-x", [3], [1, 2])
    assert options.chat is False


def test_options_of_a_list_do_not_swallow_a_position(parser, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("layer: [1, 2]\n")
    options = parser.parse(["show", "--config", str(recipe), "some/path"])
    assert (options.path, options.layer) == ("some/path", [1, 2])


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("--max-texts", 0, "max_texts must be at least 1"), ("--max-texts", -1, "at least 1; got -1"),
     ("--seed", -1, "seed must be"), ("--seed", 2**70, "seed must be")],
)  # fmt: skip
def test_limits_and_seeds_are_checked_before_anything_runs(option, value, says):
    parser = CommandParser()
    parser.add_argument("--max-texts", type=int)
    parser.add_argument("--seed", type=int, default=0)
    assert vars(parser.parse([])) == {"max_texts": None, "seed": 0}
    with pytest.raises(ValueError, match=says):
        parser.parse([f"{option}={value}"])


def test_environment_of_a_recipe(parser, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\nprompt: x\nenv: {CUDA_VISIBLE_DEVICES: 1}\n")
    parser.parse(["do", "--config", str(recipe)])
    assert os.environ == {"CUDA_VISIBLE_DEVICES": "1"}


def test_switches_can_be_off_in_a_recipe(parser, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\nchat: false\ncausal: true\n")
    options = parser.parse(["do", "--config", str(recipe)])
    assert (options.chat, options.causal) == (False, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("chatt: false", "Did you mean 'chat'"),
        ("modle: x", "Did you mean 'model'"),
        ("model: {a: 1}", "must be text, a number"),
        ("- model", "must map keys to values"),
        ("nothing: null", "unknown key 'nothing'"),
        ("nothing: false", "unknown key 'nothing'"),
        ("layer: [1]", "unknown key 'layer' .* Did you mean 'layers'"),  # of another sub-command
        ("path: x", "unknown key 'path'"),
        ("top_p: null", "top_p must be a number; got null"),
        ("top_p: [1]", "top_p must be a single value"),
        ("top_p: true", "top_p must be a number; got True"),
        ("chat: maybe", "chat must be true or false"),
        ("chat: 1", "chat must be a truth value"),
        ("layers: []", "must hold at least one value"),
        ("window: [1]", "must be a list of 2 values"),
        ("window: 1", "must be a list of 2 values"),
        ("prompt: a\nprompts: b", "give one of prompt, prompts"),
        ("top-p: 0.1\ntop_p: 0.2", "'top-p' and 'top_p' are the same key"),
        ("chat: true\nchat: false", "line 2.*'chat' is given twice"),
        ("env: {CC: gcc}", "'env' may not set CC"),
        ("allow-code: true", "stands on the command line"),
        ("kind: switching\nbases: [0]", "It looks like a recipe for `qscope experiment`"),
        ("model: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_mistakes(parser, tmp_path, content, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(ValueError, match=message):
        parser.parse(["do", "--model", "m", "--config", str(recipe)])


def test_no_file(parser):
    with pytest.raises(FileNotFoundError, match="no recipe"):
        parser.parse(["do", "--config", "nowhere.yaml"])
    with pytest.raises(ValueError, match="--config needs a file"):
        parser.parse(["do", "--config"])
