"""Make the tables of figures in README.md and docs/ from the JSON files in `benchmarks/results/`.

    python -m benchmarks.render_docs                                        # rewrite the tables
    python -m benchmarks.render_docs --check                                # fail if they differ from the JSON
    python -m benchmarks.render_docs --keep runs/demo demo_generated        # first keep a demo's tables as JSON
    python -m benchmarks.render_docs --keep runs/experiments/steered_dapo_rare experiments/steered_dapo_rare

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; nothing between the two is written by hand. NAME
is FILE, FILE:TABLE or FILE:made_on (versions and machine), `real_headline`, the README's table, `headline`, that of
tiny models, `commits`, `real_costs`, or `promises`, those of the tests (see verification.py). VIEWS says which columns
of a table are shown, under which names; the JSON files hold all of them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks import verification
from benchmarks.real import page
from qscope_posttrain.report.tables import Table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SWITCHING, LOOPS = "experiments/sasft_real_text", "experiments/steered_dapo_rare"


@dataclass(frozen=True)
class View:
    """The part of a table that a page shows."""

    columns: dict[str, str]
    """Column of the JSON file -> its name on the page; ' ppl, %' stands for any column that ends so"""
    caption: str = ""
    without: tuple[str, ...] = ()
    """Rows to leave out, by their first cell"""
    title: str | None = None


VIEWS = {
    "experiments/sasft_*/chosen": View(
        {
            "arm": "method",
            "weight": "weight",
            "against SFT, %": "sampled switching, %",
            "hazard, %": "hazard, %",
            "cost, %": "perplexity, %",
            " ppl, %": "perplexity of {}, %",
        },
        without=("SFT",),
    ),
    "experiments/sasft_real_text:verdicts": View(
        {
            "cell": "setting",
            "best SAE arm, %": "best SAE method",
            "best control, %": "best control",
            "difference": "difference, points",
        },
        "Change of the hazard in % at 1 % of perplexity. Difference below 0: the SAE method switches less. Settings "
        "without an interval have one base model.",
        title="The best SAE method and the best control in other settings",
    ),
    "experiments/steered_dapo_*:loops": View(
        {
            "method": "method",
            "loops": "loops",
            "times DAPO's": "times DAPO's",
            "right, %": "right, %",
            "against DAPO, points": "accuracy against DAPO, points",
        },
    ),
    "experiments/steered_dapo_*:against": View(
        {"methods": "methods", "loops": "loops", "ratio": "ratio", "accuracy, points": "accuracy, points"},
    ),
    "classifier_*:0": View(
        {"method": "method", "F1": "F1", "against the probe": "F1 against the probe", "AUROC": "AUROC"},
        without=("OR, layer by validation", "OR, one feature a layer", "votes", "length", "majority class"),
    ),
    "classifier_*:1": View(
        {"method": "method", "F1": "F1", "AUROC": "AUROC"},
    ),
    "demo_react_docs:causal_check": View(
        {
            "intervention": "intervention",
            "direction": "direction",
            "P, %": "P(Chinese), %",
            "95 %": "95 %",
            "ppl, %": "perplexity, %",
        },
        "Relative change against no intervention on 100 texts in other languages; bootstrap interval over texts, for "
        "the random features their range. Shifts have a tenth of the median residual norm.",
        title="What single Chinese features do, layer 3",
    ),
    "sasft_penalty": View(
        {"variant": "form", "share, %": "share of a step, %", "lowest": "lowest", "highest": "highest"},
        "Forward and backward of the penalty over those of the model; 4 alternating rounds, processor time.",
        without=("8 features x 2 layers, decoder",),
    ),
    "feature_drift": View(
        {
            "model": "model",
            "displacement": "displacement",
            "explained variance, %": "SAE explains, %",
            "agreement of embeddings": "embeddings agree",
        },
        "Last layer of the switching task's model, 200 held-out windows; 50 steps of fine-tuning. Made by "
        "`benchmarks/feature_drift.py`.",
    ),
    "sasft_overhead": View(
        {
            "variant": "form",
            "time ratio": "time",
            "processor time ratio": "processor time",
            "memory ratio": "peak memory",
        },
        "Ratios to plain SFT; medians over 8 paired rounds with 95 % bootstrap intervals.",
        without=("8 features x 2 layers, decoder",),
    ),
    "decode": View(
        {
            "way": "operator",
            "times ours": "time / ours",
            "lowest": "lowest",
            "highest": "highest",
            "extra memory, MiB": "extra memory, MiB",
        },
        "Median, lowest and highest of 5 rounds, processor time.",
    ),
}


def pages() -> Iterator[Path]:
    """README.md and every page of docs/."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def keep(folder: Path, name: str) -> None:
    """Copy settings, tables, versions and machine of a summary; samples and models stay where they are.

    Of an experiment also every run, what is known of its base models, and its curves as SVG files beside the JSON.
    """
    from benchmarks.interleaved import commit  # which imports torch

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    kept = {key: summary[key] for key in ("command", "finished", "settings", "seeds", "versions", "machine")}
    kept["settings"] = {key: value for key, value in kept["settings"].items() if key not in ("cache", "no_cache")}
    if kept["settings"].get("corpus"):  # where it lay is nobody's business
        kept["settings"]["corpus"] = Path(kept["settings"]["corpus"]).name
    results = summary["results"]
    kept["commit"] = commit()
    kept["tables"] = results["tables"] if "tables" in results else {"table": results["table"]}
    kept |= {key: results[key] for key in ("seconds", "verdict") if key in results}
    target = RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    if summary["command"] == "experiment":
        from benchmarks.experiments.rows import read_rows

        kept["worlds"] = summary["results"]["worlds"]
        runs = [{key: value for key, value in row.items() if key != "folder"} for row in read_rows(folder)]
        lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs)  # one run a line, for the diff's sake
        text = json.dumps(kept, indent=1, ensure_ascii=False)[:-2] + f',\n "runs": [\n{lines}\n ]\n}}'
        for figure in sorted((folder / "figures").glob("*.svg")):
            shutil.copyfile(figure, target.with_name(f"{target.stem}-{figure.name}"))
    target.write_text(text + "\n", encoding="utf-8")


