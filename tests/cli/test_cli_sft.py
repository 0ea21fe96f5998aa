from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState
from trl import SFTTrainer

from qscope_posttrain.cli.main import main
from qscope_posttrain.cli.training import load_rows, sft_checks
from qscope_posttrain.cli.training.sft import build_trainer, parse_recipe
from qscope_posttrain.cli.training.sft_checks import data_tokenizer
from qscope_posttrain.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


NO_SASFT = {"features": None, "sasft_target": None, "sasft_weight": None}
TOKEN_PENALTY = {**NO_SASFT, "method": "token_penalty", "anchor_weight": 1.0}
KL_ANCHOR = {**NO_SASFT, "method": "kl_anchor"}


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """Output folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["sft", "--config", world.recipe(folder / "recipe.yaml")]) == 0
    return folder / "out"


def test_a_run_saves_a_model_that_has_moved(world, trained):
    before = AutoModelForCausalLM.from_pretrained(world.model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(trained).state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_summary_has_losses_metrics_and_origins(trained):
    summary = json.loads((trained / "summary.json").read_text())
    results = summary["results"]
    assert (summary["command"], summary["seeds"], results["steps"]) == ("sft", [42], 2)
    assert all(entry["sasft/hook_calls"] == 1 for entry in results["log"][:2])
    assert any(entry["sasft/penalty"] > 0 for entry in results["log"][:2])
    assert len(results["features"]["sha256"]) == 64
    assert len(results["features"]["provenance"]["saes"]["3"]["sha256"]) == 64


def test_resolved_configuration_reads_back_as_the_same_recipe(world, trained):
    text = (trained / "resolved.yaml").read_text()
    comments = yaml.safe_load("\n".join(line[2:] for line in text.splitlines() if line.startswith("# ")))
    assert comments["versions"]["torch"] == importlib.metadata.version("torch")
    assert comments["features"]["provenance"]["saes"]["2"]["sha256"]
    again = parse_recipe(["--config", str(trained / "resolved.yaml")])
    assert yaml.safe_load(text) == again.to_dict()
    assert yaml.safe_load(text) == json.loads((trained / "summary.json").read_text())["settings"]
    assert yaml.safe_load(text) == parse_recipe(["--config", str(trained.parent / "recipe.yaml")]).to_dict()
    assert (again.penalty.target, again.training.max_steps, again.model_name) == ("zh", 2, world.model)


@pytest.mark.promise("Secrets of a recipe are not written into the run's files")
def test_secrets_are_not_written(world, tmp_path):
    path = world.recipe(tmp_path / "recipe.yaml")
    hidden = ["--model_init_kwargs", '{"token": "hf_x", "revision": "main"}', "--hub_token", "hf_y"]
    recipe = parse_recipe([f"--config={path}", *hidden])
    written = recipe.to_dict()
    assert "hf_" not in str(written)
    assert written["model_init_kwargs"] == {"token": None, "revision": "main"}
    assert written["eos_token"] == recipe.training.eos_token
    assert recipe.training.model_init_kwargs["token"] == "hf_x"


def test_many_rows_that_are_tokenized_first_are_said(world, tmp_path, monkeypatch, capsys):
    path = world.recipe(tmp_path / "recipe.yaml")
    monkeypatch.setattr("qscope_posttrain.cli.training.sft.MANY_ROWS", 4)
    assert main(["sft", "--config", path, "--dry_run"]) == 0
    found = " ".join(capsys.readouterr().out.split())
    assert "are tokenized before the first step" in found
    assert "--dataset_streaming true" in found
    assert main(["sft", "--config", path, "--dry_run", "--dataset_streaming", "true"]) == 0
    assert "tokenized before" not in capsys.readouterr().out


def test_command_line_overrides_the_recipe(world, tmp_path):
    path = world.recipe(tmp_path / "recipe.yaml")
    recipe = parse_recipe([f"--config={path}", "--sasft_layers", "3", "--learning_rate", "1e-3", "--max-steps", "7"])
    assert (recipe.penalty.layers, recipe.training.learning_rate, recipe.training.max_steps) == ((3,), 1e-3, 7)


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True, "max_length": 64, "gradient_accumulation_steps": 2},
        pytest.param({"packing": True, "packing_strategy": "wrapped", "max_length": 64}, marks=pytest.mark.slow),
        {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"},
        {"method": "sft", "features": None},
        TOKEN_PENALTY,
        {**TOKEN_PENALTY, "packing": True, "max_length": 64, "token_penalty_language": "script"},
        KL_ANCHOR,
        pytest.param({**KL_ANCHOR, "packing": True, "max_length": 64}, marks=pytest.mark.slow),
        {"sasft_combine": "monolinguality", "sasft_scale": "std", "sasft_anchor_weight": 0.5,
         "sasft_positions": "predicting", "sasft_readout": "decoder", "sasft_language": "script",
         "sasft_ignore_languages": ["en", "fr"]},
    ],
    ids=["packed", "wrapped", "lora", "plain", "token-penalty", "token-penalty-packed", "anchor", "anchor-packed",
         "options"],
)  # fmt: skip
def test_ways_of_training(world, tmp_path, changes):
    if "script" in changes.values():
        changes = {**changes, "dataset_name": _only(world, tmp_path, {"zh", "ru", "ko"})}
    assert main(["sft", "--config", world.recipe(tmp_path / "recipe.yaml", **changes)]) == 0
    log = json.loads((tmp_path / "out" / "summary.json").read_text())["results"]["log"]
    method = changes.get("method", "sasft")
    assert (f"{method}/penalty" in log[0]) == (method != "sft")
    assert ("token_penalty/anchor" in log[0]) == (method == "token_penalty")
    assert not any("sasft/penalty" in entry for entry in log) or method == "sasft"
    saved = "adapter_model.safetensors" if "use_peft" in changes else "model.safetensors"
    assert (tmp_path / "out" / saved).is_file()


def test_the_recipe_of_the_testbed_trains(world, tmp_path):
    """The file as it is, on another model and data, for two steps."""
    command = ["sft", "--config", str(ROOT / "recipes" / "testbed" / "token_penalty.yaml"), "--max_steps", "2"]
    command += ["--model_name_or_path", world.model, "--dataset_name", world.data, "--output_dir", str(tmp_path)]
    assert main([*command, "--dry_run"]) == 0
    assert main([*command, "--logging_steps", "1"]) == 0
    log = json.loads((tmp_path / "summary.json").read_text())["results"]["log"]
    assert {"token_penalty/penalty", "token_penalty/anchor", "token_penalty/hook_calls"} <= log[0].keys()
    again = parse_recipe(["--config", str(tmp_path / "resolved.yaml")])
    assert (again.penalty.weight, again.penalty.anchor_weight, again.penalty.languages) == (40.0, 1.0, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"sasft_layers": [2, 3], "sasft_anchor_weight": 0.5, "sasft_ignore_languages": ["th"]},
        {"anchor_weight": 0.5},
        {"anchor_weight": 0.5, "sasft_anchor_weight": 0.5},
        {**TOKEN_PENALTY, "token_penalty_skip_target_labels": False, "token_penalty_languages": ["zh", "en"]},
        {**NO_SASFT, "method": "token_penalty", "token_penalty_anchor_weight": 2},
        {**KL_ANCHOR, "anchor_target": "zh", "anchor_weight": 3, "anchor_normalization": "paper"},
        {"method": "sft"},
    ],
)
def test_what_is_written_reads_back_as_the_same_recipe(world, tmp_path, changes):
    recipe = parse_recipe(["--config", world.recipe(tmp_path / "recipe.yaml", **changes)])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    again = parse_recipe(["--config", str(tmp_path / "again.yaml")])
    assert again.penalty == recipe.penalty
    assert again.to_dict() == recipe.to_dict()
    written = recipe.to_dict().keys()
    prefixes = {"sasft": "sasft_", "token_penalty": "token_penalty_", "kl_anchor": "anchor_"}
    for method, prefix in prefixes.items():
        kept = {key for key in written if key.startswith(prefix) and key != "anchor_weight"}
        assert bool(kept) == (method == recipe.run.method)


def test_the_control_of_a_recipe_passes_over_its_penalty_and_says_so(world, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("qscope_posttrain.cli.training.sft.status", said.append)
    path = world.recipe(tmp_path / "recipe.yaml", anchor_weight=1.0)
    assert parse_recipe(["--config", path, "--method", "sft"]).penalty is None
    assert said == ["method sft trains without a penalty: no effect have sasft_target, sasft_weight, anchor_weight"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**TOKEN_PENALTY, "sasft_layers": [2]}, "does not use 'sasft_layers', a key of method sasft."),
        ({**TOKEN_PENALTY, "sasft_weight": 0.1}, "Did you mean 'token_penalty_weight'?"),
        ({"token_penalty_weight": 20.0}, "a key of method token_penalty. Did you mean 'sasft_weight'?"),
        ({"anchor_target": "zh"}, "method sasft does not use 'anchor_target', a key of method kl_anchor."),
        ({**KL_ANCHOR, "token_penalty_weight": 1}, "Did you mean 'anchor_weight'?"),
        ({"anchor_weight": 1, "sasft_anchor_weight": 2}, "'sasft_anchor_weight' and 'anchor_weight' are the same"),
        ({**TOKEN_PENALTY, "features": "x.safetensors"}, "uses no features"),
        ({**TOKEN_PENALTY, "anchor_weight": -1}, "finite number of at least 0; got -1.0"),
        ({**TOKEN_PENALTY, "token_penalty_languages": ["en"]}, "'zh' is not among the languages en."),
        ({**TOKEN_PENALTY, "token_penalty_normalization": "official"}, "token_mean"),
        ({**TOKEN_PENALTY, "token_penalty_wieght": 3}, "Did you mean 'token_penalty_weight'?"),
    ],
)
def test_a_key_of_another_method_is_refused_before_any_data_is_read(world, tmp_path, changes, message):
    path = world.recipe(tmp_path / "recipe.yaml", **{"dataset_name": "nowhere.jsonl", **changes})
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_recipe(["--config", path])


@pytest.mark.parametrize(
    ("file", "said"), [("anchor_weight", "sasft_anchor_weight"), ("sasft_anchor_weight", "anchor_weight")]
)
def test_the_command_line_wins_under_either_name_of_the_anchor(world, tmp_path, file, said):
    path = world.recipe(tmp_path / "recipe.yaml", **{file: 1.0})
    assert parse_recipe(["--config", path, f"--{said}", "0.5"]).penalty.anchor_weight == 0.5
    with pytest.raises(UserError, match="finite number"):
        parse_recipe(["--config", path, f"--{said}", "nan"])


def test_the_control_does_without_the_features_of_its_recipe(world, tmp_path):
    recipe = world.recipe(tmp_path / "recipe.yaml", features="nowhere.safetensors", max_steps=1)
    assert main(["sft", "--config", recipe, "--method", "sft"]) == 0


def test_dry_run_without_features(world, tmp_path, capsys):
    assert main(["sft", "--config", world.recipe(tmp_path / "recipe.yaml", **TOKEN_PENALTY), "--dry_run"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("token_penalty with weight 20, KL anchor with 1", "tokens write Han", "zh 4"):
        assert words in shown, words
    rows = _rows(tmp_path / "typo.jsonl", [{"prompt": "a", "completion": "b", "language": "eng lish"}])
    for changes, words in (
        ({**KL_ANCHOR}, "kl_anchor with weight 1"),
        ({**KL_ANCHOR, "anchor_target": "fr"}, "none: the anchor holds every token"),
        ({**TOKEN_PENALTY, "token_penalty_target": "fr"}, "target tokens failed"),
        ({**TOKEN_PENALTY, "dataset_name": rows}, "languages failed"),
    ):
        status = main(["sft", "--config", world.recipe(tmp_path / "recipe.yaml", **changes), "--dry_run"])
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert words in shown
        assert status == int("failed" in words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sasft_wieght": 1}, "unknown key 'sasft_wieght' in {recipe}. Did you mean 'sasft_weight'?"),
        ({"sasft_readout": "decodr"}, "Did you mean 'decoder'?"),
        ({"sasft_top": 0}, "In recipes these options begin with 'sasft_'"),
        ({"features": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"features": None}, "needs 'features'"),
        ({"model_name_or_path": None}, "needs 'model_name_or_path'"),
        ({"model_name_or_path": "nowhere"}, "no model 'nowhere'"),
        ({"dataset_name": None}, "'datasets'; the recipe has neither"),
        ({"dataset_name": "nowhere.jsonl"}, "no training data at 'nowhere.jsonl'"),
        ({"dataset_train_split": "trian"}, "no split 'trian'; it has train"),
        ({"sasft_layers": [1]}, "layer 1"),
        ({"sasft_target": "ja"}, "'ja'"),
        ({"sasft_language": "lang"}, "no column 'lang'"),
        ({"use_liger_kernel": True}, "use_liger_kernel needs a GPU"),
        ({"packing": True, "max_length": None}, None),
    ],
)
def test_a_mistake_is_one_clear_line(world, tmp_path, capsys, changes, message):
    recipe = world.recipe(tmp_path / "recipe.yaml", **changes)
    extra = ["--packing", "--max_length", "none"] if message is None else []
    assert main(["sft", "--config", recipe, *extra]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert (message or "packing needs 'max_length'").format(recipe=recipe) in lines[0]


def _shorten(path: str) -> None:
    file = Path(path)
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_peft": True, "lora_target_modules": ["nothing"]}, "the trainer cannot be made: "),
        ({"load_in_4bit": True}, "the trainer cannot be made: "),
        ({"model_init_kwargs": {"no_such_option": 1}}, "no_such_option"),
        ({"model_init_kwargs": {"attn_implementation": "no_such"}}, "the trainer cannot be made: "),
        ({"optim": "adamw_bnb_8bit"}, "the training cannot begin: "),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "the training cannot begin: "),
        ({"resume_from_checkpoint": "nowhere"}, "'nowhere' is no checkpoint"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1; got 0"),
        ({"eval_strategy": "steps", "load_best_model_at_end": True, "save_strategy": "epoch"}, "strategy"),
        ({"weights": _shorten}, "the trainer cannot be made: SafetensorError: "),
        ({"config.json": lambda path: Path(path).write_text("{")}, "JSON"),
        ({"tokenizer.json": lambda path: Path(path).write_text('{"model": 1}')}, "cannot load the tokenizer of "),
    ],
)
def test_what_a_library_refuses_is_one_clear_line(world, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.setattr("transformers.trainer.is_bitsandbytes_available", lambda: False, raising=False)
    damage = {name: spoil for name, spoil in changes.items() if callable(spoil)}
    changes = {name: value for name, value in changes.items() if name not in damage}
    if damage:
        changes["model_name_or_path"] = str(shutil.copytree(world.model, tmp_path / "damaged"))
    for name, spoil in damage.items():
        spoil(str(tmp_path / "damaged" / ("model.safetensors" if name == "weights" else name)))
    recipe = world.recipe(tmp_path / "recipe.yaml", method="sft", features=None, **changes)
    assert main(["sft", "--config", recipe]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError])
def test_a_bug_in_the_second_step_keeps_its_traceback(world, tmp_path, monkeypatch, error):
    steps = []

    def fails(trainer, *arguments, **options):
        steps.append(trainer.state.global_step)
        if len(steps) == 2:
            raise error("a bug")
        return SFTTrainer.__mro__[1].training_step(trainer, *arguments, **options)

    monkeypatch.setattr(SFTTrainer, "training_step", fails)
    with pytest.raises(error, match="a bug") as caught:
        main(["sft", "--config", world.recipe(tmp_path / "recipe.yaml")])
    assert not isinstance(caught.value, UserError)
    assert steps == [0, 1]


def test_a_bug_in_a_dry_run_keeps_its_traceback(world, tmp_path, monkeypatch):
    monkeypatch.setattr("qscope_posttrain.cli.training.sft_checks._batch", lambda *_: int("x"))
    with pytest.raises(ValueError, match="invalid literal") as caught:
        main(["sft", "--config", world.recipe(tmp_path / "recipe.yaml"), "--dry_run"])
    assert not isinstance(caught.value, UserError)


def test_without_a_gpu_a_recipe_for_one_is_refused_with_what_to_do(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    path = world.recipe(tmp_path / "recipe.yaml", use_cpu=None, bf16=True, use_liger_kernel=True)
    assert main(["sft", "--config", path]) == 2
    assert "--use_cpu true --bf16 false" in capsys.readouterr().err
    assert parse_recipe(["--config", path, "--dry_run"]).assumed_cpu


def test_dry_run_passes_and_trains_nothing(world, tmp_path, capsys):
    path = world.recipe(tmp_path / "recipe.yaml", use_peft=True, sasft_anchor_weight=0.5)
    assert main(["sft", "--config", path, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    for words in ("can be written", "4 layers of width 64", "a chat template", "parameters are trained", "write Han",
                  "1 on layer 2", "20 rows with prompt, completion, language", "zh 4",
                  "tokens are learned", "= 4 rows a step", "2 steps"):  # fmt: skip
        assert words in shown, words
    assert "failed" not in shown
    assert not (tmp_path / "out").exists()


def test_dry_run_reads_the_script_of_rows_that_are_tokenised(world, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in ("the boat left", "小船在黎明时离开了港口")]
    recipe = world.recipe(
        tmp_path / "recipe.yaml", **TOKEN_PENALTY, token_penalty_language="script",
        dataset_name=_rows(tmp_path / "rows.jsonl", rows),
    )  # fmt: skip
    assert main(["sft", "--config", recipe, "--dry_run"]) == 0
    assert "of 2 rows: en 1, zh 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "what", "message"),
    [
        ({"output_dir": "{data}/out"}, "output folder", "cannot write"),
        ({"model_name_or_path": "nowhere"}, "tokenizer", "no model 'nowhere'"),
        ({"features": "{other}"}, "features", "hidden_size 64 in the features, 32 in the model"),
        ({"sasft_layers": [1]}, "features", "layer 1"),
        ({"sasft_language": "lang"}, "languages", "no column 'lang'"),
        ({"dataset_name": "{zh}"}, "languages", "would do nothing"),
        ({"dataset_name": "{ja}"}, "languages", "language 'ja'"),
        ({"dataset_name": "{late}"}, "languages", "Row 2100 of the training data"),
        ({"dataset_name": "{empty}"}, "labels", "none to learn"),
        (
            {"dataset_name": "{splits}", "eval_strategy": "steps", "eval_steps": 1, "dataset_test_split": "test"},
            "evaluation labels",
            "Row 1 of the data cannot be prepared",
        ),
        ({"resume_from_checkpoint": "nowhere"}, "checkpoint", "no checkpoint of a trainer"),
        ({"resume_from_checkpoint": "nowhere", "output_dir": "{run}"}, "checkpoint", "resume_from_checkpoint=last"),
        ({"use_peft": True, "lora_target_modules": ["nothing"]}, "adapter", "nothing"),
    ],
)
def test_dry_run_finds(world, tmp_path, capsys, make_model, tiny_tokenizer, changes, what, message):
    paths = {"data": world.data, "other": world.features, "zh": _only(world, tmp_path, {"zh"})}
    paths["ja"] = _rows(tmp_path / "ja.jsonl", [{"prompt": "a", "completion": "b", "language": "ja"}])
    good = {"prompt": "a", "completion": "b", "language": "en"}
    paths["late"] = _rows(tmp_path / "late.jsonl", [*[good] * 2100, {**good, "language": "zh-CN"}])
    paths["empty"] = _rows(tmp_path / "empty.jsonl", [{"prompt": "a" * 500, "completion": "b", "language": "en"}])
    paths["run"] = str(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-12").mkdir(parents=True)
    TrainerState().save_to_json(str(tmp_path / "run" / "checkpoint-12" / "trainer_state.json"))
    splits = {"train": [good] * 8, "test": [good, {**good, "completion": None}]}
    paths["splits"] = str(tmp_path / "splits")
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(paths["splits"])
    if changes.get("features") == "{other}":
        make_model("qwen3", hidden_size=32).save_pretrained(tmp_path / "narrow")
        tiny_tokenizer.save_pretrained(tmp_path / "narrow")
        changes = {**changes, "model_name_or_path": str(tmp_path / "narrow")}
    filled = {key: value.format(**paths) if isinstance(value, str) else value for key, value in changes.items()}
    assert main(["sft", "--config", world.recipe(tmp_path / "recipe.yaml", **filled), "--dry_run"]) == 1
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{what} failed" in shown
    assert message in shown


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"packing_strategy": "wrapped", "shuffle_dataset": True, "seed": 3},
        {"eval_packing": False, "eos_token": "<|endoftext|>", "max_length": 16, "completion_only_loss": False},
    ],
    ids=["plain", "shuffled", "options"],
)
def test_packed_rows_are_those_of_trl(world, tmp_path, changes):
    """Training and evaluation data; the latter without a language."""
    path = world.recipe(tmp_path / "recipe.yaml", packing=True, max_length=changes.pop("max_length", 64),
                        eval_strategy="steps", eval_steps=1, dataset_test_split="train", **changes)  # fmt: skip
    recipe = parse_recipe(["--config", path])
    ours = build_trainer(recipe, recipe.load_features())
    rows = load_rows(recipe, "train")
    stock = SFTTrainer(
        recipe.model_name, parse_recipe(["--config", path]).training, train_dataset=rows,
        eval_dataset=rows.remove_columns("language"),
        processing_class=AutoTokenizer.from_pretrained(recipe.model_name),
    )  # fmt: skip
    assert ours.padding_free == stock.padding_free
    for mine, theirs in ((ours.train_dataset, stock.train_dataset), (ours.eval_dataset, stock.eval_dataset)):
        for column in {"input_ids", "labels", "seq_lengths"} & set(theirs.column_names):
            assert mine[column][:] == theirs[column][:], column


def test_prepared_rows_are_not_packed(world, tmp_path, capsys):
    path = world.recipe(
        tmp_path / "recipe.yaml", packing=True, max_length=64, dataset_kwargs={"skip_prepare_dataset": True}
    )
    assert main(["sft", "--config", path]) == 2
    assert "skip_prepare_dataset: true} exclude each other" in capsys.readouterr().err


class TestDryRunOfLabels:
    @pytest.mark.parametrize(
        ("options", "learned"),
        [
            ({}, False),
            ({"max_length": 1000}, True),
            ({"truncation_mode": "keep_end"}, True),
            ({"packing": True}, False),
            ({"packing": True, "packing_strategy": "bfd_split"}, True),
        ],
    )
    def test_the_last_row_of_many(self, world, tmp_path, options, learned):
        rows = [{"prompt": "a", "completion": "b", "language": "en"}] * 1200
        rows.append({"prompt": "The clock " * 40, "completion": "b", "language": "en"})
        path = world.recipe(
            tmp_path / "recipe.yaml",
            **{"dataset_name": _rows(tmp_path / "rows.jsonl", rows), "max_length": 32, **options},
        )
        recipe = parse_recipe(["--config", path])
        found = load_rows(recipe, "train")
        if learned:
            assert sft_checks._labels(recipe, found, data_tokenizer(recipe))[1].startswith("1201 rows: 2402 of ")
        else:
            with pytest.raises(ValueError, match="1 of 1201 rows have none to learn, the first is row 1200"):
                sft_checks._labels(recipe, found, data_tokenizer(recipe))

    def test_a_stream(self, world, tmp_path):
        recipe = parse_recipe(["--config", world.recipe(tmp_path / "recipe.yaml", dataset_streaming=True)])
        found = load_rows(recipe, "train")
        assert sft_checks._labels(recipe, found, data_tokenizer(recipe))[1].startswith("20 rows: ")

    def test_rows_that_are_prepared(self, world, tmp_path):
        prepared = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 2
        changes = {"dataset_kwargs": {"skip_prepare_dataset": True}}
        path = world.recipe(tmp_path / "a.yaml", dataset_name=_rows(tmp_path / "a.jsonl", prepared), **changes)
        recipe = parse_recipe(["--config", path])
        words = sft_checks._labels(recipe, load_rows(recipe, "train"), data_tokenizer(recipe))[1]
        assert words == "2 rows: 4 of 6 tokens are learned"
        recipe = parse_recipe(["--config", world.recipe(tmp_path / "b.yaml", **changes)])
        with pytest.raises(ValueError, match="the data has prompt, completion, language"):
            sft_checks._labels(recipe, load_rows(recipe, "train"), data_tokenizer(recipe))


def _only(world, folder: Path, languages: set[str]) -> str:
    rows = [json.loads(line) for line in Path(world.data).read_text().splitlines()]
    return _rows(folder / "some.jsonl", [row for row in rows if row["language"] in languages])


def _rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)
