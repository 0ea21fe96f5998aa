"""`qscope features explain` and `qscope features tokens`, as a user runs them, against a server on loopback."""

from __future__ import annotations

import json

from endpoint_server import serving

from qscope_posttrain.cli.main import main
from qscope_posttrain.features.feature_set import FeatureSet, read_explanations


def reply(body):
    if "Description:" not in body["messages"][-1]["content"]:
        return '{"explanation": "words of a recipe"}'
    count = body["messages"][-1]["content"].count("\n1. ") and int(
        body["messages"][-1]["content"].split("a list of ")[1].split()[0]
    )
    return json.dumps([n % 2 for n in range(count)])


def command(world, server, output, *more):
    texts = output.parent / "lines.txt"
    lines = [line for file in sorted((world.folder / "texts").glob("*.txt")) for line in file.read_text().splitlines()]
    texts.write_text("\n".join(lines))
    return [
        "features", "explain", "--model", world.model, "--sae", world.saes, "--texts", str(texts),
        "--output", str(output), "--chat-model", "grammar", "--base-url", server.url, "--min-texts", "2",
        "--tests", "3", *more,
    ]  # fmt: skip


def test_explain_a_feature_set(world, tmp_path, capsys):
    output = tmp_path / "out"
    with serving(reply) as server:
        assert main(command(world, server, output, "--features", world.features)) == 0
        sent = len(server.requests)
        assert main(command(world, server, output, "--features", world.features)) == 0
        assert len(server.requests) == sent
    found = read_explanations(output / "explanations.jsonl")
    assert found
    assert {entry.text for entry in found} == {"words of a recipe"}
    explained = FeatureSet.load(output / "features.safetensors")
    assert explained.explanations == found == read_explanations(output / "features.safetensors")
    summary = json.loads((output / "summary.json").read_text())
    assert summary["results"]["usage"]["sent"] == 0
    assert summary["results"]["usage"]["cached"] == sent
    assert len(found) + len(summary["results"]["skipped"]) == len({
        (layer, feature) for layer, rows in explained.layers.items() for feature in rows.feature_ids.tolist()
    })  # fmt: skip
    assert "words of a recipe" in (output / "explanations.html").read_text()
    assert main(["features", "show", str(output)]) == 0
    assert "words of a recipe" in capsys.readouterr().out


def test_explain_by_ids_and_mistakes(world, tmp_path, capsys):
    output = tmp_path / "out"
    with serving(reply) as server:
        ids = ["--layers", "2", "--feature-ids", "3", "5", "--methods", "none"]
        assert main(command(world, server, output, *ids)) == 0
        assert not (output / "features.safetensors").exists()
        for more, words in (
            ([], "--features"),
            (["--layers", "2", "--feature-ids", "3", "--features", world.features], "leave out"),
            (["--layers", "2", "--feature-ids", "999"], "0 to 127"),
            (["--layers", "2", "--feature-ids", "3", "--methods", "guessing"], "guessing"),
            (["--layers", "2", "--feature-ids", "3", "--templates", str(tmp_path)], "explain.jinja"),
            (["--layers", "2", "--feature-ids", "3", "--request-options", "{"], "--request-options"),
        ):
            assert main(command(world, server, output, *more)) == 2
            assert words in capsys.readouterr().err


def test_tokens(world, tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = [
        "features",
        "tokens",
        "--model",
        world.model,
        "--features",
        world.features,
        "--language",
        "zh",
        "--top",
        "1",
    ]
    assert main([*arguments, "--text", "她每天看书", "The river", "--sae", world.saes, "--html", str(page)]) == 0
    shown = capsys.readouterr().out.replace("<<", "").replace(">>", "")
    assert [line.split(",")[0] for line in shown.splitlines() if "#" in line] == ["layer 2", "layer 3"]
    assert shown.count("她每天看书") == shown.count("The river") == 2
    assert page.stat().st_size > 1000
    assert main(arguments) == 2
    assert "--text" in capsys.readouterr().err
