"""`qscope sae`: what a user sees, on the tiny world of the other commands."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qscope_posttrain.cli.main import main
from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.sae.activations import JumpReLU
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.sae.training import SAETrainingConfig, train_saes

RELEASE = "SAE-Res-Tiny-W1K-L0_8"


@pytest.fixture(scope="module")
def good(world, tmp_path_factory):
    """A folder with an SAE that was trained on layer 2 of the world's model."""
    folder = tmp_path_factory.mktemp("good") / RELEASE
    model = AutoModelForCausalLM.from_pretrained(world.model)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    rows = []
    for file in (world.folder / "texts").glob("*.txt"):
        for line in file.read_text(encoding="utf-8").splitlines():
            ids = torch.tensor([tokenizer(line)["input_ids"]])
            rows.append(forward_to_layer(model, [2], input_ids=ids)[2][0, 1:])
    config = SAETrainingConfig(width=1024, k=8, steps=100, batch_tokens=256)
    train_saes({2: torch.cat(rows)}, config)[2].save(folder, format="qwen_scope")
    return folder


def errors(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_list_shows_all_releases_or_those_of_a_model(capsys):
    assert main(["sae", "list", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "**96 releases of SAEs on the residual stream**" in lines
    assert "| qwen3-8b-base-64k-l0-50 | Qwen/Qwen3-8B-Base | all 36 | 4096 | 65536 | 50 | 2.15 GB |" in lines
    assert main(["sae", "list", "--model", "Qwen/Qwen3.5-27B"]) == 0
    shown = capsys.readouterr().out
    assert "qwen3.5-27b-80k-l0-100" in shown
    assert "gemma" not in shown
    assert main(["sae", "list", "--model", "mistral"]) == 2
    assert "no SAE for a model named 'mistral'; there are some for " in errors(capsys)


def test_show_a_release_and_one_of_its_layers(capsys):
    assert main(["sae", "show", "gemma-scope-2b-pt-16k", "--layer", "20", "--markdown"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "| repository | google/gemma-scope-2b-pt-res |",
        "| model | google/gemma-2-2b (base), 26 layers of width 2304 |",
        "| license | cc-by-4.0 |",
        "| L0s to choose from | 22, 38, 71, 139, 294 |",
        "| this one as a name | gemma-scope-2b-pt-16k-l0-71 |",
        "| files | layer_20/width_16k/average_l0_71/params.npz |",
    ):
        assert words in shown
    assert main(["sae", "show", "gemma-scope-2b-pt-16k", "--layer", "26"]) == 2
    assert "gemma-scope-2b-pt-16k has no layer 26; it has the layers 0..25." in errors(capsys)
    assert main(["sae", "show", "qwen3-8b-64k-l0-50"]) == 2
    assert "Did you mean qwen3-8b-base-64k-l0-50 or" in errors(capsys)


def test_show_what_lies_on_this_machine(world, good, capsys):
    assert main(["sae", "show", world.saes, "--markdown"]) == 0
    listing = capsys.readouterr().out
    assert "| 2 | layer2.sae.safetensors |" in listing
    assert main(["sae", "show", str(good), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert "| format | qwen_scope |" in shown
    assert "| layer | 2, counted from 0 |" in shown
    assert "| latents | 1024 for a residual stream of width 64 (16 per dimension) |" in shown
    assert "| activation | TopK, k 8 |" in shown
    assert main(["sae", "show", world.saes, "--layer", "7"]) == 2
    assert "has no layer 7; it holds layers 2..3" in errors(capsys)


def test_show_says_where_k_is_missing(good, tmp_path, capsys):
    (tmp_path / "layer2.sae.pt").write_bytes((good / "layer2.sae.pt").read_bytes())
    assert main(["sae", "show", str(tmp_path), "--markdown"]) == 0
    assert "| activation | not known: give it with k=..., for Qwen-Scope 50 or 100 |" in capsys.readouterr().out
    assert main(["sae", "show", str(tmp_path), "--k", "8", "--markdown"]) == 0
    assert "TopK, k 8" in capsys.readouterr().out


def test_check_of_a_good_sae(world, good, tmp_path, capsys):
    arguments = ["sae", "check", str(good), "--model", world.model, "--texts", world.texts, "--output", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "unexplained variance (FVU)" in printed
    assert "Warnings" not in printed
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["command"] == "sae check"
    (layer,) = summary["results"]["layers"]
    assert (layer["layer"], layer["warnings"], layer["d_sae"]) == (2, [], 1024)
    assert layer["fvu"]["low"] < layer["fvu"]["estimate"] < layer["fvu"]["high"] < 0.4
    assert set(layer["losses"]) == {"clean", "spliced", "mean", "zero"}
    assert layer["fit"]["chance"] > layer["fvu"]["estimate"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1
    assert "The figures show nothing wrong" in page


def test_check_of_a_bad_sae_fails_and_says_why(world, good, tmp_path, capsys):
    sae = SparseAutoencoder.load(good)
    replace(sae, W_dec=sae.W_dec * 4).save(tmp_path / "layer2.sae.safetensors")
    found = ["--model", world.model, "--texts", world.texts]
    assert main(["sae", "check", str(tmp_path), *found, "--no-loss", "--output", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "decoder norms or an output scale were not folded" in " ".join(printed.replace("│", " ").split())
    assert "loss, " not in printed
    assert "<strong>units</strong>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_check_of_several_layers_and_without_texts(world, tmp_path, capsys):
    output = ["--output", str(tmp_path)]
    assert main(["sae", "check", world.saes, "--model", world.model, "--layer", "3", *output]) == 0
    assert "128 for a residual stream of width 64" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["results"]["layers"] == []
    arguments = ["sae", "check", world.saes, "--model", world.model, "--layer", "2-3", "--texts", world.texts]
    assert main([*arguments, "--no-loss", "--max-texts", "2"]) in (0, 1)
    printed = capsys.readouterr().out
    assert "on layer 2" in printed
    assert "on layer 3" in printed


def test_check_refuses_another_width_before_the_model_is_loaded(world, tmp_path, capsys):
    rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    narrow = train_saes({2: rows}, SAETrainingConfig(width=64, k=4, steps=2))[2]
    narrow.save(tmp_path / "layer2.sae.safetensors")
    assert main(["sae", "check", str(tmp_path), "--model", world.model, "--texts", world.texts]) == 2
    shown = errors(capsys)
    assert "is for a residual stream of width 32, but the model has 64: this SAE belongs to another model" in shown


@pytest.mark.parametrize("target", ["native", "sae_lens"])
def test_convert_all_layers_of_a_folder(world, tmp_path, target, capsys):
    output = tmp_path / "out"
    assert main(["sae", "convert", world.saes, "--to", target, "--output", str(output)]) == 0
    assert "summary.json" in {file.name for file in output.iterdir()}
    for layer in (2, 3):
        before, after = SparseAutoencoder.load(world.saes, layer), SparseAutoencoder.load(output, layer)
        assert after.source.format == target
        assert torch.equal(before.W_dec, after.W_dec)
        assert torch.equal(before.b_enc, after.b_enc)
        assert before.activation == after.activation
    assert main(["sae", "convert", world.saes, "--to", target, "--output", str(output), "--layers", "9"]) == 2
    assert "has no layer 9; it holds the layers 2..3." in errors(capsys)


def test_convert_to_qwen_scope_needs_a_name_that_says_width_and_k(good, tmp_path, capsys):
    output = tmp_path / RELEASE
    assert main(["sae", "convert", str(good), "--to", "qwen_scope", "--output", str(output)]) == 0
    assert torch.equal(SparseAutoencoder.load(output).W_enc, SparseAutoencoder.load(good).W_enc)
    capsys.readouterr()
    assert main(["sae", "convert", str(good), "--to", "qwen_scope", "--output", str(tmp_path / "mine")]) == 2
    assert "must be SAE-Res-<model>-W1K-L0_8, got 'mine'" in errors(capsys)
    gated = replace(SparseAutoencoder.load(good), activation=JumpReLU(torch.ones(1024)))
    gated.save(tmp_path / "layer2.sae.safetensors")
    source = str(tmp_path / "layer2.sae.safetensors")
    assert main(["sae", "convert", source, "--to", "qwen_scope", "--output", str(output)]) == 2
    assert "it cannot express JumpReLU" in errors(capsys)


def test_a_release_is_never_downloaded_whole_by_accident(tmp_path, capsys):
    assert main(["sae", "convert", "qwen3-8b-base-64k-l0-50", "--to", "native", "--output", str(tmp_path)]) == 2
    assert "has 36 layers of 2.15 GB: say which ones with --layers" in errors(capsys)


def test_mistakes_on_the_command_line(world, capsys):
    assert main(["sae", "check", "qwen3-8b-base-64k-l0-5", "--model", world.model, "--layer", "2"]) == 2
    assert "Did you mean qwen3-8b-base-64k-l0-50" in errors(capsys)
    assert main(["sae", "lst"]) == 2
    assert "invalid choice: 'lst'" in errors(capsys)
    assert main(["sae", "convert", world.saes, "--output", "x"]) == 2
    assert "the following arguments are required: --to" in errors(capsys)


def test_train_is_a_module_of_its_own(monkeypatch):
    train = SimpleNamespace(run=len)
    monkeypatch.setitem(sys.modules, "qscope_posttrain.cli.sae.train", train)
    assert main(["sae", "train", "--config", "x.yaml"]) == 2, "it was handed what stands behind its name"


@pytest.mark.slow
def test_listing_imports_nothing_heavy():
    code = (
        "import sys; from qscope_posttrain.cli.main import main; main(['sae', 'list']); "
        "print(sorted({'torch', 'transformers', 'trl', 'huggingface_hub', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
