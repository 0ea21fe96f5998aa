from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from qscope_posttrain.cli.main import main
from qscope_posttrain.features.feature_set import FeatureSet

SHORT = ["--max-new-tokens", "8", "--layer", "3", "--label", "zh"]
PROMPTS = ["--prompt", "The river runs", "She reads"]


@pytest.fixture
def run(world, tmp_path):
    """`qscope steer` with the world's model and features; the summary."""

    def run(*arguments, features=None):
        given = ["--model", world.model, "--features", features or world.features, "--output", str(tmp_path)]
        assert main(["steer", *given, *arguments]) == 0
        return json.loads((tmp_path / "summary.json").read_text())

    return run


def responses(summary, side):
    return [row[side]["response"] for row in summary["results"]["responses"]]


def test_side_by_side(run, capsys):
    summary = run(*SHORT, *PROMPTS, "--strength", "40", "--samples", "2", "--top_p", "0.9")
    shown = capsys.readouterr().out
    assert "add, strength 40 (relative), layer 3" in shown
    rows = summary["results"]["responses"]
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        ("The river runs", 0),
        ("The river runs", 1),
        ("She reads", 0),
        ("She reads", 1),
    ]
    assert all(len(row["with"]["token_ids"]) <= 8 for row in rows)
    assert responses(summary, "with") != responses(summary, "without")
    table = summary["results"]["table"]
    assert table["columns"] == ["prompt", "without", "with"]
    assert [row[1] for row in table["rows"]] == responses(summary, "without")
    assert [row[2] for row in table["rows"]] == responses(summary, "with")
    assert (summary["command"], summary["seeds"], summary["settings"]["strength"]) == ("steer", [0], 40)
    assert summary["results"]["steering"]["layers"] == [3]


def test_the_seed_is_the_same_on_both_sides(run):
    same = run(*SHORT, *PROMPTS, "--strength", "0", "--seed", "5")
    assert responses(same, "with") == responses(same, "without")
    other = run(*SHORT, *PROMPTS, "--strength", "0", "--seed", "6")
    assert responses(other, "without") != responses(same, "without")


def test_the_first_token_is_free_and_a_late_window_leaves_more_alone(run):
    from_start = run(*SHORT, *PROMPTS, "--strength", "1000", "--temperature", "0")
    late = run(*SHORT, *PROMPTS, "--strength", "1000", "--temperature", "0", "--window-start", "5")
    assert late["results"]["steering"]["window"] == {"start": 5, "length": None}

    def shared(row):
        pairs = list(zip(row["without"]["token_ids"], row["with"]["token_ids"], strict=False))
        return next((place for place, (before, after) in enumerate(pairs) if before != after), len(pairs))

    assert [shared(row) for row in from_start["results"]["responses"]] == [1, 1]
    assert all(shared(row) >= 6 or row["without"]["ended"] for row in late["results"]["responses"])
    assert responses(late, "with") != responses(late, "without")


def test_what_was_chosen_with_the_features_is_the_default(run, world, tmp_path):
    found = FeatureSet.load(world.features)
    chosen = {"label": "zh", "layer": 2, "strength": 3.0, "unit": "relative"}
    (tmp_path / "chosen").mkdir()
    replace(found, settings={**found.settings, "steering": chosen}).save(tmp_path / "chosen" / "features.safetensors")
    summary = run("--max-new-tokens", "4", "--prompts", world.prompts, "--positions", "all",
                  features=str(tmp_path / "chosen"))  # fmt: skip
    assert summary["results"]["steering"] == {
        "mode": "add", "layers": [2], "strength": 3.0, "unit": "relative", "positions": "all", "window": None,
    }  # fmt: skip
    assert {row["language"] for row in summary["results"]["responses"]} == {"en", "fr", "ru", "ko"}