def render(name: str) -> str:
    """The Markdown that belongs between the markers of `name`."""
    if name == "headline":
        return _headline()
    if name == "commits":
        return _commits()
    if name == "promises":
        return verification.table()
    if name == "real_costs":
        return page.costs(RESULTS / "real")
    if name == "real_saes":
        return page.saes(RESULTS / "real")
    if name == "real_headline":
        return page.headline(RESULTS / "real")
    source, _, part = name.partition(":")
    result = _read(source)
    if part == "made_on":
        return _made_on(result)
    if source in _OWN:
        return _OWN[source](result, part)
    tables = result.get("tables")
    table = result["table"] if tables is None else tables[int(part) if isinstance(tables, list) else part]
    return _table(name, table)


def _read(source: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{source}.json").read_text(encoding="utf-8"))
    return result


def _table(name: str, table: dict[str, Any]) -> str:
    view = next((view for pattern, view in VIEWS.items() if fnmatch(name, pattern)), None)
    if view is None:
        return Table(table["title"], table["columns"], table["rows"], table.get("caption", "")).to_markdown()
    kept, columns = [], []
    for index, column in enumerate(table["columns"]):
        if column in view.columns:
            kept.append(index)
            columns.append(view.columns[column])
        elif column.endswith(" ppl, %") and " ppl, %" in view.columns:
            kept.append(index)
            columns.append(view.columns[" ppl, %"].format(column.removesuffix(" ppl, %")))
    rows = [[row[index] for index in kept] for row in table["rows"] if row[0] not in view.without]
    return Table(view.title or table["title"], columns, rows, view.caption).to_markdown()


def _headline() -> str:
    """Gain and cost of each method: one row per method, from the chosen weights and the rare loops."""
    real, none, rare = (_read(name)["tables"] for name in (SWITCHING, "experiments/sasft_no_token_list", LOOPS))
    chinese, french = "SFT: Chinese in text of 4 other languages", "SFT: French in English text"
    rows: list[list[Any]] = []
    for setting, table, arm, method, sae in (
        (chinese, real["zh_anchor/chosen"], "token penalty + anchor", "token penalty, KL anchor", "no"),
        (chinese, real["zh/chosen"], "token penalty", "token penalty", "no"),
        (chinese, real["zh/chosen"], "SASFT, one readout", "SASFT", "yes"),
        (chinese, real["zh/chosen"], "SASFT, paper", "SASFT, the paper's form", "yes"),
        (chinese, real["zh/chosen"], "difference of means", "SASFT along a difference of means", "no"),
        (chinese, real["zh/chosen"], "random features", "control: random features", "yes"),
        (french, none["french/chosen"], "SASFT, one readout", "SASFT", "yes"),
        (french, none["french/chosen"], "difference of means", "SASFT along a difference of means", "no"),
        (french, none["french/chosen"], "token penalty (!)", "token penalty, learned list of tokens", "no"),
    ):
        row = _row(table, arm)
        change, cost = (page.with_unit(row[name], "%") for name in ("against SFT, %", "cost, %"))
        rows.append([setting, method, sae, change, f"perplexity {cost}"])
    loops = "GRPO: endless loops in arithmetic"
    for arm, method, sae in (
        ("seeded, default", "seeded negative", "no"),
        ("steered, default", "steered negative", "yes"),
        ("steered, paper", "steered negative, the report's form", "yes"),
        ("random, default", "control: steered at random", "no"),
    ):
        row = _row(rare["rare:loops"], arm)
        times = [
            100 * (float(number) - 1)
            for number in re.findall(r"[\d.]+(?:e-?\d+)?", row["times DAPO's"].replace("..", " "))
        ]
        change = page.with_unit(page.shown(times, "+.1f"), "%")
        accuracy = page.with_unit(row["against DAPO, points"], "points")
        rows.append([loops, method, sae, change, f"accuracy {accuracy}"])
    page.said_once(rows)
    columns = ["trainer and failure", "method", "SAE", "failures against the plain trainer", "cost"]
    return Table("", columns, rows).to_markdown()


def _commits() -> str:
    """The commit that measured, or first kept, the figures of each file that a page shows, and what today's would be.

    A file kept by --keep names its commit; for the others commits.json does."""
    begin = re.compile(r"^<!-- begin ([^\s:]+)", re.MULTILINE)
    shown = {name for path in pages() for name in begin.findall(path.read_text(encoding="utf-8"))}
    older = _read("commits")
    rows = []
    for name in sorted(name for name in shown - {"commits"} if (RESULTS / f"{name}.json").is_file()):
        commit = _read(name).get("commit")
        known = {"commit": commit, "since": ""} if commit else older[name]
        rows.append([f"benchmarks/results/{name}.json", f"`{known['commit']}`", known["since"] or None])
    return Table("", ["figures", "measured or kept at", "known to differ today"], rows).to_markdown()


def _row(table: dict[str, Any], first: str) -> dict[str, Any]:
    row = next(row for row in table["rows"] if row[0] == first)
    return dict(zip(table["columns"], row, strict=True))


def _redundancy(result: dict[str, Any], part: str) -> str:
    rows = []
    for row in result["results"][part]["redundancy"]:
        rows.append(
            [
                row["name"],
                row["items"],
                row["features"],
                _interval(row["r_hat"]),
                _interval(row["r_hat_matched"]),
                row["items_for_90"],
            ]
        )
    matched = result["results"][part]["redundancy"][0]["matched_size"]
    columns = ["benchmark", "items", "features", "R-hat", f"R-hat at {matched} items", "items for 90 % of the features"]
    caption = "95 % jackknife intervals over items."
    return Table("Redundancy of six benchmarks, layer 2", columns, rows, caption).to_markdown()


def _overlap(result: dict[str, Any], _part: str) -> str:
    """Overlap at equal size: the items as they are, with a common ending, and token ids in the place of features."""
    common = _read("real_benchmarks/common_ending")
    sources = [result["results"]["layer_2"], common["results"]["layer_2"], result["results"]["tokens"]]
    key = "overlap_min_at_equal_size"
    itself = [_interval(source["with_itself_at_equal_size"]["gsm8k"]["overlap_min"]) for source in sources]
    rows = [["gsm8k and itself", *itself]]
    for other in ("mgsm-en", "mgsm-fr", "mgsm-ru", "mgsm-zh", "humaneval"):
        pairs = [
            next(pair for pair in source["pairs"] if {pair["first"], pair["second"]} == {"gsm8k", other})
            for source in sources
        ]
        rows.append([f"gsm8k and {other}", *(_interval(pair[key]) for pair in pairs)])
    columns = ["overlap at equal size", "features, last token", "features, common ending", "token ids, no model"]
    caption = (
        f"{sources[0]['size']} items each, layer 2; itself: two disjoint parts. 95 % jackknife intervals over items."
    )
    return Table("Overlap of benchmarks", columns, rows, caption).to_markdown()


def _interval(value: dict[str, float]) -> str:
    return f"{value['estimate']:.2f} ({value['low']:.2f} .. {value['high']:.2f})"


def _agreement(result: dict[str, Any], _part: str) -> str:
    rows = []
    for entry in result["results"]["layer_2"]["agreement"]:
        found = entry["correlation"]
        if found["kind"] == "pearson":
            rows.append(
                [entry["predictor"], entry["target"], _interval({"estimate": found["value"], **found}), found["p"]]
            )
    columns = ["from", "with", "Pearson correlation", "p"]
    return Table(
        "Do features predict performance? Six small models, eleven sets of items",
        columns,
        rows,
        "p by permuting benchmarks, intervals by bootstrap over benchmarks.",
    ).to_markdown()


def _encode(result: dict[str, Any], precision: str) -> str:
    settings, found = result["settings"], result[precision]
    peers = [name for name in found if not name.startswith(("ours", "product"))]
    fastest = min(peers, key=lambda name: found[name]["cpu_s"]["median"])
    rows: list[list[Any]] = []
    for name, row in found.items():
        faster = row.get("times_faster_than", {}).get(fastest)
        ratios = [_spread(faster[clock]) if faster else None for clock in ("wall", "cpu")]
        memory = result.get("extra_memory_mb", {}).get(name)
        label = "matrix product alone" if name.startswith("product") else name
        rows.append([label, *ratios, row.get("recall"), None if memory is None else round(memory)])
    title = (
        f"Encode in {precision}: {settings['tokens']} tokens, {settings['d_model']} x {settings['d_sae']}, "
        f"k {settings['k']}, {settings['threads']} threads"
    )
    columns = ["encoder", f"times faster than {fastest}", "by processor time", "recall", "extra memory, MB"]
    recomputed = found.get("ours certified", {}).get("recomputed_rows")
    caption = f"Median (lowest .. highest) of {settings['rounds']} interleaved rounds; recall against float64."
    if recomputed is not None:
        caption += f" Certified: {recomputed} of {settings['tokens']} rows recomputed in float32."
    return Table(title, columns, rows, caption).to_markdown()


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['lowest']:.2f} .. {values['highest']:.2f})"


