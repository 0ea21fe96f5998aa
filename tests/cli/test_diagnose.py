"""From a problematic response to a dose curve, by the commands alone."""

from __future__ import annotations

import json

import pytest

from qscope_posttrain.cli.main import main
from qscope_posttrain.features.feature_set import FeatureSet


@pytest.fixture
def sets(world, tmp_path):
    for language in ("zh", "en"):
        (tmp_path / f"{language}.txt").write_text(
            "\n".join((world.folder / "texts" / f"{language}.txt").read_text(encoding="utf-8").splitlines()[:12])
        )
    return tmp_path


def common(world, output):
    return ["--model", world.model, "--sae", world.saes, "--layers", "3", "--output", str(output)]


def test_rank_contrast_and_curve(world, sets, capsys):
    ranked = sets / "ranked"
    arguments = ["--prompt", "The river runs", "--response", " 你好", "--top", "3", "--reference", str(sets / "en.txt")]
    assert main(["features", "rank", *common(world, ranked), *arguments]) == 0
    assert "largest or mean activation" in " ".join(capsys.readouterr().out.split())
    assert len(FeatureSet.load(ranked / "features.safetensors").layers[3]) == 3

    found = sets / "found"
    arguments = ["--positive", str(sets / "zh.txt"), "--negative", str(sets / "en.txt"), "--common-tokens", "2"]
    assert main(["features", "contrast", *common(world, found), *arguments]) == 0
    summary = json.loads((found / "summary.json").read_text())
    assert summary["command"] == "features contrast"
    assert FeatureSet.load(found / "features.safetensors").languages == ("zh", "en")

    curve = sets / "curve"
    arguments = ["--features", str(found), "--layer", "3", "--prompt", "She reads", "--max-new-tokens", "6"]
    arguments += [
        "--curve",
        "-1",
        "3",
        "--effect-language",
        "zh",
        "--sae",
        world.saes,
        "--other-texts",
        str(sets / "en.txt"),
    ]
    assert main(["steer", "--model", world.model, "--output", str(curve), "--samples", "2", *arguments]) == 0
    summary = json.loads((curve / "summary.json").read_text())
    kinds = [row[0] for row in summary["results"]["table"]["rows"]]
    assert kinds == ["unsteered", *["features"] * 2, *["random"] * 2, *["difference of means"] * 2]
    responses = [json.loads(line) for line in (curve / "responses.jsonl").read_text().splitlines()]
    table = summary["results"]["table"]
    for row in table["rows"]:
        shown = [response for response in responses if [response["kind"], response["strength"]] == row[:2]]
        assert sum(response["effect"] for response in shown) / len(shown) == pytest.approx(row[2])
    assert len({(row[0], row[1]) for row in table["rows"]}) == len(table["rows"])
    assert "<svg" in (curve / "report.html").read_text()
    assert (curve / "curve.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--curve", "1"], "one thing to measure"),
        (["--curve", "1", "--effect-pattern", "x", "--effect-language", "zh"], "one thing to measure"),
        (["--curve", "1", "--strength", "2", "--effect-pattern", "x"], "leave --strength out"),
    ],
)
def test_curve_refusals(world, capsys, arguments, message):
    given = ["--model", world.model, "--features", world.features, "--prompt", "x", "--layer", "3", "--label", "zh"]
    assert main(["steer", *given, *arguments]) == 2
    assert message in capsys.readouterr().err
