"""`qscope synthesize` against a server on loopback: what comes out, and what through failures."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from endpoint_server import serving
from word_world import COOKING, WORDS, grammar

from qscope_posttrain.cli.main import main


@pytest.mark.promise("Synthesis keeps prompts that fire and nothing else")
def test_every_row_holds_its_feature_and_its_provenance(whole, rows_of):
    rows = rows_of(whole[0])
    assert len(rows) > 20
    for row in rows:
        (user,), (assistant,) = row["prompt"], row["completion"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        word = WORDS[row["feature"]]
        assert word in user["content"].split()[1:]
        assert row["explanation"] == f"the word {word}"
        assert row["activation"] == pytest.approx(2.0)
        assert (row["layer"], row["relevance"]) == (1, 0.9)
        assert row["kind"] == ("harmful" if "unsafe" in user["content"] else "benign")
        assert assistant["content"].startswith("i do not help" if row["kind"] == "harmful" else "here is how")
        assert bool(row["style"]) == (row["prompt_type"] == "adversarial")
        assert row["prompt_request"] != row["response_request"]
    assert {(row["prompt_type"], row["kind"]) for row in rows} == {
        (prompt_type, kind) for prompt_type in ("vanilla", "adversarial") for kind in ("harmful", "benign")
    }


def test_targets_are_the_relevant_ones_that_the_seed_data_misses(whole, rows_of):
    summary = json.loads((whole[0] / "summary.json").read_text())["results"]
    assert summary["targets"] == len(WORDS)
    relevance = (whole[0] / "relevance.csv").read_text().splitlines()[1:]
    assert len(relevance) == len(WORDS) + len(COOKING)
    features = {row["feature"] for row in rows_of(whole[0])}
    assert features
    assert not features & {0, 1, 2, 3}  # the seed data is full of these words
    assert len(features) + len(summary["no prompt fired"]) == summary["worked on"]


def test_the_comparison_says_what_was_measured_on_what(whole):
    found = json.loads((whole[0] / "summary.json").read_text())["results"]["tables"]
    tables = {table["title"]: table for table in found}
    table = tables["Coverage at equal requests"]
    assert table["columns"][:4] == ["strategy", "prompt requests", "tokens", "examples"]
    assert table["columns"][4:] == ["targets made for", "targets held out", "layer 0"]
    verified, everything, random, natural = table["rows"]
    assert (verified[0], everything[0]) == ("feature-driven, verified", "feature-driven, unfiltered")
    assert verified[1] == everything[1] == random[1]  # equal requests
    assert natural[1] is None
    assert verified[2] == 10 * verified[1]  # ten tokens a request, as the server counts
    assert natural[3] <= verified[1]
    assert float(verified[4].split("%")[0]) > float(random[4].split("%")[0])
    assert "by construction" in table["caption"]
    reached = tables["Coverage of all targets"]["rows"]
    assert reached[0][4] < reached[1][4]
    assert (whole[0] / "report.html").stat().st_size > 1000


def test_prompts_that_do_not_fire_are_kept_out_and_on_file(whole):
    prompts = [json.loads(line) for line in (whole[0] / "prompts.jsonl").read_text().splitlines()]
    made = [entry for entry in prompts if entry["strategy"] == "feature-driven"]
    for entry in made:
        assert entry["kept"] == (WORDS[entry["feature"]] in entry["prompt"].split()[1:])
    assert 0.5 < sum(entry["kept"] for entry in made) / len(made) < 0.95
    control = [entry for entry in prompts if entry["strategy"] == "random"]
    assert len(control) == len(made)
    assert not any(entry["kept"] or entry["feature"] for entry in control)


@pytest.mark.promise("An answer of an endpoint that was received is never lost nor asked for again")
def test_nothing_is_asked_twice(whole, rows_of, arguments):
    output, server = whole
    sent = len(server.requests)
    bodies = Counter(json.dumps(body, sort_keys=True) for body in server.requests)
    assert max(bodies.values()) == 1
    rows = rows_of(output)
    assert main(arguments(server, output)) == 0
    assert len(server.requests) == sent
    assert rows_of(output) == rows


@pytest.mark.promise("An answer of an endpoint that was received is never lost nor asked for again")
def test_failures_change_nothing(whole, rows_of, arguments, tmp_path):
    faults = [("status", (429, {"Retry-After": "0.05"})), ("ok", None), ("body", b'{"choices": [{'), ("drop", None)]
    faults += [("status", (503, {})), ("ok", None), ("slow", 2.5), ("body", b"<html>")]
    with serving(grammar, faults) as server:
        assert main(arguments(server, tmp_path)) == 0
        usage = json.loads((tmp_path / "summary.json").read_text())["results"]["usage with the control"]
        assert usage["failed"] == 6
        assert usage["sent"] == len(server.requests) == len(whole[1].requests) + 6
    assert rows_of(tmp_path, ids=False) == rows_of(whole[0], ids=False)


def test_a_budget_ends_the_run_with_what_is_done_and_a_larger_one_goes_on(whole, rows_of, arguments, tmp_path):
    with serving(grammar) as server:
        assert main(arguments(server, tmp_path, "--max-requests", "90", "--no-random-control")) == 0
        assert len(server.requests) <= 90
        part = json.loads((tmp_path / "summary.json").read_text())["results"]
        assert part["unfinished"]
        some = rows_of(tmp_path, ids=False)
        every = rows_of(whole[0], ids=False)
        assert 0 < len(some) < len(every)
        assert some == every[: len(some)]
        assert main(arguments(server, tmp_path)) == 0
        assert len(server.requests) == len(whole[1].requests)
        assert rows_of(tmp_path, ids=False) == every


def test_mistakes_are_one_line(arguments, tmp_path, capsys):
    with serving(grammar) as server:
        for more, words in (
            (["--tau", "0.95"], "highest is 0.9"),
            (["--held-out", "1"], "[0, 1)"),
            (["--max-requests", "3"], "max_requests=3"),
            (["--styles", "a", "--rounds", "0"], "rounds"),
            (["--relevance", str(tmp_path / "none.csv")], "none.csv"),
            (["--measure-layers", "1"], "must be others"),
            (["--measure-layers", "7"], "layers 0 to 1"),
        ):
            assert main(arguments(server, tmp_path / "out", *more)) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith("error: ")
            assert words in error
