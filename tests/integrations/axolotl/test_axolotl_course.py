"""Whole trainings of axolotl with the losses: by command, over two processes, resumed, evaluated, other methods."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed; `make test-axolotl` installs it")

from axolotl_runs import PACKED
from integrations.frameworks import SASFT, WEIGHT
from integrations.reference import LANGUAGES, relative_error, rows_read
from test_axolotl_gradients import TOLERANCE, check

STEPS = {"learning_rate": 1e-3, "max_steps": 2, "micro_batch_size": 2}


def languages(workplace, batches, name="sasft"):
    """(told, of the texts) per document"""
    rows = workplace.rows_of(batches)
    return [row["language"] for row in rows_read(batches, name=name)], [row["language"] for row in rows]


def test_by_command(workplace, references):
    """What a user types, in a process of its own."""
    run, done = workplace.by_command(workplace.config(**PACKED, gradient_accumulation_steps=4))
    assert done.returncode == 0, done.stderr[-3000:]
    check(run, workplace, references)
    assert "sasft/penalty" in done.stdout + done.stderr


def test_a_mistake_by_command(workplace):
    run, done = workplace.by_command(workplace.config(SASFT | {"sasft_wieght": 1.0}))
    assert done.returncode != 0
    assert "sasft_wieght" in done.stdout + done.stderr
    assert not run.begun


@pytest.mark.promise("In ms-swift, axolotl and verl two processes train as one")
def test_two_processes(workplace, references):
    """axolotl divides the loss of each process by its own tokens, and takes the mean; the penalty is divided alike."""
    config = workplace.config(micro_batch_size=2, gradient_accumulation_steps=2, ddp=True)
    run, done = workplace.by_command(config, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [run.step(rank=rank) for rank in range(2)]
    shares = [workplace.rows_of(kept["batches"]) for kept in ranks]
    assert len({tuple(row["input_ids"]) for rows in shares for row in rows}) == 8
    expected, of_other = (references(rows)[0] for rows in shares)
    assert relative_error(of_other, expected) > 0.5
    expected = {name: (value + of_other[name]) / 2 for name, value in expected.items()}
    for kept in ranks:
        told, texts = languages(workplace, kept["batches"])
        assert told == texts
        assert len(texts) == 4
        assert relative_error(kept["gradients"], expected) <= TOLERANCE


@pytest.mark.parametrize("packed", [False, True])
def test_a_resumed_training_equals_one_in_a_row(workplace, packed):
    options = STEPS | (PACKED if packed else {})
    whole = workplace.train(**options)
    first = workplace.train(**options, save_strategy="steps", save_steps=1)
    checkpoint = first.folder / "checkpoint-1"
    rest = workplace.train(**options, resume_from_checkpoint=str(checkpoint))
    assert not (rest.folder / "kept" / "rank_0_step_0.pt").exists()
    for run in (first, rest):
        assert run.step(1)["gradients"].keys() == whole.step(1)["gradients"].keys()
        for name, gradient in whole.step(1)["gradients"].items():
            assert torch.equal(run.step(1)["gradients"][name], gradient), name
    with pytest.raises(ValueError, match="sasft"):
        workplace.train(SASFT | {"sasft_weight": 1.0}, **options, resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("packed", [False, True])
def test_evaluation_is_that_of_axolotl(workplace, packed):
    """Its batches contain no language and its loss no penalty, also where evaluation is packed."""
    options = PACKED | {"sample_packing": packed, "eval_sample_packing": packed}
    options |= {"val_set_size": 2, "eval_steps": 1, "eval_batch_size": 1}
    plain, with_penalty = workplace.train(None, **options), workplace.train(**options)
    losses = [[log["eval_loss"] for log in run.logs if "eval_loss" in log] for run in (plain, with_penalty)]
    assert losses[0] == losses[1] != []
    assert "language" in with_penalty.step()["eval_columns"]


@pytest.mark.parametrize("packed", [False, True])
def test_evaluate_by_itself(workplace, packed):
    """`axolotl evaluate` goes over the training data too, with whatever columns they have."""
    options = PACKED | {"sample_packing": packed, "eval_sample_packing": packed, "val_set_size": 2}
    plain, with_penalty = (workplace.evaluate(workplace.config(block, **options)) for block in (None, SASFT))
    losses = [[line for line in table.splitlines() if line.startswith("loss,")] for table in (plain, with_penalty)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_the_script_of_the_labeled_tokens(workplace, packed):
    """No column is there. Features of English and Chinese take all Latin letters for English, French ones too. The
    prompts decide nothing: those of the English answers are Chinese."""
    data = workplace.write(workplace.conversations(column=None))
    run = workplace.train(
        SASFT | {"sasft_language": "script", "features": str(workplace.features_of("en", "zh"))},
        datasets=[{"path": str(data), "ds_type": "json", "type": "chat_template"}],
        **(PACKED | {"sequence_len": 1024} if packed else {}),
    )
    told, texts = languages(workplace, run.step()["batches"])
    assert sorted(texts) == ["en"] * 3 + ["fr"] * 2 + ["zh"] * 3
    assert told == ["zh" if language == "zh" else "en" for language in texts]


@pytest.mark.parametrize("packed", [False, True])
def test_padding_and_several_packed_rows_in_a_batch(workplace, references, packed):
    """Rows are padded to their full length, which axolotl rounds up to a multiple of 64."""
    shape = {"multipack_real_batches": True, "micro_batch_size": 4} if packed else {"micro_batch_size": 8}
    run = workplace.train(**PACKED | {"sample_packing": packed, "pad_to_sequence_len": True} | shape)
    check(run, workplace, references)
    (batch,) = run.step()["batches"]
    assert list(batch["input_ids"].shape) == [4 if packed else 8, 192]


def test_a_changed_column_is_not_taken_from_the_cache(workplace):
    """axolotl keeps tokenized data; what it kept with one column must not serve for another."""
    rows = [row | {"other": "zh"} for row in workplace.conversations()]
    options = {
        "datasets": [{"path": str(workplace.write(rows)), "ds_type": "json", "type": "chat_template"}],
        "dataset_prepared_path": str(workplace.folder / "cache"),
    }
    first, again, other = (
        workplace.train(SASFT | {"sasft_language": column}, **options) for column in ("language", "language", "other")
    )
    told = [sorted(languages(workplace, run.step()["batches"])[0]) for run in (first, again, other)]
    assert told[0] == told[1]
    assert set(told[0]) == {"en", "fr", "zh"}
    assert set(told[2]) == {"zh"}


def test_two_processes_tokenize(workplace, references):
    """axolotl has a queue of its own for it."""
    check(workplace.train(dataset_num_proc=2), workplace, references)


@pytest.mark.parametrize("packed", [False, True])
def test_token_penalty_and_anchors(workplace, packed):
    """Each changes the gradient; the anchor alone reads no languages, and starts from the model itself."""
    options = STEPS | {"learning_rate": 1e-2} | (PACKED if packed else {})
    plain = workplace.train(None, **options)
    penalty = {"method": "token_penalty", "token_penalty_weight": WEIGHT, "token_penalty_languages": list(LANGUAGES)}
    blocks = {
        "token_penalty": penalty,
        "kl_anchor": {"method": "kl_anchor", "anchor_weight": WEIGHT},
        "sasft": SASFT | {"anchor_weight": WEIGHT},
    }
    for name, block in blocks.items():
        run = workplace.train(block, **options)
        steps = [relative_error(run.step(n)["gradients"], plain.step(n)["gradients"]) for n in range(2)]
        if name == "kl_anchor":  # its gradient is zero where it starts
            assert steps[0] < 1e-5
            assert steps[1] > 1e-3
            assert run.logs[1]["kl_anchor/penalty"] > 0
        else:
            assert min(steps) > 1e-2
            told, texts = languages(workplace, run.step()["batches"], name=name)
            assert told == texts
