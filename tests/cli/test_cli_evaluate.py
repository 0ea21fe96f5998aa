from __future__ import annotations

import json

import pytest

from benchmarks.testbed.switching.grammar import write_paragraphs
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
        (["--target", "zh-CN"], "Unknown language 'zh-CN'. Did you mean 'zh'?"),
        (["--temperature", "-1"], "temperature"),
        (["--chat-template-options", "[1]"], "must be a JSON object"),
        (["--chat-template-options", "{"], "must be JSON"),
        (["--max-new-tokens", "5000"], "exceeds the 512 positions"),
        (["--tempreature", "1"], "unknown option '--tempreature'. Did you mean '--temperature'?"),
        (["--samples", "many"], "invalid int value: 'many'"),
        (["--prompts", "{zh}", "--model", "nowhere"], "are in zh, where zh is no switch"),
    ],
)
def test_a_mistake_is_one_clear_line(world, tmp_path, capsys, extra, message):
    (tmp_path / "zh.jsonl").write_text('{"prompt": "a", "language": "zh"}')
    extra = [word.replace("{zh}", str(tmp_path / "zh.jsonl")) for word in extra]
    arguments = ["--model", world.model, "--prompts", world.prompts, "--output", str(tmp_path)]
    assert main(["evaluate", "code-switching", *arguments, *extra]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """A folder of text in two languages of one script, another one that is not asked for, and prompts in English."""
    folder = tmp_path_factory.mktemp("prose")
    (folder / "texts").mkdir()
    for language in ("en", "fr", "zh"):
        paragraphs = write_paragraphs(language, 40_000, 1)
        (folder / "texts" / f"{language}.txt").write_text("\n".join(paragraphs), encoding="utf-8")
    rows = [{"prompt": prompt, "language": "en"} for prompt in ("We walk along", "The old house", "It is")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_switches_within_a_script_are_told_by_words(world, prose, tmp_path, capsys):
    arguments = ["--model", world.model, "--prompts", str(prose / "prompts.jsonl"), "--output", str(tmp_path)]
    arguments += ["--target", "fr", "--identify", "words", "--identify_texts", str(prose / "texts"), *SHORT]
    assert main(["evaluate", "code-switching", *arguments, "--false-positive-rate", "0.01"]) == 0
    assert "Code-switching to fr" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["settings"]["identify"] == "words"
    results = summary["results"]
    assert results["settings"]["identified_by"] == "words"
    found = results["identification"]
    assert (found["by"], found["others"], found["false_positive_rate"]) == ("words", ["en"], 0.01)
    # A third of 40,000 characters, in pieces of six tokens.
    assert 200 < found["calibration"]["en"]["texts"] < 2500
    assert found["calibration"]["en"]["rate"]["estimate"] <= 0.01


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--identify", "words"], "give --identify-texts"),
        (["--identify-texts", "texts"], "is read with --identify words alone"),
        (["--identify", "words", "--identify-texts", "nowhere"], "no texts at 'nowhere'"),
        (["--identify", "words", "--identify-texts", "texts", "--target", "de"], "has no de.txt"),
        (["--identify", "words", "--identify-texts", "texts", "--max-new-tokens", "200"], "at least 199 are needed"),
        (
            ["--identify", "words", "--identify-texts", "texts", "--false-positive-rate", "2"],
            "false_positive_rate must",
        ),
        (
            ["--identify", "words", "--identify-texts", "texts", "--target", "zh", "--max-new-tokens", "20"],
            "'zh' has no spaces between words",
        ),
        (["--identify", "letters"], "invalid choice: 'letters'"),
    ],
)
def test_words_that_cannot_be_told_are_refused_before_sampling(world, prose, tmp_path, capsys, extra, message):
    extra = [str(prose / word) if word == "texts" else word for word in extra]
    arguments = ["--model", world.model, "--prompts", str(prose / "prompts.jsonl"), "--output", str(tmp_path)]
    assert main(["evaluate", "code-switching", "--target", "fr", *arguments, *extra]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_language_of_the_prompts_without_text_is_named(world, prose, tmp_path, capsys):
    arguments = ["--model", world.model, "--prompts", world.prompts, "--output", str(tmp_path), "--target", "fr"]
    arguments += ["--identify", "words", "--identify-texts", str(prose / "texts")]
    assert main(["evaluate", "code-switching", *arguments]) == 2
    assert "has no text in ko, ru, a language of the prompts" in capsys.readouterr().err
