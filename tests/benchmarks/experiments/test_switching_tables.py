"""Numbers, verdicts and tables of a cell, on rows that one can check by hand."""

from __future__ import annotations

import pytest
from synthetic_rows import switching_row

from benchmarks.experiments.cell_results import CellResult, cell_results
from benchmarks.experiments.switching_rows import switching_rows
from benchmarks.experiments.switching_tables import cell_tables, verdict_table


def cell(*rows: dict) -> CellResult:
    (result,) = cell_results(switching_rows(rows))
    return result


def one_base(base: int, sasft: float, token: float, **others) -> list[dict]:
    """SASFT and the token penalty with these hazards at exactly 1 %; SFT switches in 100 of 400 responses."""
    place = {"base": base, **others}
    return [
        switching_row(**place),
        switching_row("sasft_combined", 0.1, 1.0001, sasft, val=(0.9, sasft), target=60, **place),
        switching_row("token_penalty", 20.0, 1.0001, token, val=(0.9, token), target=45, **place),
        switching_row("random_features", 0.2, 0.3, 1.0, target=101, **place),
    ]


def three_bases(shift: float = 0.0) -> list[dict]:
    return [
        *one_base(0, 0.60, 0.50 + shift),
        *one_base(1, 0.61, 0.50 + shift),
        *one_base(2, 0.59, 0.50 + shift),
    ]


def verdict(*rows: dict) -> dict:
    """The line of the table of verdicts, by column."""
    table = verdict_table([cell(*rows)])
    return dict(zip(table.columns, table.rows[0], strict=True))


def test_the_table_names_the_outcome_and_the_difference():
    worse = verdict(*three_bases())
    assert worse["the SAE arm is"] == "worse"
    # -40, -39, -41 minus -50: 10, 11, 9; 4.30265 * 1 / sqrt(3) = 2.484.
    assert worse["difference"] == "+10.0 (+7.5 .. +12.5)"
    assert worse["best SAE arm, %"] == "SASFT, combined -40.0 (-42.5 .. -37.5)"
    assert verdict(*three_bases(0.3))["the SAE arm is"] == "better"
    assert verdict(*three_bases(0.1))["the SAE arm is"] == "no difference shown"


def test_one_run_shows_nothing():
    single = verdict(*one_base(0, 0.9, 0.1))
    assert (single["the SAE arm is"], single["goal met by"]) == ("no difference shown", "none")


def test_the_goal_needs_half_apart_and_cheap():
    # Token penalty: 45 of 100 left in every base, -55 %; SASFT -40 %. Both cost 1.0001 %: too much.
    rows = three_bases()
    assert verdict(*rows)["goal met by"] == "none"
    for row in rows:
        if row["arm"] == "token_penalty":
            row["metrics"]["test"]["masked_ppl"] = 20.0 * 1.009
    assert verdict(*rows)["goal met by"] == "token penalty"
    spread = [dict(row) for row in rows]
    for row, count in zip([row for row in spread if row["arm"] == "token_penalty"], (5, 10, 120), strict=True):
        row["sampled"] = {**row["sampled"], "target": count}
    # -95, -90, +20: mean -55 with an interval that holds 0.
    assert verdict(*spread)["goal met by"] == "none"


def test_arms_are_picked_on_validation_prompts():
    rows = three_bases()
    for row in rows:
        if row["arm"] == "sasft_combined":
            better = {"base": row["base"], "val": (0.9, 0.9)}  # best on test, worst on validation
            rows = [*rows, switching_row("sasft_decoder", 0.2, 1.0001, 0.05, **better)]
    result = cell(*rows)
    assert result.budgets[1.0].best_sae == "sasft_combined"
    assert result.sae_arms == ("sasft_decoder", "sasft_combined")


def test_cap_is_marked():
    result = cell(*three_bases())
    table = cell_tables(result)["equal_cost_1"]
    cap = {row[0]: row[table.columns.index("cap")] for row in table.rows}
    assert cap == {"SASFT, combined *": None, "token penalty": None, "random features": "cap, 3 of 3"}


