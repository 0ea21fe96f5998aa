"""Weights chosen on validation prompts."""

from __future__ import annotations

import pytest
from synthetic_rows import switching_row

from benchmarks.experiments.choice import choose_weights
from benchmarks.experiments.switching_rows import compared_with_sft, switching_rows


def choose(*rows, **options):
    return choose_weights(compared_with_sft(switching_rows([switching_row(), *rows])), **options)


def test_the_lowest_hazard_within_the_budget_of_validation():
    chosen = choose(
        # On test prompts 30 would be best; validation decides.
        switching_row("token_penalty", 10.0, 0.2, 0.9, val=(0.5, 0.7)),
        switching_row("token_penalty", 20.0, 3.0, 0.9, val=(0.9, 0.5)),
        switching_row("token_penalty", 30.0, 0.0, 0.1, val=(1.4, 0.3)),
    )["token_penalty"]
    assert chosen.weight == 20.0
    assert chosen.affordable
    assert chosen.cost == pytest.approx(0.9)
    assert chosen.effect == pytest.approx(-50)


def test_the_cheapest_where_all_cost_too_much():
    chosen = choose(
        switching_row("token_penalty", 10.0, val=(2.0, 0.7)), switching_row("token_penalty", 20.0, val=(1.8, 0.8))
    )["token_penalty"]
    assert (chosen.weight, chosen.affordable) == (20.0, False)


def test_means_over_runs_decide():
    place = {"base": 1, "seed": 102}
    chosen = choose(
        switching_row(**place),
        switching_row("token_penalty", 10.0, val=(0.5, 0.70)),
        switching_row("token_penalty", 10.0, val=(0.5, 0.70), **place),
        switching_row("token_penalty", 20.0, val=(0.5, 0.60)),
        switching_row("token_penalty", 20.0, val=(1.7, 0.50), **place),  # mean cost 1.1
    )["token_penalty"]
    assert chosen.weight == 10.0


def test_another_budget():
    rows = [
        switching_row("token_penalty", 10.0, val=(0.5, 0.7)),
        switching_row("token_penalty", 20.0, val=(0.9, 0.5)),
    ]
    assert choose(*rows, budget=0.5)["token_penalty"].weight == 10.0


def test_random_features_follow_the_decoder_readout():
    rows = [
        switching_row("sasft_decoder", 0.1, val=(0.2, 0.9)),
        switching_row("sasft_decoder", 0.3, val=(0.9, 0.7)),
        switching_row("random_features", 0.1, val=(0.1, 0.99)),
        switching_row("random_features", 0.3, val=(2.0, 1.01)),
    ]
    chosen = choose(*rows)["random_features"]
    assert (chosen.weight, chosen.affordable) == (0.3, False)
    # Without a run at that weight they choose for themselves.
    assert choose(*rows[:-1])["random_features"].weight == 0.1


def test_entry_decides_where_switches_are_seen_by_words():
    rows = [
        switching_row("token_penalty", 10.0, identify="words", val=(0.5, 0.7)),
        switching_row("token_penalty", 20.0, identify="words", val=(0.5, 0.6)),
    ]
    rows[0]["metrics"]["val"]["hz"] = 1e-9
    sft = switching_row(identify="words")
    chosen = choose_weights(compared_with_sft(switching_rows([sft, *rows])))
    assert chosen["token_penalty"].weight == 20.0
