"""Two gloo processes that share groups choose the same rows and give the gradient of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rl.cases import LAYER, Formula, cut, ended, looping, prescribed, run_prescribed, small_model, written_gradients
from sft.cases import relative_error

from qscope_posttrain.rl.rows import plan_rows

HERE = Path(__file__).resolve().parent
RANDOM = {
    "negative": "random", "steering_layer": LAYER, "steering_strength": 6.0, "steering_unit": "norm",
    "window_start": [2, 5], "window_length": 6,
}  # fmt: skip


def dead(first):
    """A group whose ordinary rows all have the same reward."""
    return [ended(6, 0.5, first=first), ended(7, 0.5, first=first + 8), cut(0.5, first=first + 16),
            looping(-1.0, first=first + 34, negative=True)]  # fmt: skip


def living(first):
    return [ended(4, 0.1, first=first), ended(8, 0.7, first=first + 4), cut(0.2, first=first + 16),
            looping(-0.6, first=first + 34, negative=True)]  # fmt: skip


TWO = prescribed()
THREE = [*TWO, *living(400)]
# Rows of each process: of 4 rows the second process has the only negative; of 12, each has half of the second group.
CASES = {
    "one group over both": {"batches": [TWO[:4]], "rows": 2},
    "accumulation": {
        "batches": [THREE], "rows": 3, "gradient_accumulation_steps": 2, "mask_truncated_completions": True,
        "soft_overlong_cache": 8, "gate": "keep",
    },
    "all tokens": {"batches": [THREE], "rows": 6, "gate": "keep", "negative_tokens": "all"},
    "a dead group of one process": {
        "batches": [[*dead(240), *living(400), *TWO[:4]], [*living(310), *TWO[4:], *dead(440)]],
        "rows": 6, "dynamic_sampling": True,
    },
    "a dead group of both": {
        "batches": [[*living(400), *dead(240), *TWO[:4]], living(310)], "rows": 6, "dynamic_sampling": True,
    },
    "groups that stay dead": {
        "batches": [[*dead(240), *TWO[:4], *dead(400)], [*living(310), *dead(440)]],
        "rows": 6, "dynamic_sampling": True, "dynamic_sampling_attempts": 1,
    },
}  # fmt: skip
SAMPLED = {
    "three groups": {**RANDOM, "per_device_train_batch_size": 6, "seed": 3},
    "two negatives": {**RANDOM, "negatives_per_group": 2, "per_device_train_batch_size": 2},
}
DYNAMIC = [name for name in CASES if CASES[name].get("dynamic_sampling")]


def options_of(case, processes):
    options = {key: value for key, value in case.items() if key not in ("batches", "rows")}
    return {**RANDOM, **options, "per_device_train_batch_size": case["rows"] * 2 // processes}


@pytest.fixture(scope="module")
def results(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    tiny_tokenizer.save_pretrained(folder)
    job = {name: {"batches": case["batches"], "options": options_of(case, 2)} for name, case in CASES.items()}
    job |= {name: {"batches": None, "options": options} for name, options in SAMPLED.items()}
    torch.save(job, folder / "job.pt")
    command = [sys.executable, str(HERE / "steered_grpo_worker.py"), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def model(make_model):
    return small_model(make_model)


def said_by_all(result, generation):
    return [row for rank in result["ranks"] for row in rank["said"][generation]]


@pytest.mark.promise("Groups of GRPO split over two processes give the rows, gradients and metrics of one")
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in DYNAMIC])
def test_two_processes_equal_one(results, model, tiny_tokenizer, name):
    result, case = results[name], CASES[name]
    single = run_prescribed(model, tiny_tokenizer, case["batches"], **options_of(case, 1))
    assert said_by_all(result, 0) == single.said[0]
    assert [flag for rank in result["ranks"] for flag in rank["flags"][1][0]] == single.flags[0]
    assert sum(flag for rank in result["ranks"] for batch in rank["flags"][0] for flag in batch) == sum(single.flags[0])
    assert relative_error(result["gradients"], single.gradients) <= 1e-6
    ours = [key for key in single.trainer.state.log_history[0] if key.startswith(("ordinary/", "negative/", "reward"))]
    assert len(ours) > 8
    for key in [*ours, "loss"]:
        expected = single.trainer.state.log_history[0][key]
        assert result["logs"][key] == pytest.approx(expected, rel=1e-5, abs=1e-6), key


@pytest.mark.promise("Groups of GRPO split over two processes give the rows, gradients and metrics of one")
def test_a_process_may_be_without_a_negative(results):
    result = results["one group over both"]
    assert [rank["flags"][1] for rank in result["ranks"]] == [[[False, False]], [[False, True]]]


AFTERWARDS = {
    # Rows that each process draws again (all of them where the processes have not equally many dead ones), and the
    # groups in the end: (generation, group).
    "a dead group of one process": (6, [(1, 0), (0, 1), (0, 2)]),
    "a dead group of both": (2, [(0, 0), (1, 0), (0, 2)]),
    "groups that stay dead": (4, [(1, 0), (0, 1), (0, 2)]),
}


@pytest.mark.promise("Groups of GRPO split over two processes give the rows, gradients and metrics of one")
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_sampling_over_two_processes(results, model, name):
    result = results[name]
    again, left = AFTERWARDS[name]
    assert [[len(batch) for batch in rank["said"]] for rank in result["ranks"]] == [[6, again]] * 2
    groups = []
    for generation, group in left:
        rows = said_by_all(result, generation)[4 * group : 4 * group + 4]
        assert len({prompt for prompt, _ in rows}) == 1, "a group has one prompt"
        groups += rows
    left_out = range(8, 12) if name == "groups that stay dead" else ()
    expected, loss = written_gradients(model, groups, Formula(), left_out=left_out)
    assert relative_error(result["gradients"], expected) <= 1e-5
    assert result["logs"]["loss"] == pytest.approx(loss, abs=2e-6)
    assert result["logs"]["dynamic_sampling/left_dead"] == pytest.approx(1 / 3 if left_out else 0)


@pytest.mark.parametrize("name", SAMPLED)
def test_the_plan_is_that_of_one_process(results, name):
    options, ranks = SAMPLED[name], results[name]["ranks"]
    rows = options["per_device_train_batch_size"]
    whole = plan_rows(
        2 * rows, process_index=0, num_processes=1, group_size=4,
        negatives_per_group=options.get("negatives_per_group", 1),
        window_start=(2, 5), seed=options.get("seed", 0), step=0,
    )  # fmt: skip
    assert [flag for rank in ranks for flag in rank["flags"]] == whole.negative.tolist()
    assert [flag for rank in ranks for flag in rank["negative"]] == whole.negative.tolist()
    assert [start for rank in ranks for start in rank["start"]] == whole.start.tolist()
    assert {rank["draw"] for rank in ranks} == {whole.draw}
