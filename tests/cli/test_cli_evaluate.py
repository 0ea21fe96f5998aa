from __future__ import annotations

import json

import pytest

from qscope_posttrain.cli.main import main

SHORT = ["--samples", "2", "--max-new-tokens", "6", "--batch-size", "8"]


def test_table_examples_and_summary_agree(world, tmp_path, capsys):
    arguments = ["--model", world.model, "--prompts", world.prompts, "--output", str(tmp_path), "--top_p", "1.0"]
    assert main(["evaluate", "code-switching", *arguments, *SHORT]) == 0
    shown = capsys.readouterr().out
    assert "Code-switching to zh" in shown
    examples = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(examples) == 4 * 2 * 2
    assert summary["results"]["ratio"] == sum(example["switched"] for example in examples) / len(examples)
    assert set(summary["results"]["languages"]) == {"en", "fr", "ru", "ko"}
    settings = summary["settings"]
    assert (settings["temperature"], settings["top_p"], settings["samples"], summary["seeds"]) == (1.0, 1.0, 2, [0])


def test_folder_of_prompts_without_those_in_the_target(world, tmp_path):
    arguments = ["--model", world.model, "--prompts", world.texts, "--output", str(tmp_path), "--max-prompts", "1"]
    assert main(["evaluate", "code-switching", *arguments, *SHORT, "--chat", "--chat-template-options", "{}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["results"]["languages"]) == {"en", "fr", "ru", "ko"}
    example = json.loads((tmp_path / "examples.jsonl").read_text().splitlines()[0])
    assert example["prompt"].startswith("<|im_start|>user\n")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--target", "fr"], "fr"),
        (["--temperature", "-1"], "temperature"),
        (["--chat-template-options", "[1]"], "must be a JSON object"),
        (["--chat-template-options", "{"], "must be JSON"),
        (["--max-new-tokens", "5000"], "exceeds the 512 positions"),
        (["--tempreature", "1"], "unknown option '--tempreature'. Did you mean '--temperature'?"),
        (["--samples", "many"], "invalid int value: 'many'"),
    ],
)
def test_a_mistake_is_one_clear_line(world, tmp_path, capsys, extra, message):
    arguments = ["--model", world.model, "--prompts", world.prompts, "--output", str(tmp_path)]
    assert main(["evaluate", "code-switching", *arguments, *extra]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