def _sae_training(result: dict[str, Any], _part: str) -> str:
    settings, memory = result["settings"], result["added_memory_mib"]
    rates = list(dict.fromkeys(row["rate"] for row in result["fvu"]))
    rows: list[list[Any]] = []
    for name, added in memory.items():
        own = {row["rate"]: row for row in result["fvu"] if row["trainer"] == name}
        fvu = [f"{own[rate]['fvu']:.4f} ({own[rate]['least']:.4f} .. {own[rate]['most']:.4f})" for rate in rates]
        rows.append([name, *fvu, round(added)])
    faster = result["speed"]["times_faster"]
    wall, cpu = (f"{f['median']:.2f} ({f['least']:.2f} .. {f['most']:.2f})" for f in (faster["wall"], faster["cpu"]))
    title = (
        f"Training a TopK SAE, ours and sparsify's own trainer: width {settings['width']}, k {settings['k']}, "
        f"{settings['steps']} updates of {settings['batch']} tokens, {settings['threads']} threads"
    )
    columns = ["trainer", *(f"unexplained variance, rate {rate:g}" for rate in rates), "added memory, MiB"]
    caption = (
        f"On held-out activations: mean (least .. most) of {settings['seeds']} seeds. Tokens per second, ours over "
        f"sparsify's: {wall}, by processor time {cpu}, {settings['rounds']} interleaved rounds."
    )
    return Table(title, columns, rows, caption).to_markdown()


