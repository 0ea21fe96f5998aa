"""Token penalty and KL anchor in ms-swift, evaluation, resuming, and two processes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("swift.callbacks", reason="ms-swift is not installed here; `make test-swift` installs it")

from integrations.frameworks import WEIGHT
from integrations.reference import relative_error
from peft import get_peft_model
from swift_runs import KEEP, Workplace
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from qscope_posttrain.text.tokens import script_token_ids

LORA = {"lora_rank": 4, "lora_dropout": 0, "target_modules": ["q_proj", "v_proj"], "tuner_type": "lora"}
WITHOUT = {"external_plugins": [KEEP], "callbacks": ["keep_gradients"]}
BATCHES = {
    "padded": {"per_device_train_batch_size": 2},
    "padding-free": {"per_device_train_batch_size": 2, "padding_free": "true"},
    "packed": {"per_device_train_batch_size": 1, "packing": "true", "packing_length": 200},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, make_model, tiny_tokenizer, texts):
    return Workplace(tmp_path_factory.mktemp("swift"), make_model, tiny_tokenizer, texts)


def written_out(model, rows, target_ids, weight, anchor_weight, skip=True):
    """Gradients of `(CE + weight * sum -log(1 - P) + anchor_weight * sum KL) / N`, and the two sums by N."""
    others = torch.ones(model.config.vocab_size, dtype=torch.bool)
    others[target_ids] = False
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    loss, penalty, anchor = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0]
        loss = loss + cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum")
        if row["language"] == "zh":
            continue
        with torch.no_grad(), model.disable_adapter():
            start = model(input_ids=ids).logits[0]
        for position, label in enumerate(row["labels"][1:]):
            if label == -100:
                continue
            if others[label] or not skip:
                penalty = penalty - torch.log1p(-logits[position].softmax(-1)[target_ids].sum())
            now, before = logits[position][others].log_softmax(-1), start[position][others].log_softmax(-1)
            anchor = anchor + (before.exp() * (before - now)).sum()
    ((loss + weight * penalty + anchor_weight * anchor) / count).backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return gradients, float(penalty.detach() / count), float(anchor.detach() / count)


def adapted(workplace, kept):
    """The model as it was in the step that was kept."""
    config, state = kept["peft"]
    model = AutoModelForCausalLM.from_pretrained(workplace.model, dtype=torch.float32)
    model = get_peft_model(model, config)
    model.load_state_dict(state)
    return model.train()


@pytest.mark.parametrize("batches", list(BATCHES))
@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"method": "token_penalty", "token_penalty_weight": 40.0, "anchor_weight": 30.0}, (40.0, 30.0)),
        ({"method": "kl_anchor", "anchor_target": "zh", "anchor_weight": 30.0}, (0.0, 30.0)),
    ],
    ids=["token penalty", "anchor"],
)
def test_token_penalty_and_anchor_equal_the_written_out_loss(workplace, batches, settings, weights):
    options = {**LORA, **BATCHES[batches], "gradient_accumulation_steps": 4}
    run = workplace.train(options, workplace.settings(settings))
    kept = run.rank()
    rows, ids = workplace.rows_of(kept["batches"]), script_token_ids(workplace.tokenizer, "Han")
    assert len(rows) == 8
    expected, penalty, anchor = written_out(adapted(workplace, kept), rows, ids, *weights)
    without, _, _ = written_out(adapted(workplace, kept), rows, ids, 0.0, 0.0)
    assert relative_error(without, expected) > 0.5, "a missing term would not show"
    assert relative_error(kept["gradients"], expected) <= 1e-6
    logs = run.logs[0]
    if settings["method"] == "token_penalty":
        assert logs["token_penalty/penalty"] == pytest.approx(penalty, rel=1e-5)
        assert logs["token_penalty/anchor"] == pytest.approx(anchor, rel=1e-4)
    else:
        assert logs["kl_anchor/penalty"] == pytest.approx(anchor, rel=1e-4)


def test_the_anchor_of_a_model_without_adapter_is_its_start(workplace):
    options = {**BATCHES["packed"], "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 1e-3}
    anchored = {"method": "kl_anchor", "anchor_target": "zh", "anchor_weight": 30.0}
    ours, alone = workplace.train(options, workplace.settings(anchored)), workplace.train({**options, **WITHOUT})
    first, second = (
        relative_error(ours.rank(step=step)["gradients"], alone.rank(step=step)["gradients"]) for step in (0, 1)
    )
    assert first < 1e-6 < 0.01 < second
    assert abs(ours.logs[0]["kl_anchor/penalty"]) < 1e-6 < 1e-4 < ours.logs[1]["kl_anchor/penalty"]


@pytest.mark.parametrize("batches", list(BATCHES))
def test_evaluation_stays_that_of_ms_swift(workplace, batches):
    options = {
        **BATCHES[batches],
        "val_dataset": workplace.folder / "data.jsonl",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 2,
        "per_device_eval_batch_size": 2,
    }
    ours, alone = workplace.train(options, workplace.settings()), workplace.train({**options, **WITHOUT})
    evaluated = [[entry["eval_loss"] for entry in run.logs if "eval_loss" in entry] for run in (ours, alone)]
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == 2
    for entry in ours.logs[:-1]:
        ours_in_it = any(key.startswith(("sasft/", "eval_sasft")) for key in entry)
        assert ours_in_it is ("loss" in entry)


@pytest.mark.parametrize("batches", list(BATCHES))
def test_a_resumed_training_is_the_same_training(workplace, batches):
    settings = workplace.settings()
    options = {**LORA, **BATCHES[batches], "max_steps": 2, "learning_rate": 1e-3, "save_strategy": "steps"}
    options |= {"save_steps": 1, "gradient_accumulation_steps": 1}
    whole = workplace.train(options, settings)
    rest = workplace.train({**options, "resume_from_checkpoint": whole.checkpoint}, settings)
    with pytest.raises(FileNotFoundError):
        rest.rank(step=0)
    expected, found = whole.rank(step=1), rest.rank(step=1)
    assert [row["input_ids"] for row in workplace.rows_of(found["batches"])] == [
        row["input_ids"] for row in workplace.rows_of(expected["batches"])
    ]
    assert rest.logs[0]["sasft/penalty"] == pytest.approx(whole.logs[1]["sasft/penalty"], rel=1e-6)


def test_a_run_cannot_be_resumed_with_another_loss(workplace):
    options = {**BATCHES["padded"], "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    first = workplace.train(options, workplace.settings())
    options |= {"max_steps": 2, "resume_from_checkpoint": first.checkpoint}
    with pytest.raises(ValueError, match=f"config.weight was {WEIGHT}, is 3.0"):
        workplace.train(options, workplace.settings(sasft_weight=3.0))
    with pytest.raises(ValueError, match="trained without qscope_posttrain/token_penalty"):
        workplace.train(options, workplace.settings({"method": "token_penalty"}))
