"""Options kept in a YAML file, for the commands that do not train."""

from __future__ import annotations

import argparse

import pytest

from qscope_posttrain.cli.options import OptionParser


@pytest.fixture
def parser():
    parser = OptionParser(prog="qscope something")
    actions = parser.add_subparsers(dest="action", required=True)
    new = actions.add_parser("do")
    new.add_argument("--model", required=True)
    new.add_argument("--layers", nargs="+", type=int)
    new.add_argument("--top-p", type=float, default=1.0)
    new.add_argument("--chat", action="store_true")
    new.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    new.add_argument("--strengths", nargs="+", type=float)
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
    }
    assert parser.parse(["do", f"--config={recipe}"]).top_p == 0.9


def test_switches_can_be_off_in_a_recipe(parser, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\nchat: false\ncausal: true\n")
    options = parser.parse(["do", "--config", str(recipe)])
    assert (options.chat, options.causal) == (False, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("chatt: false", "Did you mean '--chat'"),
        ("modle: x", "Did you mean '--model'"),
        ("model: {a: 1}", "must be text, a number"),
        ("- model", "must map keys to values"),
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
    with pytest.raises(ValueError, match="needs a YAML file"):
        parser.parse(["do", "--config"])
