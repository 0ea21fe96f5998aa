"""Metrics and the table of completions, against values worked out by hand."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pandas
import pytest
import torch
from datasets import Dataset
from rl.cases import (
    END,
    LAYER,
    PROMPTS,
    Formula,
    advantages,
    ended,
    in_loss,
    loop_features,
    make_args,
    prescribed,
    row_logps,
    run_prescribed,
    small_model,
)

from qscope_posttrain.rl import metrics
from qscope_posttrain.rl.metrics import NegativeWatch
from qscope_posttrain.rl.trainer import SteeredGRPOTrainer

ROWS = prescribed()
ORDINARY = [row for row in ROWS if not row.negative]
FLOOR = 1e-3


@pytest.fixture(scope="module")
def model(make_model):
    return small_model(make_model)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def steered_model(model, features, width):
    """A copy whose LAYER is shifted at columns width + 2 to width + 7, the window of the features."""
    decoder = features.layers[LAYER].decoder
    unit = (decoder / decoder.norm(dim=1, keepdim=True)).sum(0)
    shift = features.layers[LAYER].residual_median_norm * unit / unit.norm()

    def hook(module, args, output):
        output = output.clone()
        output[:, width + 2 : width + 8] += shift
        return output

    model = copy.deepcopy(model)
    model.model.layers[LAYER].register_forward_hook(hook)
    return model


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_metric_of_a_known_batch(model, tiny_tokenizer, accumulation):
    features = loop_features(model, norm=3.0)
    outcome = run_prescribed(
        model, tiny_tokenizer, [ROWS], features=features, negative="feature", window_start=None, window_length=None,
        per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    logged = outcome.trainer.state.log_history[0]
    formula = Formula()
    known = advantages(ROWS, formula)
    kept = known[3]
    inside = [row.reward for i, row in enumerate(ROWS) if not row.negative or i == 3]
    expected = {
        "ordinary/reward": mean(row.reward for row in ORDINARY),
        "ordinary/length": mean(len(row.completion) for row in ORDINARY),
        "ordinary/repeat_ratio": 1 / 6,
        "ordinary/advantage": mean(a for a, row in zip(known, ROWS, strict=True) if not row.negative),
        "ordinary/zero_std_groups": 0,
        "negative/rows": 2,
        "negative/reward": -0.7,
        "negative/length": 16,
        "negative/looped": 0.5,
        "negative/kept": 0.5,
        "negative/advantage": kept,
        "reward": mean(inside),
        "reward_std": float(torch.tensor(inside).std()),
        "completions/mean_length": mean(len(row.completion) for row in ROWS),
    }
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name

    unlikely, ratios, pulls = [], [], {True: 0.0, False: 0.0}
    for (prompt, row), advantage in zip(outcome.said[0], known, strict=True):
        with torch.no_grad():
            policy = row_logps(model, prompt, row.completion, 0.9)
            behavior = row_logps(steered_model(model, features, len(prompt)), prompt, row.completion, 0.9)
        if row.negative:
            unlikely += (policy.exp() < FLOOR).tolist()
            ratios += (policy - behavior).tolist()
        pulls[row.negative] += float((abs(advantage) * (1 - policy.exp()) * in_loss(row, formula)).sum())
    assert 0.1 < mean(unlikely) < 0.9
    assert logged["negative/unlikely_tokens"] == pytest.approx(mean(unlikely), abs=1e-6)
    assert abs(mean(ratios)) > 0.05
    assert logged["negative/log_ratio"] == pytest.approx(mean(ratios), abs=1e-4)
    assert logged["negative/gradient_share"] == pytest.approx(pulls[True] / sum(pulls.values()), rel=1e-4)


def test_a_dead_group_is_counted_without_its_negative(model, tiny_tokenizer):
    rows = [*ROWS[:4], *(ended(5 + i, 0.5, first=400 + 9 * i) for i in range(3)), ROWS[7]]
    logged = run_prescribed(model, tiny_tokenizer, [rows]).trainer.state.log_history[0]
    assert logged["ordinary/zero_std_groups"] == 0.5


def test_no_row_of_a_kind_is_no_number(model, tiny_tokenizer):
    """No negative is kept: its advantage is no number, which the log leaves out, and nothing else is lost."""
    rows = prescribed(loops=False)
    logged = run_prescribed(model, tiny_tokenizer, [rows]).trainer.state.log_history[0]
    assert logged["negative/advantage"] is None
    assert logged["negative/kept"] == 0
    assert logged["negative/gradient_share"] == 0
    assert logged["negative/reward"] == pytest.approx(-0.7)


def tables(trainer):
    files = sorted((Path(trainer.args.output_dir) / "completions").glob("*.parquet"))
    return [pandas.read_parquet(file) for file in files]


def test_the_table_of_completions(model, tiny_tokenizer):
    outcome = run_prescribed(
        model, tiny_tokenizer, [ROWS], log_completions=True, negative_weight=0.5,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    (table,) = tables(outcome.trainer)
    assert table["steered"].tolist() == [row.negative for row in ROWS]
    assert table["looped"].tolist() == [row.tail is not None for row in ROWS]
    torch.testing.assert_close(
        torch.tensor(table["advantage"].tolist()),
        torch.tensor(advantages(ROWS, Formula(negative_weight=0.5))),
    )
    rewards = torch.tensor(table["reward"].tolist())
    torch.testing.assert_close(rewards, torch.tensor([row.reward for row in ROWS]))
    in_loss = {tuple(t for t in ids if t): a for batch in outcome.losses for ids, a in
               zip(batch["completion_ids"].tolist(), batch["advantages"].tolist(), strict=True)}  # fmt: skip
    assert [in_loss[row.completion] for row in ROWS] == table["advantage"].tolist()


def test_tables_of_batches_with_and_without_negatives(model, tiny_tokenizer):
    """Evaluation never has a negative; each table marks its own rows, also beside a column of the user's."""
    flags = []

    def reward(completion_ids, steered, log_extra, **_):
        flags.append(list(steered))
        log_extra("mine", [ids[-1] == END for ids in completion_ids])
        return [float(sum(ids) % 5) for ids in completion_ids]

    args = make_args(
        max_steps=6, log_completions=True, per_device_train_batch_size=4,
        eval_strategy="steps", eval_steps=3, num_generations_eval=4, per_device_eval_batch_size=4, seed=1,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    trainer = SteeredGRPOTrainer(
        model=copy.deepcopy(model), reward_funcs=reward, args=args, train_dataset=prompts,
        eval_dataset=prompts.select(range(1)), processing_class=tiny_tokenizer,
    )  # fmt: skip
    trainer.train()
    training, evaluation = [flags[i] for i in (0, 1, 2, 4, 5, 6)], [flags[i] for i in (3, 7)]
    assert len(flags) == 8
    assert training == [[False, False, False, True]] * 6
    assert evaluation == [[False] * 4] * 2
    found = [table["steered"].tolist() for table in tables(trainer)]
    assert found == [*training[:2], evaluation[0], *training[3:5], evaluation[1]]


@pytest.mark.promise(
    "Negatives that change nothing for 20 batches are warned of: all dropped by the gate, or not steered"
)
class TestIdleNegatives:
    def look(self, *windows):
        watch = NegativeWatch()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for values in windows:
                watch.look(values)
        return [str(one.message) for one in caught]

    def test_all_are_dropped(self):
        dropped = {"negative/kept": 0.0, "negative/rows": 2.0}
        (said,) = self.look(*[dropped, {"negative/rows": 0.0}] * 50)  # a batch may have no negative
        assert "negative/kept has been 0 in 20 batches in a row: the gate drops every negative" in said
        assert self.look(*[dropped] * 19, {"negative/kept": 0.5}, *[dropped] * 19) == []

    def test_nothing_is_steered(self):
        (said,) = self.look(*[{"negative/log_ratio": 1e-5, "negative/kept": 1.0}] * 20)
        assert "negative/log_ratio has been 0 in 20 batches in a row" in said
        assert self.look(*[{"negative/log_ratio": -0.02}] * 40) == []

    def test_in_a_training(self, model, tiny_tokenizer, monkeypatch):
        monkeypatch.setattr(metrics, "IDLE_BATCHES", 1)
        with pytest.warns(UserWarning, match="the gate drops every negative"):
            run_prescribed(model, tiny_tokenizer, [prescribed(loops=False)])
