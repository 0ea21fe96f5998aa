from __future__ import annotations

import json

import pytest

from qscope_posttrain.cli.main import main

SHORT = ["--samples", "2", "--max-new-tokens", "6", "--batch-size", "8", "--min-copies", "2", "--min-tokens", "4"]


def test_table_examples_and_summary_agree(world, tmp_path, capsys):
    arguments = ["--model", world.model, "--prompts", world.prompts, "--output", str(tmp_path)]
    assert main(["evaluate", "repetition", *arguments, *SHORT, "--temperature", "0.1", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert "Endless repetition" in shown
    assert "min_copies 2, min_tokens 4" in " ".join(shown.split())
    examples = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "summary.json").read_text())
    results, settings = summary["results"], summary["settings"]
    assert len(examples) == results["samples"] == 4 * 2 * 2
    assert results["ratio"] == sum(example["endless"] for example in examples) / len(examples)
    assert results["ended"] == sum(example["ended"] for example in examples)
    assert all(example["loop"]["block"] for example in examples if example["endless"])
    assert set(results["groups"]) == {"en", "fr", "ru", "ko"}
    assert (settings["temperature"], settings["top_p"], settings["min_copies"], summary["seeds"]) == (0.1, 1.0, 2, [3])
    assert summary["command"] == "evaluate repetition"


def test_prompts_without_language(world, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "One and"}) + "\n" + json.dumps({"prompt": "Two and"}) + "\n")
    arguments = ["--model", world.model, "--prompts", str(prompts), "--output", str(tmp_path), "--max-prompts", "1"]
    assert main(["evaluate", "repetition", *arguments, *SHORT, "--chat"]) == 0
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert (results["prompts"], results["samples"], list(results["groups"])) == (1, 2, ["all"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--min-copies", "1"], "min_copies=1"),
        (["--max-new-tokens", "8"], "leaves no room"),
        (["--temperature", "-1"], "temperature"),
        (["--target", "zh"], "unknown option '--target'"),
        (["--vllm-tensor-parallel-size", "2"], "is read with --engine vllm alone"),
        ([], "exceeds the 512 positions"),
    ],
)
def test_a_mistake_is_one_clear_line(world, tmp_path, capsys, extra, message):
    arguments = ["--model", world.model, "--prompts", world.prompts, "--output", str(tmp_path)]
    assert main(["evaluate", "repetition", *arguments, *extra]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
