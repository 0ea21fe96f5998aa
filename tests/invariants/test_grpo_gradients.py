"""Every option that changes the gradient of steered GRPO, in a real step, against the loss written out by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from rl.cases import (
    LAYER,
    PROMPTS,
    Formula,
    Row,
    cut,
    ended,
    loop_features,
    looping,
    prescribed,
    row_logps,
    run_prescribed,
    small_model,
    written_gradients,
)
from sft.cases import relative_error
from transformers import TrainerCallback

ROWS = prescribed()
SAME = 1e-5

# Options of the trainer, what they mean in the formula, and the formula that they must not be mistaken for.
OPTIONS = {
    "defaults": ({}, {}, {"negative_tokens": "all"}),
    "paper's loss": (
        {"gate": "keep", "negative_tokens": "all"},
        {"gate": "keep", "negative_tokens": "all"},
        {},
    ),
    "gate keep": ({"gate": "keep"}, {"gate": "keep"}, {"gate": "drop"}),
    "tokens all": ({"negative_tokens": "all"}, {"negative_tokens": "all"}, {}),
    "weight": ({"negative_weight": 0.3}, {"negative_weight": 0.3}, {}),
    "rewards not scaled": ({"scale_rewards": "none"}, {"scale_rewards": "none"}, {}),
    "truncated rows masked": (
        {"mask_truncated_completions": True, "gate": "keep"},
        {"mask_truncated_completions": True, "gate": "keep"},
        {"gate": "keep"},
    ),
    "ratio of sequences": ({"importance_sampling_level": "sequence"}, {"importance_sampling_level": "sequence"}, None),
    "loss grpo": ({"loss_type": "grpo"}, {"loss_type": "grpo"}, {}),
    "loss bnpo": ({"loss_type": "bnpo"}, {"loss_type": "bnpo"}, {}),
    "loss dr_grpo": ({"loss_type": "dr_grpo"}, {"loss_type": "dr_grpo"}, {}),
    "soft overlong": ({"soft_overlong_cache": 8}, {"soft_overlong_cache": 8}, {}),
}


@pytest.fixture(scope="module")
def model(make_model):
    return small_model(make_model)


IN_TWO_PARTS = ["defaults", "truncated rows masked", "loss grpo", "loss bnpo", "loss dr_grpo"]


@pytest.mark.promise("Every option that changes GRPO's gradient equals a loss written out by hand to 1e-5")
@pytest.mark.parametrize(
    ("name", "accumulation"), [(name, 1) for name in OPTIONS] + [(name, 2) for name in IN_TWO_PARTS]
)
def test_option_against_the_written_out_loss(model, tiny_tokenizer, name, accumulation):
    options, formula, other = OPTIONS[name]
    outcome = run_prescribed(
        model, tiny_tokenizer, [ROWS], per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation, **options,
    )  # fmt: skip
    assert len(outcome.losses) == accumulation
    parts = outcome.micro_batches()
    expected, loss = written_gradients(model, outcome.said[0], Formula(**formula), micro_batches=parts)
    assert relative_error(outcome.gradients, expected) <= SAME
    assert outcome.trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=2e-6)
    if other is not None:
        mistaken, _ = written_gradients(model, outcome.said[0], Formula(**other), micro_batches=parts)
        if name != "loss bnpo" or accumulation > 1:  # in one batch it is the same
            assert relative_error(mistaken, expected) > 0.03


def test_the_cases_hold_what_the_options_are_about(model, tiny_tokenizer):
    outcome = run_prescribed(model, tiny_tokenizer, [ROWS])
    assert len({len(prompt) for prompt, _ in outcome.said[0]}) > 1, "prompts were meant to be padded"
    assert outcome.flags == [[False, False, False, True] * 2]


@pytest.mark.promise("Every option that changes GRPO's gradient equals a loss written out by hand to 1e-5")
def test_two_negatives_in_a_group(model, tiny_tokenizer):
    rows = [ended(7, 0.5), cut(-0.2), looping(-1.0, first=200, negative=True), looping(-0.7, first=300, negative=True)]
    outcome = run_prescribed(model, tiny_tokenizer, [rows], negatives_per_group=2, per_device_train_batch_size=4)
    assert outcome.flags == [[False, False, True, True]]
    expected, _ = written_gradients(model, outcome.said[0], Formula())
    assert relative_error(outcome.gradients, expected) <= SAME


def steered_logps(model, prompt, row: Row, direction, start: int, length: int):
    """Log-probabilities [length] of a row while the output of one layer is shifted where window tokens are read."""
    shifted = range(len(prompt) + start, len(prompt) + start + length)

    def hook(module, args, output):
        shift = torch.zeros_like(output)
        for column in shifted:
            if column < output.shape[1]:
                shift[:, column] = direction
        return output + shift

    model = copy.deepcopy(model)
    blocks = [module for name, module in model.named_modules() if name.split(".")[-2:-1] == ["layers"]]
    blocks[LAYER].register_forward_hook(hook)
    with torch.no_grad():
        return row_logps(model, prompt, row.completion, 0.9)


def test_the_loss_goes_by_the_policy_and_records_what_steering_drew_from(model, tiny_tokenizer):
    features = loop_features(model, norm=3.0)
    decoder = features.layers[LAYER].decoder
    unit = (decoder / decoder.norm(dim=1, keepdim=True)).sum(0)
    direction = 3.0 * unit / unit.norm()
    options = {"gate": "keep", "negative_tokens": "all"}
    outcome = run_prescribed(
        model, tiny_tokenizer, [ROWS], features=features, negative="feature", window_start=None, window_length=None,
        **options,
    )  # fmt: skip
    expected, _ = written_gradients(model, outcome.said[0], Formula(**options))
    assert relative_error(outcome.gradients, expected) <= SAME

    (batch,) = outcome.losses
    for ids, found, steered in zip(
        batch["completion_ids"].tolist(), batch["behavior_logps"], batch["steered"].tolist(), strict=True
    ):
        if steered:
            prompt, row = next(said for said in outcome.said[0] if list(said[1].completion) == ids)
            drawn_from = steered_logps(model, prompt, row, direction, start=2, length=6)
            torch.testing.assert_close(found, drawn_from, atol=2e-5, rtol=1e-5)


class KeepModels(TrainerCallback):
    """The model before each optimiser step."""

    def __init__(self, like):
        self.like, self.models = like, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        kept = copy.deepcopy(self.like)
        kept.load_state_dict(model.state_dict())
        self.models.append(kept)


@pytest.mark.promise("Every option that changes GRPO's gradient equals a loss written out by hand to 1e-5")
@pytest.mark.parametrize(("level", "rate"), [("token", 3e-3), ("sequence", 5e-4)])
def test_second_step_on_the_same_rows_is_clipped(model, tiny_tokenizer, level, rate):
    keep = KeepModels(model)
    outcome = run_prescribed(
        model, tiny_tokenizer, [ROWS], callbacks=[keep], num_iterations=2, max_steps=2, learning_rate=rate,
        importance_sampling_level=level, lr_scheduler_type="constant",
    )  # fmt: skip
    before, after = keep.models
    assert len(outcome.said) == 1
    formula = Formula(importance_sampling_level=level)
    expected, _ = written_gradients(after, outcome.said[0], formula, old_model=before)
    assert relative_error(outcome.gradients, expected) <= SAME
    fresh, _ = written_gradients(after, outcome.said[0], formula)
    assert relative_error(fresh, expected) > 0.1
    unclipped = replace(formula, epsilon=1.0, epsilon_high=1e6)
    free, _ = written_gradients(after, outcome.said[0], unclipped, old_model=before)
    assert relative_error(free, expected) > 0.05


# ---- Dynamic sampling


def dead(first: int) -> list[Row]:
    """A group whose ordinary rows all have the same reward; the negative would bring it to life."""
    return [ended(6, 0.5, first=first), ended(7, 0.5, first=first + 10), cut(0.5, first=first + 20),
            looping(-1.0, first=first + 40, negative=True)]  # fmt: skip


def dynamic(model, tokenizer, batches, **options):
    return run_prescribed(model, tokenizer, batches, dynamic_sampling=True, **options)


@pytest.mark.promise("Every option that changes GRPO's gradient equals a loss written out by hand to 1e-5")
def test_a_dead_group_is_drawn_again(model, tiny_tokenizer):
    living = ROWS[:4]
    again = [ended(4, 0.1, first=400), ended(8, 0.7, first=410), cut(0.2, first=420), ROWS[3]]
    outcome = dynamic(model, tiny_tokenizer, [[*dead(240), *living], again])
    assert [len(batch) for batch in outcome.said] == [8, 4]
    assert len({prompt for prompt, _ in outcome.said[1]}) == 1, "a group has one prompt"
    expected, _ = written_gradients(model, [*outcome.said[1], *outcome.said[0][4:]], Formula())
    assert relative_error(outcome.gradients, expected) <= SAME
    first, _ = written_gradients(model, outcome.said[0], Formula())
    assert relative_error(first, expected) > 0.1
    logged = outcome.trainer.state.log_history[0]
    assert logged["dynamic_sampling/dead_groups"] == 0.5
    assert logged["dynamic_sampling/attempts"] == 1
    assert logged["dynamic_sampling/left_dead"] == 0


@pytest.mark.promise("Every option that changes GRPO's gradient equals a loss written out by hand to 1e-5")
def test_a_group_that_stays_dead_leaves_the_loss(model, tiny_tokenizer):
    batches = [[*ROWS[:4], *dead(240)], dead(310), dead(400)]
    outcome = dynamic(model, tiny_tokenizer, batches, dynamic_sampling_attempts=2)
    assert len(outcome.said) == 3
    expected, _ = written_gradients(model, outcome.said[0], Formula(), left_out=range(4, 8))
    assert relative_error(outcome.gradients, expected) <= SAME
    whole, _ = written_gradients(model, outcome.said[0], Formula())
    assert relative_error(whole, expected) > 0.1
    assert outcome.trainer.state.log_history[0]["dynamic_sampling/left_dead"] == 0.5


def test_all_groups_dead_gives_no_gradient(model, tiny_tokenizer):
    outcome = dynamic(model, tiny_tokenizer, [dead(240) + dead(310)] * 2, dynamic_sampling_attempts=1)
    assert all(not bool(gradient.any()) for gradient in outcome.gradients.values())
    assert outcome.trainer.state.log_history[0]["loss"] == 0


def test_dynamic_sampling_without_negatives(model, tiny_tokenizer):
    def plain(rows):
        return [replace(row, negative=False) for row in rows]

    batches = [plain([*ROWS[:4], *dead(240)[:3], ended(5, 0.5, first=360)]), plain(ROWS[4:])]
    outcome = dynamic(model, tiny_tokenizer, batches, negatives_per_group=0)
    assert outcome.flags == [[False] * 8, [False] * 4]
    expected, _ = written_gradients(model, [*outcome.said[0][:4], *outcome.said[1]], Formula())
    assert relative_error(outcome.gradients, expected) <= SAME


def test_prompts_of_redraws_come_from_the_data_set(model, tiny_tokenizer):
    outcome = dynamic(model, tiny_tokenizer, [[*dead(240), *ROWS[:4]], ROWS[4:]])
    known = {tuple(tiny_tokenizer(prompt).input_ids) for prompt in PROMPTS}
    assert {prompt for batch in outcome.said for prompt, _ in batch} <= known
