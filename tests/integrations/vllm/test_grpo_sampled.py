"""Sampled runs through a colocated vLLM: log-probabilities of negatives, and the importance ratio of TRL."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version", reason="vLLM is not installed here: make test-vllm")

import torch
from integrations.vllm.rollout_cases import LENGTH, SEEDED, STEERED, G, save_model, small_engines, train
from transformers import AutoModelForCausalLM

from qscope_posttrain.models.steering import Window, steer
from qscope_posttrain.rl.rollouts.negatives import planned_steering
from qscope_posttrain.rl.rows import plan_rows

MODES = ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")
NEGATIVES = {"seeded": SEEDED, "steered": STEERED}


@pytest.fixture(scope="module")
def runs(model):
    """One step of each kind of negatives in each of TRL's modes of importance correction."""
    with small_engines():
        return {
            (kind, mode): train(
                model, use_vllm=True, max_steps=1, vllm_importance_sampling_correction=True,
                vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=0.5, **options,
            )
            for kind, options in NEGATIVES.items()
            for mode in MODES
        }  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", NEGATIVES)
def test_the_importance_ratio_of_negatives_is_one(runs, kind, mode):
    batch = runs[kind, mode].batches[0]
    ratio, negative = batch["importance_sampling_ratio"], batch["steered"]
    assert negative.tolist() == ([False] * (G - 1) + [True]) * 2
    assert torch.equal(ratio[negative], torch.ones_like(ratio[negative]))
    ordinary = ratio[~negative]
    assert (ordinary - 1).abs().max() < 1e-3
    assert (ordinary != 1).any()


def test_the_trap_is_real(runs):
    """With the log-probabilities of a steered row, TRL would mask it: its ratio is far below 1."""
    batch = runs["steered", "sequence_mask"].batches[0]
    difference = (batch["old_per_token_logps"] - batch["behavior_logps"]) * batch["completion_mask"]
    assert difference[batch["steered"]].sum(dim=1).exp().min() < 0.01


@pytest.mark.parametrize("kind", NEGATIVES)
def test_rows_of_a_group_differ(runs, kind):
    said = [tuple(ids) for mode in MODES for ids in runs[kind, mode].said[0] if len(ids) > 6]
    groups = [runs[kind, mode].said[0][first : first + G] for mode in MODES for first in (0, G)]
    assert len(said) >= 8
    for group in groups:
        long = [tuple(ids) for ids in group if len(ids) > 6]
        assert len(set(long)) == len(long)


def test_seeded_rows_were_drawn_from_the_policy_but_for_the_copies(runs):
    copied = drawn = 0
    for mode in MODES:
        batch = runs["seeded", mode].batches[0]
        mask = batch["completion_mask"].bool() & batch["steered"][:, None]
        behavior, policy = batch["behavior_logps"][mask], batch["old_per_token_logps"][mask]
        forced = behavior == 0
        torch.testing.assert_close(behavior[~forced], policy[~forced], atol=1e-4, rtol=1e-4)
        copied, drawn = copied + int(forced.sum()), drawn + int((~forced).sum())
    assert copied >= 16
    assert drawn >= 16


def test_seeded_rows_say_a_piece_three_times(runs):
    checked = 0
    for mode in MODES:
        batch = runs["seeded", mode].batches[0]
        for row in batch["steered"].nonzero().squeeze(1).tolist():
            ids, mask = batch["completion_ids"][row], batch["completion_mask"][row].bool()
            forced = ((batch["behavior_logps"][row] == 0) & mask).nonzero().squeeze(1)
            if not len(forced) or int(forced[-1]) == LENGTH - 1:
                continue  # it ended before, or was cut in the middle of the copies
            period = len(forced) // 2
            assert 4 <= period <= SEEDED["copy_length"]
            assert torch.equal(ids[forced], ids[forced - period])
            checked += 1
    assert checked >= 3


def test_steered_rows_were_drawn_from_the_steered_policy(model, runs):
    run = runs["steered", "token_mask"]
    trainer, batch = run.trainer, run.batches[0]
    plan = plan_rows(
        2 * G, process_index=0, num_processes=1, group_size=G, negatives_per_group=1,
        window_start=trainer._source.window_start, seed=trainer.args.seed, step=0,
    )  # fmt: skip
    steering = planned_steering(trainer._source, plan)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    checked = 0
    for row in batch["steered"].nonzero().squeeze(1).tolist():
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        said = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        window = Window(start=int(plan.start[row]), length=trainer._source.window_length)
        one = type(steering)(steering.direction[row], steering.layers, steering.strength, unit="norm", positions=window)
        with torch.no_grad(), steer(policy, one, prompt_length=len(prompt), require_generated=False):
            logits = policy(input_ids=torch.cat([prompt, said])[None]).logits[0, len(prompt) - 1 : -1]
        logps = torch.log_softmax(logits, dim=-1).gather(1, said[:, None]).squeeze(1)
        torch.testing.assert_close(batch["behavior_logps"][row][: len(said)], logps, atol=1e-3, rtol=1e-3)
        checked += len(said)
    assert checked > 10


def test_metrics_of_negatives_are_logged(runs):
    for run in runs.values():
        assert run.log[0]["negative/rows"] == 2
        assert run.log[0]["negative/log_ratio"] < (0 if run is runs["steered", "token_mask"] else 1e-3)
        assert run.log[0]["sampling/sampling_logp_difference/max"] < 1e-3


@pytest.fixture(scope="module")
def tied_model(make_model, tiny_tokenizer, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tied"), make_model, tiny_tokenizer, tie_word_embeddings=True)


@pytest.mark.parametrize("which", ["model", "tied_model"])
def test_the_distribution_is_that_of_the_new_weights(which, request):
    """A head that is tied to the embeddings is packed apart from them on a CPU."""
    folder = request.getfixturevalue(which)
    with small_engines():
        run = train(
            folder, use_vllm=True, max_steps=3, learning_rate=1e-2, vllm_importance_sampling_correction=True, **SEEDED
        )
    differences = [entry["sampling/sampling_logp_difference/max"] for entry in run.log[:3]]
    assert max(differences) < 1e-4
    moved = dict(run.trainer.model.named_parameters())["model.embed_tokens.weight"]
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings().weight
    assert (moved - start).abs().max() > 5e-3