def test_one_feature_is_clamped_or_ablated(run, world):
    feature = int(FeatureSet.load(world.features).select("zh", 3).layers[3].feature_ids[0])
    one = ["--feature", str(feature)]
    clamped = run(
        *SHORT, *PROMPTS, *one, "--mode", "clamp", "--strength", "5000", "--window-length", "4", "--temperature", "0"
    )
    assert clamped["results"]["steering"]["unit"] == "raw"
    assert clamped["results"]["steering"]["window"] == {"start": 0, "length": 4}
    assert responses(clamped, "with") != responses(clamped, "without")
    ablated = run(*SHORT, *PROMPTS, *one, "--mode", "ablate")
    assert ablated["results"]["steering"]["strength"] == 1.0


def test_without_output_nothing_is_written(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", world.model, "--features", world.features, "--strength", "2", "--chat"]
    assert main(["steer", *arguments, *SHORT, *PROMPTS]) == 0
    assert "<|im_start|>user" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_endless_repetition_is_counted(run, world, tmp_path, make_model, tiny_tokenizer, capsys):
    """A model whose head can say one word only, once it is steered."""
    model = make_model("qwen3", tie_word_embeddings=False)
    found = FeatureSet.load(world.features)
    rows = found.select("zh", 3).layers[3]
    word = tiny_tokenizer("river")["input_ids"][0]
    with torch.no_grad():
        model.lm_head.weight[word] = (rows.decoder / rows.decoder.norm(dim=1, keepdim=True)).sum(0)
    model.save_pretrained(tmp_path / "parrot")
    tiny_tokenizer.save_pretrained(tmp_path / "parrot")
    options = ["--max-new-tokens", "24", "--layer", "3", "--label", "zh", "--strength", "1000"]
    summary = run(*options, *PROMPTS, "--model", str(tmp_path / "parrot"))
    for row in summary["results"]["responses"]:
        assert not row["without"]["endless_repetition"]
        assert row["with"]["endless_repetition"]
    assert "Endless repetition: 0 of 2 without, 2 of 2 with." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "No strength given"),
        (["--strength", "1", "--label", "de"], "'de' is not in this FeatureSet"),
        (["--strength", "1", "--layer", "1"], "layer 1 is not in this FeatureSet; it has 2, 3"),
        (["--strength", "1", "--mode", "ablate"], "is about one feature"),
        (["--strength", "1", "--mode", "turn"], "invalid choice: 'turn'"),
        (["--strength", "1", "--feature", "99999"], "Feature ids [99999]"),
        (["--strength", "1", "--positions", "all", "--window-start", "2"], "count generated tokens"),
        (["--strength", "1", "--window-start", "7"], "generated token 7 is never read"),
        (["--strength", "1", "--window-start", "-1"], "cannot be negative"),
        (["--strength", "1", "--window-length", "0"], "at least 1"),
        (["--strength", "1", "--max-new-tokens", "1"], "token 0 is never read"),
        (["--strength", "1", "--chat-template-options", "[1]"], "must be a JSON object"),
        (["--strength", "1", "--stregth", "1"], "Did you mean '--strength'?"),
        (["--strength", "1", "--prompts", "there"], "not allowed with"),
        (["--strength", "1", "--features", "nowhere"], "nowhere"),
        (["--strength", "1", "--effect-language", "zh", "--suppress"], "--effect-language, --suppress: only a dose"),
    ],
)
def test_a_mistake_is_one_clear_line(world, capsys, extra, message):
    arguments = ["--model", world.model, "--features", world.features, *SHORT, *PROMPTS]
    assert main(["steer", *arguments, *extra]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_features_of_another_model_are_refused(world, tmp_path, make_model, tiny_tokenizer, capsys):
    make_model("qwen3", num_hidden_layers=6).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    arguments = ["--model", str(tmp_path / "other"), "--features", world.features, "--strength", "1"]
    assert main(["steer", *arguments, *SHORT, *PROMPTS]) == 2
    assert "num_hidden_layers 4 in the features, 6 in the model" in capsys.readouterr().err
