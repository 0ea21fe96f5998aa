"""Tables of repetition experiments from rows written by hand, with numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.experiments.arms import REPETITION_ARMS as ARMS
from benchmarks.experiments.repetition_numbers import compare, loop_rate, looped_share, probe_curve
from benchmarks.experiments.repetition_page import repetition_report
from benchmarks.experiments.repetition_rows import by_arm, pair_up, repetition_rows
from benchmarks.experiments.repetition_tables import (
    answer,
    comparison_table,
    effects_table,
    loops_table,
    runs_table,
)
from qscope_posttrain.report.html import write_html
from qscope_posttrain.report.summary import to_json
from qscope_posttrain.report.tables import Table

PROBE = {"oh": 0.5, "oc1": 0.9, "oend": 0.4, "h": 0.001, "c1": 0.4, "c5": 0.9, "cend": 0.3, "end": 0.0002}


def row(arm: str, base: int, seed: int, loops: int, right: int, **changes: Any) -> dict[str, Any]:
    """A run of 1,000 samples and 100 benign ones."""
    trained = arm != "start"
    return {
        "kind": "repetition",
        "cell": "rare",
        "base": base,
        "arm": arm,
        "title": ARMS[arm].title if trained else "before DAPO",
        "weight": None,
        "seed": seed,
        "quality": {"samples": 1000, "loops": loops, "unended": loops + 1, "right": right},
        "benign": {"samples": 100, "loops": 1, "unended": 2, "right": 90},
        "probes": {"0": PROBE, **({"40": {**PROBE, "oend": 0.1 * (seed + 1)}} if trained else {})},
        "steered": {"rows": 160, "looped": 40 + 16 * seed} if arm in ("default", "seeded") else None,
        "gradient_norm": 0.2 if trained else None,
        "seconds": 10.0 if trained else 0.0,
        "folder": f"/cache/{arm}-{base}-{seed}",
        **changes,
    }


GRID = [(0, 0), (0, 1), (1, 0), (1, 1)]


def grid(arm: str, loops: list[int], right: list[int]) -> list[dict[str, Any]]:
    return [row(arm, *key, count, good) for key, count, good in zip(GRID, loops, right, strict=True)]


START = grid("start", [12, 14, 9, 15], [800, 800, 800, 800])
PLAIN = grid("plain", [8, 12, 10, 10], [900, 900, 900, 900])
DEFAULT = grid("default", [2, 1, 3, 2], [910, 930, 900, 880])
SEEDED = grid("seeded", [0, 0, 0, 0], [900, 901, 899, 900])
ROWS = [*START, *PLAIN, *DEFAULT, *SEEDED]


def line(table: Table, name: str) -> dict[str, Any]:
    found = next(cells for cells in table.rows if cells[0] == name)
    return dict(zip(table.columns, found, strict=True))


def test_accuracy_is_compared_run_by_run() -> None:
    arms = by_arm(repetition_rows(ROWS))
    found = compare(arms["default"], arms["plain"])
    assert found is not None
    # Differences +1, +3 in base 0 and 0, -2 in base 1: means 2 and -1; sd of the four 2.0817, t with 3 df 3.1824.
    assert found.accuracy.estimate == pytest.approx(0.5)
    assert found.accuracy.high - 0.5 == pytest.approx(3.1824 * 2.0817 / 2, rel=1e-4)
    assert (found.accuracy.unit, found.accuracy.count, found.pairs) == ("runs", 4, 4)
    assert found.loops == (8, 40)
    assert found.loop_difference.estimate == pytest.approx(-80.0)
    assert found.ratio.estimate == pytest.approx(0.2)
    assert found.ratio.low < 0.2 < found.ratio.high < 1


def test_runs_without_a_partner_are_left_out() -> None:
    arms = by_arm(repetition_rows([*PLAIN, *DEFAULT[:3]]))
    found = compare(arms["default"], arms["plain"])
    assert found is not None
    assert (found.pairs, found.loops) == (3, (6, 30))
    assert [pair.run.key == pair.reference.key for pair in pair_up(arms["default"], arms["plain"])] == [True] * 3
    assert compare(arms["default"], []) is None


def test_the_table_of_loops() -> None:
    table = loops_table(repetition_rows(ROWS), "rare loops")
    assert [cells[0] for cells in table.rows] == ["before DAPO", "DAPO", "steered, default", "seeded, default"]
    plain, default = line(table, "DAPO"), line(table, "steered, default")
    assert (plain["loops"], plain["per run"], plain["right, %"]) == ("40 of 4000", "8 12 | 10 10", 90.0)
    assert (plain["times DAPO's"], plain["goal"]) == (None, None)
    assert default["loops"] == "8 of 4000"
    assert default["times DAPO's"].startswith("0.2 (0.")
    assert default["against DAPO, points"] == "+0.5 (-2.8 .. +3.8)"
    assert default["right, %"] == 90.5
    # The exact interval of 8 against 40: p in 0.0747 .. 0.2998 of 48, so a ratio above 0.08 and below 0.43 or so.
    low, high = (float(part) for part in default["times DAPO's"][5:-1].split(" .. "))
    assert low == pytest.approx(0.0807, abs=0.002)
    assert high == pytest.approx(0.428, abs=0.01)
    assert default["goal"] == "missed by the estimates"
    assert line(table, "before DAPO")["goal"] is None
    assert "over runs, as there are no more than 2 start checkpoints" in table.caption


def test_no_loop_at_all_has_an_upper_limit() -> None:
    rows = repetition_rows(ROWS)
    seeded = line(loops_table(rows, "rare"), "seeded, default")
    assert (seeded["loops"], seeded["per run"], seeded["%, over runs"]) == ("0 of 4000", "0 0 | 0 0", "-")
    assert seeded["%, Wilson"] == "0.000 (0.000 .. 0.096)"
    # Clopper-Pearson: p at most 1 - 0.025 ** (1 / 40) = 0.0881, so a ratio of at most 0.0966.
    assert seeded["times DAPO's"] == "0 (at most 0.097)"
    # Accuracies +0.1, -0.1 and twice 0: sd 0.0816, t 3.1824, half width 0.13.
    assert seeded["against DAPO, points"] == "+0.0 (-0.1 .. +0.1)"
    assert seeded["goal"] == "met"
    against = line(comparison_table(rows, "rare"), "steered, default against seeded, default")
    assert against["loops"] == "8 against 0"
    assert against["ratio"].startswith("at least 1.7")  # p at least 0.025 ** (1 / 8) = 0.6306
    assert against["shown"] == "more loops"
    arms = by_arm(repetition_rows([*grid("plain", [0] * 4, [900] * 4), *SEEDED]))
    nothing = compare(arms["seeded"], arms["plain"])
    assert nothing is not None
    assert math.isnan(nothing.ratio.estimate)
    assert (nothing.ratio.low, nothing.ratio.high, answer(nothing)) == (0.0, math.inf, "no difference shown")
    assert nothing.goal == "missed by the estimates"
    assert line(loops_table([*arms["plain"], *arms["seeded"]], "rare"), "seeded, default")["times DAPO's"] == "-"


def test_the_goal_is_missed_where_an_interval_says_so() -> None:
    costly = grid("paper", [0, 0, 0, 0], [850, 860, 855, 850])
    rows = repetition_rows([*PLAIN, *costly, *grid("random", [9, 11, 10, 9], [900] * 4)])
    table = loops_table(rows, "rare")
    assert line(table, "steered, paper")["goal"] == "missed"
    assert line(table, "random, default")["goal"] == "missed"
    few = repetition_rows([*grid("plain", [1, 2, 1, 1], [900] * 4), *SEEDED])
    assert line(loops_table(few, "rare"), "seeded, default")["goal"] == "met by the estimates"


def test_side_effects_and_every_run() -> None:
    rows = repetition_rows(ROWS)
    table = effects_table(rows, "rare")
    default = line(table, "steered, default")
    assert default["benign loops"] == "4 of 400"
    assert default["benign right, %"] == 90.0
    assert default["negatives that loop, %"].startswith("30.0 (")  # 25 % and 35 % in both bases
    assert default["endless, %"].startswith("15.0 (")
    assert default["gradient norm"] == pytest.approx(0.2)
    assert line(table, "DAPO")["negatives that loop, %"] == "-"
    assert line(table, "before DAPO")["seconds"] is None
    assert looped_share(by_arm(rows)["plain"]) is None
    assert probe_curve(by_arm(rows)["default"], "oend") == ([0, 40], [0.4, pytest.approx(0.15)])
    every = runs_table(rows, "rare")
    assert len(every.rows) == 16
    assert [cells[:4] for cells in every.rows[8:12]] == [
        ("steered, default", 0, 0, 2),
        ("steered, default", 0, 1, 1),
        ("steered, default", 1, 0, 3),
        ("steered, default", 1, 1, 2),
    ]


def test_three_bases_are_what_intervals_are_over() -> None:
    rows = [row(arm, base, seed, loops, 900 + base) for arm, loops in (("plain", 10), ("default", 1))
            for base in range(3) for seed in range(2)]  # fmt: skip
    parsed = repetition_rows(rows)
    found = compare(by_arm(parsed)["default"], by_arm(parsed)["plain"])
    assert found is not None
    assert (found.accuracy.unit, found.accuracy.count) == ("bases", 3)
    assert "over 3 start checkpoints" in loops_table(parsed, "rare").caption


def test_a_single_run_has_no_interval_over_runs() -> None:
    rows = repetition_rows([PLAIN[0], DEFAULT[0]])
    default = line(loops_table(rows, "rare"), "steered, default")
    assert (default["%, over runs"], default["against DAPO, points"]) == ("-", "+1.0")
    assert loop_rate(rows[:1]).shown == loop_rate(rows[:1]).wilson
    both = loop_rate(repetition_rows(PLAIN))
    assert both.over_runs is not None
    # Four runs of 8 to 12 loops agree better than chance: Wilson's limits are the outer ones.
    assert both.wilson.low < both.over_runs.low < both.over_runs.high < both.wilson.high
    assert both.shown == both.wilson
    apart = loop_rate(repetition_rows(grid("plain", [0, 40, 0, 0], [900] * 4)))
    assert apart.over_runs is not None
    assert apart.shown[1:] == apart.over_runs[1:]
    assert default["goal"] == "missed by the estimates"


def test_an_arm_that_was_steered_otherwise_is_named() -> None:
    steering = {"asked": "window_means", "way": "window", "layer": 1}
    means = [row("difference_of_means", 1, 0, 3, 900, steering=steering)]
    kept = [row("difference_of_means", 0, 0, 3, 900, steering={**steering, "way": "window_means"})]
    caption = loops_table(repetition_rows([*PLAIN, *means, *kept]), "rare").caption
    assert "difference of means, default: its own way of steering made nothing loop in base 1," in caption
    assert "its own way" not in loops_table(repetition_rows([*PLAIN, *kept]), "rare").caption


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="two rows of the run of arm 'plain'"):
        repetition_rows([PLAIN[0], PLAIN[0]])
    with pytest.raises(ValueError, match=r"has no 'gradient_norm'"):
        repetition_rows([{key: value for key, value in PLAIN[0].items() if key != "gradient_norm"}])
    with pytest.raises(ValueError, match="between 0 and the samples"):
        repetition_rows([row("plain", 0, 0, 1001, 900)])
    with pytest.raises(ValueError, match="negatives looped"):
        repetition_rows([row("default", 0, 0, 1, 900, steered={"rows": 3, "looped": 4})])
    with pytest.raises(ValueError, match="no row of arm 'plain'"):
        repetition_report([*PLAIN[:3], *DEFAULT])
    with pytest.raises(ValueError, match='kind "repetition"'):
        repetition_report([{"kind": "switching"}])


WORLD = {
    "kind": "repetition",
    "cell": "rare",
    "base": 0,
    "parameters": 126624,
    "loss": 0.19,
    "own_loops": 49,
    "own_samples": 16000,
    "explained_variance": {"0": 0.97, "1": 0.94},
    "steering": {
        "window": {"layer": 1, "strength": 1.0, "own_looped": 0.49, "own_random": 0.01},
        "to_end": {"layer": 0, "strength": 0.5, "own_looped": 0.2, "own_random": 0.02},
        "window_means": {"layer": 1, "strength": 1.0, "own_looped": 0.49, "own_random": 0.01},
    },
    "way_in_use": {"window": "window", "to_end": "to_end", "window_means": "window"},
    "dose": {
        way: {
            "ranking": Table("Ranking", ["a"], [[1]]).to_dict(),
            "steering_curve": Table("Curve", ["b"], []).to_dict(),
        }
        for way in ("window", "to_end", "window_means")
    },
    "left_out": [],
}


def test_the_report_is_made_of_rows_alone(tmp_path: Path) -> None:
    rows = json.loads(json.dumps(to_json(ROWS)))
    other = [{**entry, "cell": "frequent"} for entry in (*PLAIN, *DEFAULT)]
    sections, tables = repetition_report([*rows, *other], [WORLD], {"rare": "Rare loops"})
    assert [section.title for section in sections] == ["Rare loops", "frequent"]
    assert list(tables) == ["rare:loops", "rare:against", "rare:effects", "rare:starts", "rare:runs",
                            "frequent:loops", "frequent:effects", "frequent:runs"]  # fmt: skip
    starts = dict(zip(tables["rare:starts"].columns, tables["rare:starts"].rows[0], strict=True))
    assert starts["features, in a window"] == "layer 1 at 1: 49 % against 1 %"
    assert starts["means, in a window"] == "nothing loops"
    assert [part.title for part in sections[0].sections] == [
        "What else changed", "Probes over updates", "Start checkpoints and dose curves", "Every run",
    ]  # fmt: skip
    assert len(sections[0].sections[2].tables) == 1 + 4
    page = write_html(tmp_path / "report.html", "Loops", sections).read_text(encoding="utf-8")
    assert page.count("<svg") == 2 * (2 + 3)