def _steering_curve(result: dict[str, Any], part: str) -> str:
    table = result["tables"][part or "table"]
    if not part.endswith("_curve") and part:  # of a study that has other tables too
        return Table(**table).to_markdown()
    rows = []
    for row in table["rows"]:
        kind, strength, effect, low, high, perplexity, least, most = row[:8]
        rows.append([kind, strength, f"{100 * effect:.1f} ({100 * low:.1f} .. {100 * high:.1f})",
                     f"{perplexity:.1f} ({least:.1f} .. {most:.1f})", row[-1]])  # fmt: skip
    columns = ["steered along", "strength", "effect, %", "perplexity", "perplexity of other text"]
    return Table(table["title"], columns, rows, table["caption"]).to_markdown()


def _analysis_pass(result: dict[str, Any], _part: str) -> str:
    settings = result["settings"]
    keys = ("texts", "tokens", "tokens_per_s", "tokens_per_cpu_s", "peak_mib")
    columns = ["texts", "tokens", "tokens per second", "per processor second", "peak, MiB"]
    title = (
        f"Features of every text: {settings['layers']} layers tapped, {settings['d_sae']} latents, k {settings['k']}"
    )
    caption = f"Each in a new process. The peak grows by {result['peak_growth_bytes_a_text']:.0f} bytes per text."
    rows = [[round(size[key]) for key in keys] for size in result["sizes"]]
    return Table(title, columns, rows, caption).to_markdown()


