"""`qscope classify`: fit, predict, filter, report, and its mistakes."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks.testbed.switching.grammar import write_paragraphs
from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier
from qscope_posttrain.cli.main import main


@pytest.fixture(scope="module")
def rows():
    """Sentences in two scripts, labeled by it, of two groups."""
    found = []
    for language in ("en", "ru"):
        for number, text in enumerate(write_paragraphs(language, 20_000, 0)[:24]):
            group = "a" if number % 2 else "b"
            found.append({"text": text[:80], "label": "cyrillic" if language == "ru" else "latin", "group": group})
    return found


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("labeled") / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def fitted(world, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("fitted")
    arguments = [
        "--model",
        world.model,
        "--sae",
        world.saes,
        "--layers",
        "2-3",
        "--data",
        data,
        "--positive",
        "cyrillic",
    ]
    choices = ["--features", "1", "3", "--thresholds", "best", "--folds", "3", "--layer-by", "validation"]
    assert main(["classify", "fit", *arguments, *choices, "--output", str(output)]) == 0
    return output


def test_fit_writes_a_classifier_and_says_what_it_found(fitted):
    summary = json.loads((fitted / "summary.json").read_text())
    classifier = FeatureClassifier.load(fitted / "classifier.safetensors")
    assert summary["results"]["parameters"]["k"] == classifier.k
    assert summary["results"]["positive"] == 24
    assert len(summary["results"]["table"]["rows"]) == len(classifier.feature_ids_) in (1, 3)
    assert set(classifier.origin_["saes"]) == {"2", "3"}
    assert classifier.settings_["median_norms"].keys() == {2, 3}


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out"])
def test_predict_adds_columns_in_every_format(world, fitted, data, rows, name, tmp_path):
    arguments = ["--model", world.model, "--sae", world.saes, "--data", data, "--classifier", str(fitted)]
    assert main(["classify", "predict", *arguments, "--output", str(tmp_path / name), "--texts_at_once", "7"]) == 0
    if name == "out.jsonl":
        found = [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
    elif name == "out.csv":
        with (tmp_path / name).open(encoding="utf-8") as file:
            found = [{**row, "positive": row["positive"] == "True"} for row in csv.DictReader(file)]
    else:
        from datasets import load_from_disk

        found = list(load_from_disk(str(tmp_path / name)))
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    folder = tmp_path if "." in name else tmp_path / name
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    counts = {"texts": len(rows), "positive": sum(row["positive"] for row in found), "rows": len(rows)}
    assert summary["command"] == "classify predict"
    assert counts.items() <= summary["results"].items()
    assert all((float(row["score"]) > 0) == row["positive"] for row in found)
    right = sum(row["positive"] == (row["label"] == "cyrillic") for row in found)
    assert right >= 0.8 * len(rows)


def test_a_filter_drops_rows(world, fitted, data, tmp_path):
    arguments = ["--model", world.model, "--sae", world.saes, "--data", data, "--classifier", str(fitted)]
    kept = {}
    for drop in ("positive", "negative"):
        path = tmp_path / f"{drop}.jsonl"
        assert main(["classify", "predict", *arguments, "--drop", drop, "--output", str(path)]) == 0
        kept[drop] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert not any(row["positive"] for row in kept["positive"])
    assert all(row["positive"] for row in kept["negative"])
    assert len(kept["positive"]) + len(kept["negative"]) == 48


def test_report_compares_within_and_between_groups(world, data, tmp_path, capsys):
    arguments = [
        "--model",
        world.model,
        "--sae",
        world.saes,
        "--layers",
        "2",
        "3",
        "--data",
        data,
        "--positive",
        "cyrillic",
    ]
    methods = ["OR, layer by top1-diff", "logistic on the residual", "difference of means", "length"]
    arguments += ["--group-column", "group", "--test-share", "0.5", "--folds", "2", "--draws", "2", "--resamples", "50"]
    arguments += ["--fractions", "0.3", "1.0", "--methods", *methods, "--output", str(tmp_path)]
    assert main(["classify", "report", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "Transfer, OR, layer by top1-diff" in shown
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert results["sizes"] == {"a": [6, 6, 6, 6], "b": [6, 6, 6, 6]}
    assert set(results["evaluations"]) == set(methods)
    assert results["evaluations"]["difference of means"]["a"]["b"]["f1"][0] > 0.8
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "How much data" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--label-column": "labels"}, "no column 'labels'; it has text, label, group. Did you mean 'label'?"),
        ({"--positive": None}, "name the positive label with --positive; 'label' has cyrillic, latin"),
        ({"--positive": "greek"}, "no label in 'label' is 'greek'"),
        ({"--data": "missing.csv"}, "no file at 'missing.csv'"),
        ({"--split": "test", "--layers": "9"}, "the model has the layers 0 to 3"),
        ({"--features": "0"}, "k must be a whole number from 1 on, got 0"),
        ({"--rule": "xor"}, "invalid choice: 'xor'"),
    ],
)
def test_mistakes_are_one_clear_line(world, data, tmp_path, capsys, changes, message):
    options = {"--model": world.model, "--sae": world.saes, "--layers": "2", "--data": data, "--positive": "cyrillic"}
    options |= {"--output": str(tmp_path)} | changes
    words = [word for name, value in options.items() if value is not None for word in (name, value)]
    assert main(["classify", "fit", *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_predict_refuses_before_it_works(world, fitted, data, tmp_path, capsys):
    arguments = ["--model", world.model, "--sae", world.saes, "--data", data, "--classifier", str(fitted)]
    assert main(["classify", "predict", *arguments, "--output", str(tmp_path / "out.xlsx")]) == 2
    assert "--output must end in" in capsys.readouterr().err
    arguments += ["--score-column", "label", "--output", str(tmp_path / "out.csv")]
    assert main(["classify", "predict", *arguments]) == 2
    assert "has a column 'label' already" in capsys.readouterr().err