def test_chosen_weights_table():
    rows = [*three_bases(), *(switching_row("base", base=base, target=120, any_script=140) for base in range(3))]
    table = cell_tables(cell(*rows), "Chinese")["chosen"]
    assert table.title == "Chinese: chosen weights, on test prompts"
    by_arm = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(by_arm) == ["base", "SFT", "SASFT, combined", "token penalty", "random features"]
    assert by_arm["token penalty"]["against SFT, %"] == "-55.0 (-55.0 .. -55.0)"
    assert by_arm["token penalty"]["hazard, %"] == "-50.0 (-50.0 .. -50.0)"
    assert by_arm["token penalty"]["zh ppl, %"] == "+2.0"
    assert by_arm["token penalty"]["expected, %"] == pytest.approx(15)
    # No spread between runs: Wilson limits of 300 of 1200.
    assert by_arm["SFT"]["switched, %"] == "25.0 (22.6 .. 27.5)"
    assert by_arm["base"]["any script, %"].startswith("35.0")
    assert by_arm["SFT"]["endless, %"] == 0


def test_sft_that_never_switches_leaves_the_change_open():
    rows = [switching_row(target=0), switching_row("token_penalty", 20.0, 0.5, 0.5, target=0)]
    result = cell(*rows)
    table = cell_tables(result)["chosen"]
    row = dict(zip(table.columns, table.rows[-1], strict=True))
    assert row["against SFT, %"] == "-"
    assert "SFT never switched" in table.caption
    # Wilson: 0 of 400 has the upper limit 3.8415 / 403.8415.
    assert row["switched, %"] == "0.0 (0.0 .. 1.0)"


def test_words_have_no_scripts_and_plain_perplexity():
    rows = [{**row, "identify": "words", "target": "fr"} for row in three_bases()]
    table = cell_tables(cell(*rows))["chosen"]
    assert not any("script" in column for column in table.columns)
    assert "fr ppl, %" in table.columns
    assert "rise of perplexity" in table.caption


def test_languages_without_penalty_are_named():
    rows = [{**row, "penalised": ["en"]} for row in three_bases()]
    for row in rows:
        if row["arm"] == "token_penalty":
            row["metrics"]["test"]["hz_by_language"] = {"en": 0.005, "ru": 0.009}
    table = cell_tables(cell(*rows))["languages"]
    assert table.columns == ("arm", "weight", "en, %", "ru (not penalised), %")
    token = next(row for row in table.rows if row[0] == "token penalty")
    assert token[2:] == ("-50.0 (-50.0 .. -50.0)", "-10.0 (-10.0 .. -10.0)")


def test_pairs_of_arms():
    table = cell_tables(cell(*three_bases()))["pairs"]
    assert table.columns == ("SAE arm", "token penalty", "random features")
    assert table.rows == (("SASFT, combined", "+10.0 (+7.5 .. +12.5) -", "-40.0 (-42.5 .. -37.5) +"),)


def test_every_run_is_listed_once():
    rows = three_bases()
    assert len(cell_tables(cell(*rows))["runs"].rows) == len(rows)


def test_verdicts_of_several_cells_and_without_sae_arms():
    rows = three_bases()
    others = [{**row, "cell": "ko"} for row in rows if not row["sae"]]
    results = cell_results(switching_rows([*rows, *others]))
    table = verdict_table(results, {"ko": "Korean"})
    assert [row[0] for row in table.rows] == ["zh", "Korean"]
    assert table.rows[0][4] == "worse"
    assert table.rows[1][1] is None
    assert "pairs" not in cell_tables(results[1])


def test_without_samples_only_the_hazard_speaks():
    rows = [{**row, "sampled": None} for row in three_bases()]
    result = cell(*rows)
    assert verdict(*rows)["the SAE arm is"] == "worse"
    columns = cell_tables(result)["equal_cost_1"].columns
    assert "sampled, %" not in columns


def test_a_cell_of_two_targets_is_refused():
    with pytest.raises(ValueError, match="mixes targets"):
        cell_results(switching_rows([switching_row(), switching_row(seed=2, target=3) | {"target": "ko"}]))
    with pytest.raises(ValueError, match="at least one budget"):
        cell_results(switching_rows([switching_row()]), budgets=())
