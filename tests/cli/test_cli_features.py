from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from qscope_posttrain.cli.main import main
from qscope_posttrain.cli.training.run import check_checkpoint
from qscope_posttrain.errors import UserError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.models.loading import load_model


def test_find_writes_a_feature_set_and_its_summary(world):
    features = FeatureSet.load(world.features)
    assert tuple(features.layers) == (2, 3)
    assert set(features.languages) == {"en", "fr", "zh", "ru", "ko"}
    summary = json.loads((world.folder / "found" / "summary.json").read_text())
    assert summary["command"] == "features find"
    assert summary["seeds"] == [0]
    assert summary["settings"]["top"] == 2
    assert len(summary["results"]["table"]["rows"]) == len(features) == 2 * 5 * 2
    assert len(summary["results"]["provenance"]["saes"]["2"]["sha256"]) == 64
    assert summary["results"]["provenance"]["causal_check"]["rows"]


def test_jsonl_texts_give_the_same_features_as_a_folder(world, texts, tmp_path):
    rows = [{"text": line, "language": language} for language in sorted(texts) for line in texts[language]]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ["--model", world.model, "--texts", str(path), "--sae", world.saes, "--layers", "2", "3"]
    assert (
        main(["features", "find", *arguments, "--output", str(tmp_path / "out"), "--target", "zh", "--no-causal"]) == 0
    )
    again = FeatureSet.load(tmp_path / "out" / "features.safetensors")
    before = FeatureSet.load(world.features)
    assert again.provenance["text_fingerprint"] == before.provenance["text_fingerprint"]
    assert "causal_check" not in again.provenance
    for layer in before.layers:
        assert again.layers[layer].feature_ids.tolist() == before.layers[layer].feature_ids.tolist()


def test_show_prints_rows_and_origin(world, capsys):
    assert main(["features", "show", world.features, "--language", "zh", "--layer", "3"]) == 0
    shown = capsys.readouterr().out
    assert "zh #" in shown
    assert "ko #" not in shown
    assert "sha256" in shown
    assert main(["features", "show", str(world.folder / "found"), "--markdown"]) == 0
    assert capsys.readouterr().out.count("| zh #") == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--layers": ["9"]}, "layers 0 to 3; got 9"),
        ({"--layers": ["two"]}, "'two' is no layer"),
        ({"--layers": ["1"]}, "has no layer 1"),
        ({"--texts": ["nowhere"]}, "no texts at 'nowhere'"),
        ({"--target": ["ja"]}, "'ja' is not among"),
        ({"--model": ["nowhere"]}, "no model 'nowhere'"),
        ({"--device": ["cuda:7"]}, "no device 'cuda:7'"),
    ],
)
def test_a_mistake_is_one_clear_line(world, tmp_path, capsys, changes, message):
    options = {"--model": [world.model], "--texts": [world.texts], "--sae": [world.saes], "--layers": ["2"]}
    options |= {"--output": [str(tmp_path)]} | changes
    assert main(["features", "find", *(word for name, words in options.items() for word in (name, *words))]) == 2
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "--resumable" not in said
    assert message in errors[0]


def test_an_empty_language_and_an_unwritable_folder(world, tmp_path, capsys):
    folder = tmp_path / "texts"
    shutil.copytree(world.texts, folder)
    (folder / "fr.txt").write_text("\n \n")
    common = ["--model", world.model, "--sae", world.saes, "--layers", "2"]
    assert main(["features", "find", *common, "--texts", str(folder), "--output", str(tmp_path / "o")]) == 2
    assert "no text in fr" in capsys.readouterr().err
    assert main(["features", "find", *common, "--texts", world.texts, "--output", str(folder / "fr.txt" / "o")]) == 2
    assert "cannot write to the output folder" in capsys.readouterr().err


@pytest.mark.promise("Two processes find the features of one")
@pytest.mark.slow
def test_two_processes_find_what_one_finds(world, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"]
    command += ["-m", "qscope_posttrain", "features", "find", "--model", world.model, "--texts", world.texts]
    command += ["--sae", world.saes, "--layers", "2-3", "--target", "zh", "--device", "cpu", "--output", str(tmp_path)]
    subprocess.run([*command, "--tokens-per-batch", "128"], check=True, timeout=300)
    one, two = FeatureSet.load(world.features), FeatureSet.load(tmp_path / "features.safetensors")
    for layer in one.layers:
        assert one.layers[layer].feature_ids.tolist() == two.layers[layer].feature_ids.tolist()
        assert one.layers[layer].tokens.tolist() == two.layers[layer].tokens.tolist()


NOT_READ = {
    "utf-16": lambda text: text.encode("utf-16"),
    "mark": lambda text: text.encode("utf-8-sig"),
    "cut off": lambda text: text[:-9].encode(),
    "list": lambda text: f"[{text}]".encode(),
    "deep": lambda text: b"[" * 100_000,
    "empty": lambda text: b"",
}


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_a_model_is_named(world, tmp_path, file):
    folder = Path(shutil.copytree(world.model, tmp_path / "model"))
    text = (folder / file).read_text(encoding="utf-8")
    for write in NOT_READ.values():
        (folder / file).write_bytes(write(text))
        with pytest.raises(UserError, match=re.escape(file)):
            load_model(str(folder), device="cpu")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 99, None])
def test_damaged_weights_of_a_model_are_named(world, tmp_path, content):
    file = Path(shutil.copytree(world.model, tmp_path / "model")) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(str(file.parent), device="cpu")


def test_a_damaged_state_of_a_checkpoint_is_named(tmp_path):
    state = tmp_path / "trainer_state.json"
    recipe = SimpleNamespace(output=tmp_path / "out", training=SimpleNamespace(resume_from_checkpoint=str(tmp_path)))
    TrainerState().save_to_json(str(state))
    assert check_checkpoint(recipe)[0] == tmp_path
    text = state.read_text()
    for write in (*NOT_READ.values(), lambda text: b"{}\n{}", lambda text: b'{"epochs": 1}'):
        state.write_bytes(write(text))
        with pytest.raises(UserError, match=r"trainer_state\.json"):
            check_checkpoint(recipe)
