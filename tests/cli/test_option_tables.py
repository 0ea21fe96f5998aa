"""Options declared as tables of text."""

from __future__ import annotations

import argparse

import pytest

from qscope_posttrain.cli.parsing.table import add_options, defaults_of, read_tables


def parsed(table: str, *arguments: str) -> dict:
    parser = argparse.ArgumentParser()
    add_options(parser, table)
    return vars(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("entry", "given", "value"),
    [
        ("--name: text  # a name", [], None),
        ("--name: text = two words  # a name", [], "two words"),
        ("--name: int = 3  # a number", [], 3),
        ("--name: float = 3  # a number", [], 3.0),
        ("--name: float+  # numbers", ["--name", "1", "2.5"], [1.0, 2.5]),
        ("--name: int{2} = 4 12  # two numbers", [], [4, 12]),
        ("--name: text* = a b  # words", ["--name"], []),
        ("--name: or|votes = or  # a rule", ["--name", "votes"], "votes"),
        ("--name: switch  # a flag", [], False),
        ("--name: switch  # a flag", ["--name"], True),
        ("--name: yes|no = yes  # a flag with an opposite", [], True),
        ("--name: yes|no = yes  # a flag with an opposite", ["--no-name"], False),
        ("name: text  # a position", ["x"], "x"),
        ("--name: text = {text}  # a template", [], "{text}"),
    ],
)
def test_each_form_of_an_entry(entry, given, value):
    assert parsed(entry, *given) == {"name": value}


def test_help_texts_go_on_in_indented_lines_and_keep_their_percent_signs():
    table = """
--share: float = 0.5  # share of the
    lines, 65 % of them, # included
--seed
"""
    found = read_tables(table)
    assert found["--share"]["help"] == "share of the lines, 65 %% of them, # included"
    assert list(found) == ["--share", "--seed"]


def test_shared_options_and_what_a_command_changes_of_them():
    shared = read_tables("--texts --max-length --chat --layer --seed")
    found = read_tables(
        "--texts optional  # a file", "--max-length = 99", "--chat: yes|no = yes", "--layer: int  # one"
    )
    assert (shared["--texts"]["required"], found["--texts"]["required"]) == (True, False)
    assert (found["--texts"]["help"], found["--max-length"]["help"]) == ("a file", shared["--max-length"]["help"])
    assert (found["--max-length"]["default"], found["--max-length"]["type"]) == (99, int)
    assert (found["--chat"]["default"], found["--chat"]["help"]) == (True, shared["--chat"]["help"])
    assert ("nargs" in shared["--layer"], "nargs" in found["--layer"]) == (True, False)  # a type of its own
    again = read_tables("--max-length --seed", "--max-length = 7")
    assert (list(again), again["--max-length"]["default"]) == (["--max-length", "--seed"], 7)
    assert read_tables("--max-length")["--max-length"] == shared["--max-length"]


def test_defaults_of_a_table():
    assert defaults_of("--seed\n--name: text  # a name\n--loud: switch  # a flag") == {
        "seed": 0, "name": None, "loud": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "entry", ["--name text  # no colon", "--name: text?  # no such type", "--nowhere", "--a = = 3"]
)
def test_an_entry_that_cannot_be_read_is_refused(entry):
    with pytest.raises(SyntaxError):
        read_tables(entry)
