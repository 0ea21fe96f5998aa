"""`qscope features find-repetition` on a model that loops by construction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from looping_model import SHARE, looping_model, looping_prompts, looping_sae, looping_tokenizer

from qscope_posttrain.cli.main import main
from qscope_posttrain.features.feature_set import FeatureSet

SMALL = ["--max-new-tokens", "36", "--batch-size", "160", "--wanted", "8", "--rank-by", "difference", "--top", "1"]
CURVE = ["--strengths", "1", "--samples", "40", "--fresh-samples", "50", "--window-start", "4", "12"]


@dataclass(frozen=True)
class LoopingFolder:
    folder: Path

    def arguments(self, *more: str) -> list[str]:
        model, saes = str(self.folder / "model"), str(self.folder / "saes")
        return ["features", "find-repetition", "--model", model, "--sae", saes, "--layers", "0-1", *SMALL, *more]

    @property
    def prompts(self) -> str:
        return str(self.folder / "prompts.jsonl")


@pytest.fixture(scope="module")
def looping(tmp_path_factory) -> LoopingFolder:
    folder = tmp_path_factory.mktemp("looping")
    looping_model().save_pretrained(folder / "model")
    looping_tokenizer().save_pretrained(folder / "model")
    for layer in (0, 1):
        looping_sae(layer).save(folder / "saes" / f"layer{layer}.sae.safetensors")
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in looping_prompts()]
    (folder / "prompts.jsonl").write_text("".join(lines))
    (folder / "benign.jsonl").write_text(json.dumps({"text": "c0 c1 c2 c3 c0 c1 c2 c3"}) + "\n")
    return LoopingFolder(folder)


@pytest.fixture(scope="module")
def found(looping) -> Path:
    output = looping.folder / "found"
    benign = str(looping.folder / "benign.jsonl")
    more = ["--prompts", looping.prompts, "--benign", benign, *CURVE, "--output", str(output)]
    assert main(looping.arguments(*more)) == 0
    return output


def test_it_writes_features_loops_figures_and_a_summary(found):
    features = FeatureSet.load(found / "features.safetensors")
    assert [rows.feature_ids.tolist() for rows in features.layers.values()] == [[SHARE], [SHARE]]
    assert features.languages == ("loop", "normal", "benign")
    summary = json.loads((found / "summary.json").read_text())
    assert summary["command"] == "features find-repetition"
    assert summary["seeds"] == [0]
    assert summary["results"]["steering"] == features.settings["steering"]
    assert summary["results"]["steering"]["specific"] is True
    assert len(summary["results"]["steering_curve"]["rows"]) == 1 + 2 * 3 + 4
    assert len(summary["results"]["ranking"]["rows"]) == 2
    assert [Path(path).name for path in summary["results"]["figures"]] == [
        "steering_curve_layer0.svg",
        "steering_curve_layer1.svg",
    ]
    assert all(Path(path).read_text().startswith("<svg") for path in summary["results"]["figures"])
    kinds = [json.loads(line)["kind"] for line in (found / "loops.jsonl").read_text().splitlines()]
    assert kinds.count("loop") == summary["results"]["loops"]["loops"] >= 8
    assert kinds.count("normal") == summary["results"]["loops"]["normal"]


def test_show_prints_features_curve_and_origin(found, capsys):
    assert main(["features", "show", str(found)]) == 0
    shown = capsys.readouterr().out
    for words in (f"loop #{SHARE}", "fires in benign", "Steering curve", "difference of means", "Steering, as chosen",
                  "window_start", "found with selector", "completions read: rate"):  # fmt: skip
        assert words in shown, words
    assert main(["features", "show", str(found), "--layer", "1", "--markdown"]) == 0
    assert capsys.readouterr().out.count(f"| loop #{SHARE} |") == 1


def test_given_loops_give_the_same_ranking_without_a_curve(looping, found, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("QSCOPE_QUIET")
    benign = str(looping.folder / "benign.jsonl")
    more = ["--loops", str(found / "loops.jsonl"), "--benign", benign, "--output", str(tmp_path / "again")]
    assert main(looping.arguments(*more)) == 0
    assert "no --prompts: the steering curve is left out" in capfd.readouterr().err
    again, before = (FeatureSet.load(path / "features.safetensors") for path in (tmp_path / "again", found))
    assert again.provenance["ranking"]["rows"] == before.provenance["ranking"]["rows"]
    assert "steering" not in again.settings
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["results"]["steering_curve"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give --prompts, to sample on, or --loops"),
        (["--prompts", "nowhere"], "no file at 'nowhere'"),
        (["--prompts", "{prompts}", "--window-start", "30", "50"], "beyond the 36 tokens"),
        (["--prompts", "{prompts}", "--rank-by", "magic"], "invalid choice: 'magic'"),
        (["--prompts", "{prompts}", "--benign", "{prompts}"], "expected a string 'text', got the keys ['prompt']"),
        (["--prompts", "{prompts}", "--max-samples", "4", "--min-copies", "30"], "0 endless repetitions in 4 samples"),
    ],
)
def test_a_mistake_is_one_clear_line(looping, tmp_path, capsys, more, message):
    words = [word.format(prompts=looping.prompts) for word in more]
    assert main(looping.arguments(*words, "--output", str(tmp_path))) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_it_refuses_a_launcher(looping, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(looping.arguments("--prompts", looping.prompts, "--output", str(tmp_path))) == 2
    assert "runs in one process" in capsys.readouterr().err
