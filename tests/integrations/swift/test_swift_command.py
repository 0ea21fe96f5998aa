"""`swift sft` as a user types it: with the recipe, and with two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

pytest.importorskip("swift.callbacks", reason="ms-swift is not installed here; `make test-swift` installs it")

from integrations.reference import relative_error
from swift_runs import KEEP, Workplace, write_rows

ROOT = Path(__file__).resolve().parents[3]
RECIPES = ROOT / "recipes" / "integrations" / "swift"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, make_model, tiny_tokenizer, texts):
    return Workplace(tmp_path_factory.mktemp("swift"), make_model, tiny_tokenizer, texts)


def words_of(done):
    return done.stdout[-2000:] + done.stderr[-4000:]


def test_the_recipe_trains_with_the_language_in_a_column_of_its_own(workplace):
    recipe = yaml.safe_load((RECIPES / "sasft_zh.yaml").read_text(encoding="utf-8"))
    small = {
        "model": workplace.model,
        "model_type": "qwen3",
        "dataset": write_rows(workplace.folder / "languages.jsonl", workplace.conversations("language")),
        "external_plugins": [ROOT / recipe["external_plugins"][0], KEEP],
        "callbacks": [*recipe["callbacks"], "keep_gradients"],
    }
    tiny = {"max_length": 256, "packing_length": 200, "attn_impl": "sdpa", "torch_dtype": "float32", "bf16": "false"}
    quiet = {"use_cpu": "true", "check_model": "false", "dataset_num_proc": 1, "report_to": "none"}
    short = {"max_steps": 2, "logging_steps": 1, "save_steps": 2}
    settings = yaml.safe_load((RECIPES / "loss_sasft_zh.yaml").read_text(encoding="utf-8"))
    settings |= {"features": str(workplace.features), "sasft_layers": [1, 2]}
    run, done = workplace.by_command(
        small | tiny | quiet | short, workplace.settings(settings), recipe=RECIPES / "sasft_zh.yaml"
    )
    assert done.returncode == 0, words_of(done)
    logs = run.logs
    assert [entry["sasft/hook_calls"] for entry in logs[:2]] == [1, 1]
    assert logs[0]["sasft/penalty"] > 0
    rows = workplace.rows_of(run.rank()["batches"])
    labeled = [[label != -100 for label in row["labels"]] for row in rows]
    others = [flags for row, flags in zip(rows, labeled, strict=True) if row["language"] != "zh"]
    expected = sum(map(sum, others)) / sum(map(sum, labeled))
    assert 0 < expected < 1
    assert logs[0]["sasft/eligible_fraction"] == pytest.approx(expected, rel=1e-6)
    assert list(run.folder.rglob("checkpoint-2/adapter_model.safetensors"))


@pytest.mark.promise("In ms-swift, axolotl and verl two processes train as one")
@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "data_seed": 1},
        {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "packing": "true",
            "packing_length": 200,
            "tuner_type": "lora",
            "lora_dropout": 0,
            "gradient_checkpointing": "true",
        },
    ],
    ids=["padded, full", "packed, LoRA, checkpointed"],
)
def test_two_processes_equal_one(workplace, options):
    settings = workplace.settings()
    two, done = workplace.by_command(options, settings, processes=2)
    assert done.returncode == 0, words_of(done)
    steps = 2 * options["gradient_accumulation_steps"]
    one = workplace.train({**options, "gradient_accumulation_steps": steps}, settings)
    batches = [two.rank(rank)["batches"] for rank in (0, 1)]
    counts = [sum(int((batch["labels"] != -100).sum()) for batch in rank) for rank in batches]
    assert counts[0] != counts[1], "the ranks were meant to have unequal label counts"

    def texts(batches):
        return sorted(row["input_ids"] for row in workplace.rows_of(batches))

    assert texts(batches[0] + batches[1]) == texts(one.rank()["batches"])
    for rank in (0, 1):
        assert relative_error(two.rank(rank)["gradients"], one.rank()["gradients"]) <= 1e-6
    ours = {key: value for key, value in one.logs[0].items() if key.startswith("sasft/")}
    assert len(ours) > 3
    assert {key: two.logs[0][key] for key in ours} == pytest.approx(ours, rel=1e-5)
    assert two.logs[0]["loss"] == pytest.approx(one.logs[0]["loss"], rel=1e-5)


def test_a_mistake_ends_the_command_with_its_words(workplace):
    data = write_rows(workplace.folder / "silent.jsonl", workplace.conversations(None))
    run, done = workplace.by_command({"dataset": data}, workplace.settings())
    assert done.returncode != 0
    assert "The training data has no column 'channel'; it has" in done.stderr
    assert not run.begun