def _feature_pass(result: dict[str, Any], _part: str) -> str:
    settings, agreement = result["settings"], result["agreement"]
    rows = [
        [number, repeat["published_s"], repeat["ours_s"], repeat["ratio"], repeat["cpu_ratio"]]
        for number, repeat in enumerate(result["repeats"], 1)
    ]
    if len(rows) > 1:
        rows.append(["median", None, None, result["ratio"]["median"], result["cpu_ratio"]["median"]])
    caption = (
        f"{settings['layers']} layers, hidden {settings['hidden']}, {settings['d_sae']} latents, "
        f"{settings['tokens']} tokens ({settings['text']}). Same features chosen: {agreement['same_features']} of "
        f"{agreement['chosen_features']}; largest relative difference of a mean "
        f"{agreement['largest_difference_of_mean_activation']:.1e}."
    )
    title = "Statistics of all layers: one pass against the published procedure"
    columns = ["repeat", "published, s", "one pass, s", "ratio", "ratio of processor time"]
    return Table(title, columns, rows, caption).to_markdown()


def _made_on(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    accelerator = "" if machine.get("accelerator", "none") == "none" else f", {machine['accelerator']}"
    return (
        f"\nMeasured on {machine['cpus']} shared CPU cores ({machine['architecture']}){accelerator}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}, trl {versions['trl']}.\n"
    )


def _scaling_features(result: dict[str, Any], _part: str) -> str:
    """Cost and memory, million by million."""
    names = {
        "million": "million",
        "relative_cost": "processor time per token, relative",
        "tokens_per_processor_s": "tokens per processor second",
        "resident_mib": "resident memory, MiB",
    }
    rows = [[block[name] for name in names] for block in result["blocks"]]
    ratio = result["cost_last_to_first"]
    title = f"The feature pass over {result['tokens_counted']:,} tokens"
    caption = (
        f"Time per token of the last million to the first: {ratio['ratio']:.3f} ({ratio['low']:.3f} to "
        f"{ratio['high']:.3f}, 95 % bootstrap over tenths). Relative: to a fixed batch read between the others."
    )
    return Table(title, list(names.values()), rows, caption).to_markdown()


def _scaling_rows(result: dict[str, Any], _part: str) -> str:
    """Seconds and memory until the first step of `qscope sft`."""
    rows = []
    for run in result["runs"]:
        begun, gave_up = run["first_step_s"], run["given_up_after_s"]
        first = f"{run['first_step_processor_s']:.0f}" if begun else f"not within {run['first_step_processor_s']:.0f}"
        wall = f"{begun:.0f}" if begun else f"given up after {gave_up:.0f}"
        highest = run["highest_mib_at_first_step"] or run["highest_mib"]
        rows.append([f"{run['rows']:,}", "yes" if run["streamed"] else "no", first, wall, round(highest)])
    columns = ["rows", "streamed", "processor seconds to the first step", "seconds", "peak memory, MiB"]
    return Table("`qscope sft` on a JSONL file, until its first step", columns, rows).to_markdown()


_OWN = {
    "scaling_features": _scaling_features,
    "scaling_rows": _scaling_rows,
    "encode": _encode,
    "sae_training": _sae_training,
    "steering_curve": _steering_curve,
    "real/smollm2_steering": _steering_curve,
    "real/gemma3_steering": _steering_curve,
    "analysis_pass": _analysis_pass,
    "feature_pass": _feature_pass,
    "real_benchmarks/coverage": _redundancy,
    "real_benchmarks/as_they_are": _overlap,
    "real_benchmarks/similarity": _agreement,
}
"""Results whose tables are made here from their numbers."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    parser.add_argument("--keep", nargs=2, metavar=("FOLDER", "NAME"), help="keep the tables of a summary.json")
    arguments = parser.parse_args()
    if arguments.keep:
        keep(Path(arguments.keep[0]), arguments.keep[1])
    block = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
    differ = False
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = block.sub(lambda match: match[1] + render(match[2]) + match[3], before)
        if before == after:
            continue
        differ = True
        if arguments.check:
            name = path.relative_to(ROOT)
            print(f"{name}: not what JSON files and tests say; run python -m benchmarks.render_docs", file=sys.stderr)
        else:
            path.write_text(after, encoding="utf-8")
    return int(differ and arguments.check)


if __name__ == "__main__":
    raise SystemExit(main())
