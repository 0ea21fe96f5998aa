"""What the tap records while a model generates, against a forward over the finished text under the same steering."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from rl.cases import END, LAYER, Formula, Row, ended, loop_features, make_args, prescribed, run_prescribed, small_model
from sft.cases import with_lora

from qscope_posttrain.features.steering import feature_steering
from qscope_posttrain.models.positions import Window
from qscope_posttrain.models.steering import steer
from qscope_posttrain.rl.rollouts.hf import generation_tap, negative_rollout
from qscope_posttrain.rl.rollouts.negatives import negative_source
from qscope_posttrain.rl.rows import RowPlan

TEMPERATURE = 0.7
LENGTH = 18
PROMPTS = ["The river runs", "We", "She reads a book every evening before", "Nobody knew", "In the"]
NEGATIVE = [False, True, False, True, True]


@pytest.fixture(scope="module")
def model(make_model):
    return small_model(make_model, seed=3)


def plan(starts):
    negative = torch.tensor(NEGATIVE)
    return RowPlan(negative, torch.tensor(starts), 0, True, 11)


def generate(model, tokenizer, seed=0):
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(seed)
    said = model.generate(
        **inputs, max_new_tokens=LENGTH, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, eos_token_id=END,
        pad_token_id=0,
    )  # fmt: skip
    prompts = [ids[mask.bool()] for ids, mask in zip(inputs.input_ids, inputs.attention_mask, strict=True)]
    return prompts, said[:, inputs.input_ids.shape[1] :]


def lengths(completions):
    return [int((ids == END).nonzero()[0]) + 1 if bool((ids == END).any()) else len(ids) for ids in completions]


def rollout(model, tokenizer, starts, features=None, **options):
    source = negative_source(make_args(**options), features, model, tokenizer)
    with negative_rollout(source, plan(starts), model, TEMPERATURE) as tap:
        prompts, completions = generate(model, tokenizer)
    return prompts, completions, tap.log_probabilities(completions[torch.tensor(NEGATIVE)])


@pytest.mark.parametrize("lora", [False, True])
def test_recorded_log_probabilities_are_those_of_a_steered_forward(model, tiny_tokenizer, lora):
    model = with_lora(copy.deepcopy(model)).eval() if lora else model
    features = loop_features(model, norm=6.0)
    starts = [0, 1, 0, 4, 12]
    prompts, completions, found = rollout(model, tiny_tokenizer, starts, features, negative="feature", window_length=5)
    assert min(lengths(completions)) < LENGTH, "a row was meant to end early"
    assert found.shape == (3, completions.shape[1])

    rows = [row for row, negative in enumerate(NEGATIVE) if negative]
    steered_ones = 0
    for row, recorded in zip(rows, found, strict=True):
        said = completions[row][: lengths(completions)[row]]
        text = torch.cat([prompts[row], said])[None]
        steering = feature_steering(features, positions=Window(starts[row], 5))
        width = len(prompts[row])
        with torch.no_grad():
            plain = model(input_ids=text).logits
            with steer(model, steering, prompt_length=width, require_generated=False):
                logits = model(input_ids=text).logits
        expected = torch.log_softmax(logits[0, width - 1 : -1] / TEMPERATURE, dim=-1)
        expected = expected.gather(1, said[:, None]).squeeze(1)
        torch.testing.assert_close(recorded[: len(said)], expected, atol=2e-5, rtol=1e-5)
        steered_ones += not torch.allclose(logits, plain, atol=0.1)
    assert steered_ones >= 2


def test_the_tap_itself_changes_nothing(model, tiny_tokenizer):
    _, expected = generate(model, tiny_tokenizer)
    with generation_tap(model, torch.tensor([1, 3]), TEMPERATURE) as tap:
        _, found = generate(model, tiny_tokenizer)
    assert torch.equal(found, expected)
    assert tap.steps == found.shape[1] - 1, "the last token is never read"


def test_columns_that_were_never_generated_are_zero(model, tiny_tokenizer):
    """TRL may pad completions to a multiple of some number."""
    with generation_tap(model, torch.tensor([0, 2]), TEMPERATURE) as tap:
        _, said = generate(model, tiny_tokenizer)
    rows = said[[0, 2]]
    padded = torch.nn.functional.pad(rows, (0, 5))
    found = tap.log_probabilities(padded)
    assert torch.equal(found[:, : rows.shape[1]], tap.log_probabilities(rows))
    assert not bool(found[:, rows.shape[1] :].any())


def test_forced_tokens_are_certain(model, tiny_tokenizer):
    options = {"negative": "seeded", "copies": 100, "copy_length": 4, "copy_boundary": ["\x00"], "window_start": [0, 9]}
    _, completions, found = rollout(model, tiny_tokenizer, [0, 4, 0, 4, 8], **options)
    for row, recorded, start in zip(completions[torch.tensor(NEGATIVE)], found, [4, 4, 8], strict=True):
        if END in row[:start]:
            continue
        assert bool((recorded[:start] < 0).all())
        assert not bool(recorded[start:].any()), "log 1"
        assert row[start:].tolist() == [int(row[start - 4 + i % 4]) for i in range(len(row) - start)]


def test_a_block_in_which_nothing_ran(model):
    with pytest.raises(RuntimeError, match="never ran"), generation_tap(model, torch.tensor([0]), 1.0):
        pass
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_directions_belong_to_rows_whatever_process_holds_them(model, tiny_tokenizer):
    """Random steering: the rows of two processes are steered as those of one are."""
    options = {"negative": "random", "steering_layer": LAYER, "steering_strength": 6.0, "steering_unit": "norm",
               "window_start": [0, 0], "window_length": 0}  # fmt: skip
    source = negative_source(make_args(**options), None, model, tiny_tokenizer)
    ids = torch.arange(10, 50).view(4, 10)

    def logits(rows, first):
        negative = torch.ones(len(rows), dtype=torch.bool)
        part = RowPlan(negative, torch.zeros(len(rows), dtype=torch.long), first, True, 5)
        with negative_rollout(source, part, model, 1.0), torch.no_grad():
            read = model(input_ids=rows[:, :4], use_cache=True)
            return model(input_ids=rows[:, 4:5], past_key_values=read.past_key_values).logits

    together = logits(ids, 0)
    apart = torch.cat([logits(ids[:2], 0), logits(ids[2:], 2)])
    torch.testing.assert_close(apart, together)
    same_row = logits(ids[[0, 0]], 0)
    assert not torch.allclose(same_row[0], same_row[1], atol=0.1), "every row has a direction of its own"


def test_a_row_that_ended_before_it_was_to_copy(model, tiny_tokenizer):
    """It says padding where a copy was due, whose probability there is 0: no inf may reach loss or metrics."""
    early = [Row((50 + i, 51, END), -1.0, negative=True) for i in range(2)]
    rows = [ended(7, 0.5), ended(12, -0.2), ended(9, 1.0, first=80), early[0], *prescribed()[4:7], early[1]]
    outcome = run_prescribed(
        model, tiny_tokenizer, [rows], negative="seeded", copies=100, copy_length=4, copy_boundary=["\x00"],
        window_start=[4, 4], window_length=None, gate="keep", negative_tokens="all",
    )  # fmt: skip
    assert all(bool(gradient.isfinite().all()) for gradient in outcome.gradients.values())
    logged = outcome.trainer.state.log_history[0]
    assert Formula().temperature == outcome.trainer.temperature
    for name in ("loss", "grad_norm", "negative/log_ratio"):
        assert torch.isfinite(torch.tensor(logged[name])), name


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("steered", [False, True])
def test_virtual_tokens_in_front_of_the_prompt(model, tiny_tokenizer, kind, steered):
    """The same rows are negatives, and the others say what they would have said."""
    makers = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    tuned = peft.get_peft_model(copy.deepcopy(model), makers[kind](task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    options = {"negative": "seeded", "copies": 2, "copy_length": 4, "window_start": [0, 0]}
    features = loop_features(model, norm=6.0) if steered else None
    _, said, _ = rollout(tuned, tiny_tokenizer, [0] * len(NEGATIVE), features, **({} if steered else options))
    _, plain = generate(tuned, tiny_tokenizer)
    negative = torch.tensor(NEGATIVE)
    assert torch.equal(said[~negative][:, : plain.shape[1]], plain[~negative][:, : said.shape[1]])
    if steered:
        assert any(a != b for a, b in zip(said[negative].tolist(), plain[negative].tolist(), strict=True))
        return
    copied = [ids for ids in said[negative].tolist() if END not in ids[:12]]
    assert copied
    assert all(ids[:4] == ids[4:8] == ids[8:12] for ids in copied)
