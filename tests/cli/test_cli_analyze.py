"""`qscope analyze`: both commands on a tiny world; what is printed, written and refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from qscope_posttrain.cli.main import main


@pytest.fixture(scope="module")
def benchmarks(world, texts, tmp_path_factory):
    """A YAML file of five benchmarks of four to twelve items, and correctness of five models on each item."""
    folder = tmp_path_factory.mktemp("benchmarks")
    entries, generator = {}, np.random.default_rng(0)
    (folder / "correct").mkdir()
    for number, (language, lines) in enumerate(texts.items()):
        items = [f"{word} {line}" for word in ("a", "b", "c")[: 3 - number % 2] for line in lines]
        place = folder / f"{language}.jsonl"
        place.write_text("".join(json.dumps({"text": item}) + "\n" for item in items))
        entries[language] = {"source": str(place), "field": "text"}
        correct = (generator.random((len(items), 5)) < np.linspace(0.2, 0.9, 5)).astype(int)
        correct[0] = [0, 1, 0, 1, 1]
        lines_ = ["A,B,C,D,E", *(",".join(map(str, row)) for row in correct)]
        (folder / "correct" / f"{language}.csv").write_text("\n".join(lines_) + "\n")
    (folder / "benchmarks.yaml").write_text(yaml.safe_dump(entries))
    return folder


def arguments(world, benchmarks, output):
    return ["--model", world.model, "--sae", world.saes, "--layers", "2-3", "--benchmarks",
            str(benchmarks / "benchmarks.yaml"), "--output", str(output)]  # fmt: skip


@pytest.mark.slow
def test_redundancy(world, benchmarks, tmp_path, capsys):
    extra = ["--correctness", str(benchmarks / "correct"), "--repeats", "20"]
    assert main(["analyze", "redundancy", *arguments(world, benchmarks, tmp_path), *extra]) == 0
    shown = capsys.readouterr().out
    assert "Redundancy by features, layer 2" in shown
    assert "Redundancy by features and by performance, layer 3" in shown
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert {entry["name"] for entry in results["layer_3"]["redundancy"]} == {"en", "fr", "zh", "ru", "ko"}
    first = results["layer_2"]["redundancy"][0]
    assert first["r_hat"]["low"] < first["r_hat"]["estimate"] < first["r_hat"]["high"]
    assert [line["predictor"] for line in results["layer_2"]["agreement"]][:3] == [
        "R-hat", "R-hat, size-matched", "N alone (control)",
    ]  # fmt: skip
    assert len(results["performance"]) == 5
    assert results["input"]["benchmarks"]["en"]["items"] == 12
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 * 2


@pytest.mark.slow
def test_overlap(world, benchmarks, tmp_path, capsys):
    extra = ["--correctness", str(benchmarks / "correct"), "--control", "en", "--token-control"]
    assert main(["analyze", "overlap", *arguments(world, benchmarks, tmp_path), *extra]) == 0
    shown = capsys.readouterr().out
    for title in ("Overlap of features, layer 2", "Nearest benchmarks, tokens, no model", "Recommendation, layer 3"):
        assert title in shown
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert len(results["layer_2"]["pairs"]) == 20
    assert {line["action"] for line in results["layer_3"]["recommendation"]} <= {
        "merge", "drop", "keep", "keep (undecided)",
    }  # fmt: skip
    assert set(results["tokens"]["nearest"]) == {"en", "fr", "zh", "ru", "ko"}
    targets = {line["target"] for line in results["layer_2"]["agreement"]}
    assert targets == {"performance", "performance given en"}
    assert (tmp_path / "report.html").read_text().count("<svg") == 3 * 3


def test_words_prompt_and_scores(world, benchmarks, tmp_path):
    words = [f"{name}={benchmarks}/{name}.jsonl:text" for name in ("en", "fr")]
    common = ["--model", world.model, "--sae", world.saes, "--layers", "3", "--output", str(tmp_path)]
    extra = ["--benchmarks", *words, "--prompt", r"{text}\nAnswer:", "--pooling", "max", "--max-items", "6"]
    assert main(["analyze", "overlap", *common, *extra]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["results"]["input"]["benchmarks"]["fr"]["items"] == 6
    assert "nearest" not in summary["results"]["layer_3"]


@pytest.mark.parametrize(
    ("action", "extra", "message"),
    [
        ("overlap", ["--control", "en"], "--control is a column of the scores"),
        ("overlap", ["--prompt", "Answer:"], "a prompt must contain {text}"),
        ("overlap", ["--layers", "9"], "the model has the layers 0 to 3"),
        ("overlap", ["--size", "40"], "need at least"),
        ("redundancy", ["--max-items", "3", "--correctness", "CORRECT"], "has 12 items, the benchmark 3"),
        ("redundancy", ["--benchmarks", "en=a.jsonl:x", "en=b.jsonl:x"], "different names"),
        ("redundancy", ["--benchmarks", "nowhere.yaml"], "no recipe at 'nowhere.yaml'"),
        ("redundancy", ["--repeatz", "3"], "Did you mean '--repeats'"),
    ],
)
def test_a_mistake_is_one_clear_line(world, benchmarks, tmp_path, capsys, action, extra, message):
    extra = [word.replace("CORRECT", str(benchmarks / "correct")) for word in extra]
    assert main(["analyze", action, *arguments(world, benchmarks, tmp_path), *extra]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_an_unknown_key_of_a_benchmark(world, tmp_path, capsys):
    (tmp_path / "b.yaml").write_text("gsm8k: {source: a.jsonl, feild: question}\n")
    common = ["--model", world.model, "--sae", world.saes, "--layers", "3", "--output", str(tmp_path / "out")]
    assert main(["analyze", "overlap", *common, "--benchmarks", str(tmp_path / "b.yaml")]) == 2
    assert "unknown key 'feild' of 'gsm8k'. Did you mean 'field'?" in capsys.readouterr().err
