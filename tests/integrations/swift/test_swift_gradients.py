"""The gradient of a step of ms-swift with SASFT equals that of the loss written out row by row."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("swift.callbacks", reason="ms-swift is not installed here; `make test-swift` installs it")

from integrations.frameworks import WEIGHT, written_out
from integrations.reference import LANGUAGES, relative_error
from swift.loss_scale import LossScale
from swift.loss_scale.mapping import loss_scale_map
from swift_runs import KEEP, Workplace, write_rows

from qscope_posttrain.sft.callback import _FeaturePenalty

TOLERANCE = 1e-6
BATCHES = {"padded": {}, "padding-free": {"padding_free": "true"}, "packed": {"packing": "true", "packing_length": 200}}
TUNING = {
    "full": {"tuner_type": "full"},
    "lora": {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0, "target_modules": ["q_proj", "v_proj"]},
}
WITHOUT = {"external_plugins": [KEEP], "callbacks": ["keep_gradients"]}
CHECKPOINTING = {
    "none": {"gradient_checkpointing": "false"},
    "non-reentrant": {"gradient_checkpointing": "true", "gradient_checkpointing_kwargs": '{"use_reentrant": false}'},
}


def rows_per_step(batches, accumulation):
    """Rows of a micro-batch, of which `accumulation` make up all that there are: 8, or 4 packed ones."""
    return {
        "per_device_train_batch_size": (4 if batches == "packed" else 8) // accumulation,
        "gradient_accumulation_steps": accumulation,
    }


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, make_model, tiny_tokenizer, texts):
    return Workplace(tmp_path_factory.mktemp("swift"), make_model, tiny_tokenizer, texts)


@pytest.fixture(scope="module")
def references(workplace):
    """`references(rows, peft, weight)`: gradients, loss and penalty of the step, written out row by row."""
    return written_out(workplace.model, workplace.features)


def check(run, workplace, references, **options):
    """Compare with the written-out loss; returns the rows of the step."""
    kept = run.rank()
    rows = sorted(workplace.rows_of(kept["batches"]), key=lambda row: row["input_ids"])
    assert len(rows) == 8
    expected, loss, penalty = references(rows, kept["peft"], **options)
    without, _, _ = references(rows, kept["peft"], weight=0.0)
    assert relative_error(without, expected) > 0.5, "a missing term would not show"
    assert relative_error(kept["gradients"], expected) <= TOLERANCE
    logs = run.logs[0]
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)
    assert logs["sasft/penalty"] == pytest.approx(penalty, rel=1e-5)
    assert logs["sasft/hook_calls"] == 1
    return rows


@pytest.mark.promise("In ms-swift, axolotl, LLaMA-Factory and verl the gradient equals the written-out loss")
@pytest.mark.parametrize("tuning", list(TUNING))
@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("batches", list(BATCHES))
def test_gradient_equals_the_written_out_loss(workplace, references, batches, accumulation, checkpointing, tuning):
    options = BATCHES[batches] | TUNING[tuning] | CHECKPOINTING[checkpointing] | rows_per_step(batches, accumulation)
    run = workplace.train(options, workplace.settings())
    check(run, workplace, references)
    kept = run.rank()
    assert len(kept["batches"]) == accumulation
    assert kept["checkpointing"] is (checkpointing != "none")
    if checkpointing != "none":
        assert kept["use_reentrant"] is False
    assert any("lora_A" in name for name in kept["gradients"]) is (tuning == "lora")


@pytest.mark.parametrize("tuning", list(TUNING))
@pytest.mark.parametrize("batches", ["padded", "packed"])
def test_gradient_under_the_checkpointing_that_ms_swift_chooses(workplace, references, batches, tuning):
    options = {**BATCHES[batches], **TUNING[tuning], **rows_per_step(batches, 4), "gradient_checkpointing": "true"}
    run = workplace.train(options, workplace.settings())
    check(run, workplace, references)
    assert run.rank()["use_reentrant"] is True


@pytest.mark.parametrize(
    "options",
    [
        {"use_logits_to_keep": "false", **rows_per_step("padded", 4)},
        # With one row ms-swift keeps single positions, and not the end of all rows.
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"padding_side": "left", **rows_per_step("padded", 4)},
        {"streaming": "true", "dataset_num_proc": None, **rows_per_step("padded", 4)},
        {"streaming": "true", "dataset_num_proc": None, **BATCHES["packed"], "gradient_accumulation_steps": 1},
        {"dataloader_num_workers": 1, **rows_per_step("padded", 4)},
        {"truncation_strategy": "delete", **rows_per_step("padded", 4)},
    ],
    ids=str,
)
def test_other_ways_that_batches_come(workplace, references, options):
    check(workplace.train(options, workplace.settings()), workplace, references)


class Halves(LossScale):
    """The second half of every answer counts half."""

    is_binary = False

    def get_loss_scale(self, context, **kwargs):
        middle = len(context) // 2
        return [context[:middle], context[middle:]], [1.0, 0.5]


@pytest.mark.parametrize("batches", list(BATCHES))
@pytest.mark.parametrize(
    "options",
    [
        {"loss_scale": "halves"},
        {"label_smoothing_factor": 0.1},
        {"enable_dft_loss": "true"},
        {"enable_channel_loss": "true"},
    ],
    ids=str,
)
def test_the_term_is_the_same_beside_other_cross_entropies(workplace, references, monkeypatch, options, batches):
    monkeypatch.setitem(loss_scale_map, "halves", Halves)
    options = {**BATCHES[batches], **rows_per_step(batches, 4), **options}
    with_term = workplace.train(options, workplace.settings()).rank()
    alone = workplace.train({**options, **WITHOUT}).rank()
    rows = sorted(workplace.rows_of(with_term["batches"]), key=lambda row: row["input_ids"])
    (both, _, _), (plain, _, _) = references(rows), references(rows, weight=0.0)
    expected = {name: alone["gradients"][name] + both[name] - plain[name] for name in both}
    assert relative_error(with_term["gradients"], expected) <= TOLERANCE
    if "enable_channel_loss" not in options:
        assert relative_error(alone["gradients"], plain) > 0.01, "this is the same cross-entropy"


def test_paper_normalization_counts_the_penalized_tokens_of_the_window(workplace, references):
    options = rows_per_step("padded", 4)
    run = workplace.train(options, workplace.settings(sasft_normalization="paper"))
    rows = sorted(workplace.rows_of(run.rank()["batches"]), key=lambda row: row["input_ids"])
    counted = sum(label != -100 for row in rows for label in row["labels"][1:])
    penalized = sum(label != -100 for row in rows if row["language"] != "zh" for label in row["labels"][1:])
    # Sum over the 3 features instead of their mean, divided by the penalized tokens.
    expected, _, _ = references(rows, weight=WEIGHT * 3 * counted / penalized)
    assert relative_error(run.rank()["gradients"], expected) <= TOLERANCE


@pytest.mark.parametrize("batches", list(BATCHES))
@pytest.mark.parametrize("language", ["channel", "script"])
def test_every_token_has_the_language_of_its_row(workplace, monkeypatch, batches, language):
    seen = []
    eligible = _FeaturePenalty.eligible

    def spy(penalty, batch):
        seen.append(batch)
        return eligible(penalty, batch)

    monkeypatch.setattr(_FeaturePenalty, "eligible", spy)
    options = {**BATCHES[batches], **rows_per_step(batches, 4)}
    rows = workplace.conversations(None if language == "script" else "channel")
    settings = workplace.settings(sasft_language=language)
    if language == "script":  # which cannot tell French from English
        rows = [row for row, name in zip(rows, itertools.cycle(LANGUAGES), strict=False) if name != "fr"] * 2
        options["dataset"] = write_rows(workplace.folder / f"script_{batches}.jsonl", rows)
        settings = workplace.settings(sasft_language=language, features=str(workplace.features_of("en", "zh")))
    kept = workplace.train(options, settings).rank()
    assert len(seen) == len(kept["batches"]) > 1
    for tokens, batch in zip(seen, kept["batches"], strict=True):
        assert torch.equal(tokens.labels, batch["labels"]), "the labels were cut"
        found = []
        for row in workplace.rows_of([batch]):
            found += [LANGUAGES.index(row["language"])] * len(row["input_ids"])
        real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(tokens.labels).bool()
        assert tokens.language_ids[real].tolist() == found
        assert set(tokens.language_ids[~real].tolist()) <= {-1}


@pytest.mark.promise("In ms-swift, axolotl, LLaMA-Factory and verl weight 0 changes no bit")
@pytest.mark.parametrize("batches", list(BATCHES))
@pytest.mark.parametrize("tuning", list(TUNING))
def test_weight_0_is_ms_swift_alone_bit_by_bit(workplace, batches, tuning):
    options = {**BATCHES[batches], **TUNING[tuning], "max_steps": 3, "learning_rate": 1e-3}
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    ours = workplace.train(options, workplace.settings(sasft_weight=0.0))
    alone = workplace.train({**options, **WITHOUT})
    for step in range(3):
        expected, found = alone.rank(step=step)["gradients"], ours.rank(step=step)["gradients"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [entry.get("loss") for entry in ours.logs] == [entry.get("loss") for entry in alone.logs]
    assert ours.logs[0]["sasft/penalty"] > 0
    assert not any(key.startswith("sasft/") for key in alone.logs[0])
