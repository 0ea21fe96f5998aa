"""Which rows become negatives: by place, and alike however the rows are split over processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qscope_posttrain.rl.rows import ordinary_plan, plan_rows


def plan(rows, processes=1, process=0, **options):
    settings = {
        "group_size": 4, "negatives_per_group": 1, "window_start": (3, 9), "seed": 0, "step": 5,
    }  # fmt: skip
    return plan_rows(rows, process_index=process, num_processes=processes, **{**settings, **options})


@given(
    group_size=st.integers(3, 8),
    groups=st.integers(1, 6),
    processes=st.integers(1, 6),
    negatives=st.integers(1, 2),
    seed=st.integers(-3, 2**40),
    step=st.integers(0, 100),
    attempt=st.integers(0, 3),
)
def test_every_split_over_processes_is_the_same_plan(group_size, groups, processes, negatives, seed, step, attempt):
    """Groups may be split at any row, also over more processes than there are groups."""
    total = group_size * groups * processes
    options = {
        "group_size": group_size, "negatives_per_group": negatives, "seed": seed, "step": step, "attempt": attempt,
    }  # fmt: skip
    whole = plan(total, **options)
    parts = [plan(total // processes, processes, index, **options) for index in range(processes)]
    assert torch.equal(torch.cat([part.negative for part in parts]), whole.negative)
    assert torch.equal(torch.cat([part.start for part in parts]), whole.start)
    assert {(part.in_batch, part.draw) for part in parts} == {(whole.in_batch, whole.draw)}
    assert [part.first for part in parts] == [index * total // processes for index in range(processes)]

    by_group = whole.negative.view(-1, group_size)
    last = torch.arange(group_size) >= group_size - negatives
    for group in by_group:
        assert torch.equal(group, last)
    assert whole.in_batch
    assert bool(((whole.start >= 3) & (whole.start <= 9)).all())


def test_windows_start_anywhere_in_their_range_and_not_elsewhere():
    starts = torch.cat([plan(8, step=step).start for step in range(200)])
    assert sorted(set(starts.tolist())) == list(range(3, 10))
    assert plan(8, window_start=(0, 0)).start.tolist() == [0] * 8


@pytest.mark.parametrize("changed", [{"seed": 1}, {"step": 6}, {"part": 1}, {"attempt": 1}])
def test_each_generation_draws_for_itself(changed):
    first, second = plan(64), plan(64, **changed)
    assert first.draw != second.draw
    assert not torch.equal(first.start, second.start)


def test_the_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    plan(8)
    assert torch.equal(torch.rand(3), expected)


def test_an_ordinary_plan_holds_nothing():
    nothing = ordinary_plan(3)
    assert nothing.negative.tolist() == [False] * 3
    assert not nothing.in_batch
