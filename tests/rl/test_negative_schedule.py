"""The share of groups with negatives over time, and its memory."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState

from qscope_posttrain.rl.config import SteeredGRPOConfig
from qscope_posttrain.rl.schedule import NegativeSchedule


def test_constant_and_falling_share():
    assert [NegativeSchedule(0.5).share_at(step) for step in (0, 10, 10**6)] == [0.5] * 3
    falling = NegativeSchedule(0.8, decay_steps=10)
    assert [falling.share_at(step) for step in (0, 5, 9, 10, 50)] == pytest.approx([0.8, 0.4, 0.08, 0, 0])


@given(
    looped=st.lists(st.lists(st.booleans(), max_size=6), max_size=30),
    bound=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    window=st.integers(1, 8),
)
def test_stops_for_good_at_the_first_full_window_below_the_bound(looped, bound, window):
    schedule = NegativeSchedule(1.0, stop_below=bound, stop_window=window)
    expected = None
    for step, batch in enumerate(looped):
        assert schedule.share_at(step) == (1.0 if expected is None else 0.0)
        schedule.record(batch, step)
        seen = [flag for rows in looped[: step + 1] for flag in rows][-window:]
        if expected is None and len(seen) == window and sum(seen) / window < bound:
            expected = step
        assert schedule.stopped_at == expected


def test_memory_survives_a_checkpoint():
    schedule = NegativeSchedule(1.0, stop_below=0.5, stop_window=4)
    schedule.record([True, False, False], 3)
    state = TrainerState(stateful_callbacks=[schedule])
    stored = json.loads(json.dumps(state.stateful_callbacks))

    resumed = NegativeSchedule(1.0, stop_below=0.5, stop_window=4)
    resumed.on_train_begin(None, TrainerState(stateful_callbacks=stored), TrainerControl())
    assert list(resumed.recent) == [True, False, False]
    assert resumed.stopped_at is None
    resumed.record([False], 4)
    assert resumed.stopped_at == 4
    assert resumed.share_at(4) == 0.0
    resumed.record([True] * 4, 5)
    assert resumed.share_at(6) == 0.0

    again = NegativeSchedule(1.0, stop_below=0.5, stop_window=4)
    state = json.loads(json.dumps(TrainerState(stateful_callbacks=[resumed]).stateful_callbacks))
    again.on_train_begin(None, TrainerState(stateful_callbacks=state), TrainerControl())
    assert again.stopped_at == 4


def test_a_fresh_run_starts_with_nothing():
    schedule = NegativeSchedule()
    schedule.on_train_begin(None, TrainerState(), TrainerControl())
    assert schedule.share_at(0) == 1.0


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_shares_are_shares(share, tmp_path):
    with pytest.raises(ValueError, match="negative_share"):
        SteeredGRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, negative_share=share)
