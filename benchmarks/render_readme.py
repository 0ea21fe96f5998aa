"""Makes the README's tables of figures from the JSON files in `benchmarks/results/`.

    python benchmarks/render_readme.py                                        # rewrite the tables
    python benchmarks/render_readme.py --check                                # fail if they differ from the JSON
    python benchmarks/render_readme.py --keep runs/demo demo_generated        # first keep a demo's tables as JSON
    python benchmarks/render_readme.py --keep runs/experiments/steered_dapo_rare experiments/steered_dapo_rare

NAME is FILE or FILE:TABLE; of an experiment also FILE:verdicts, what its numbers allow to say, FILE:verdict_table, the
same in short, and FILE:made_on, where they were measured. A table stands between `<!-- begin NAME -->` and
`<!-- end NAME -->`; nothing between the two is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from experiments.rows import read_rows

from qscope_posttrain.report.summary import write_text
from qscope_posttrain.report.tables import Table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
LEFT_OUT = ("step, ms", "seconds")
"""Columns that are no result: methods run side by side on busy cores."""


def keep(folder: Path, name: str) -> None:
    """Copy settings, tables, versions and machine of a summary; samples and models stay where they are.

    Of an experiment also every run, what is known of its base models, and its curves as SVG files beside the JSON.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    kept = {key: summary[key] for key in ("command", "finished", "settings", "seeds", "versions", "machine")}
    kept["settings"] = {key: value for key, value in kept["settings"].items() if key not in ("cache", "no_cache")}
    if kept["settings"].get("corpus"):  # where it lay is nobody's business
        kept["settings"]["corpus"] = Path(kept["settings"]["corpus"]).name
    results = summary["results"]
    kept["tables"] = results["tables"] if "tables" in results else {"table": results["table"]}
    kept |= {key: results[key] for key in ("seconds", "verdict") if key in results}
    target = RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    if summary["command"] == "experiment":
        kept |= {key: summary["results"][key] for key in ("verdicts", "worlds")}
        runs = [{key: value for key, value in row.items() if key != "folder"} for row in read_rows(folder)]
        lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs)  # one run a line, for the diff's sake
        text = json.dumps(kept, indent=1, ensure_ascii=False)[:-2] + f',\n "runs": [\n{lines}\n ]\n}}'
        for figure in sorted((folder / "figures").glob("*.svg")):
            shutil.copyfile(figure, target.with_name(f"{target.stem}-{figure.name}"))
    write_text(target, text + "\n")


def render(name: str) -> str:
    """The Markdown that belongs between the markers of `name`."""
    source, _, part = name.partition(":")
    result = json.loads((RESULTS / f"{source}.json").read_text(encoding="utf-8"))
    if source == "encode":
        return _encode(result, part) + (_made_on(result) if part == "bf16" else "")
    if source == "sae_training":
        return _sae_training(result) + _made_on(result)
    if source == "analysis_pass":
        return _analysis_pass(result) + _made_on(result)
    if source.startswith("classifier_"):
        return _table(result["tables"][int(part)]) + _made_on(result)
    if source == "steering_curve":
        return _steering_curve(result) + _made_on(result)
    if source in ("sasft_overhead", "sasft_penalty", "steered_rollout", "decode", "read_rows"):
        return _table(result["table"]) + _made_on(result)
    if part == "verdicts":
        return "".join(f"- **{cell}**: {verdict}\n" for cell, verdict in result["verdicts"].items())
    if part == "verdict_table":
        return _table(result["tables"]["verdicts"])
    if part == "made_on":
        return _made_on(result)
    if source == "feature_pass":
        return _feature_pass(result) + _made_on(result)
    return _table(result["tables"][part]) + (_made_on(result) if part in ("teacher_forced", "negatives") else "")


def _table(table: dict[str, Any]) -> str:
    wanted = [index for index, column in enumerate(table["columns"]) if column not in LEFT_OUT]
    rows = [[row[index] for index in wanted] for row in table["rows"]]
    columns = [table["columns"][index] for index in wanted]
    return Table(table["title"], columns, rows, table.get("caption", "")).to_markdown()


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
        caption += f" Certified: {recomputed} of {settings['tokens']} rows done again in float32."
    return Table(title, columns, rows, caption).to_markdown()


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['lowest']:.2f} .. {values['highest']:.2f})"


def _sae_training(result: dict[str, Any]) -> str:
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
        f"On held-out activations: mean (least .. most) of {settings['seeds']} seeds. Tokens a second, ours over "
        f"sparsify's: {wall}, by processor time {cpu}, {settings['rounds']} interleaved rounds."
    )
    return Table(title, columns, rows, caption).to_markdown()


def _steering_curve(result: dict[str, Any]) -> str:
    table = result["tables"]["table"]
    rows = []
    for row in table["rows"]:
        kind, strength, effect, low, high, perplexity, least, most = row[:8]
        rows.append([kind, strength, f"{100 * effect:.1f} ({100 * low:.1f} .. {100 * high:.1f})",
                     f"{perplexity:.1f} ({least:.1f} .. {most:.1f})", row[-1]])  # fmt: skip
    columns = ["steered along", "strength", "effect, %", "perplexity", "perplexity of other text"]
    return Table(table["title"], columns, rows, table["caption"]).to_markdown()


def _analysis_pass(result: dict[str, Any]) -> str:
    settings = result["settings"]
    keys = ("texts", "tokens", "tokens_per_s", "tokens_per_cpu_s", "peak_mib")
    columns = ["texts", "tokens", "tokens a second", "a processor second", "peak, MiB"]
    title = (
        f"Features of every text: {settings['layers']} layers tapped, {settings['d_sae']} latents, k {settings['k']}"
    )
    caption = f"Each in a new process. The peak grows by {result['peak_growth_bytes_a_text']:.0f} bytes a text."
    rows = [[round(size[key]) for key in keys] for size in result["sizes"]]
    return Table(title, columns, rows, caption).to_markdown()


def _feature_pass(result: dict[str, Any]) -> str:
    settings, agreement = result["settings"], result["agreement"]
    rows = [
        [number, repeat["published_s"], repeat["ours_s"], repeat["ratio"], repeat["cpu_ratio"]]
        for number, repeat in enumerate(result["repeats"], 1)
    ]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    parser.add_argument("--keep", nargs=2, metavar=("FOLDER", "NAME"), help="keep the tables of a summary.json")
    arguments = parser.parse_args()
    if arguments.keep:
        keep(Path(arguments.keep[0]), arguments.keep[1])
    before = README.read_text(encoding="utf-8")
    block = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
    after = block.sub(lambda match: match[1] + render(match[2]) + match[3], before)
    if arguments.check:
        if before != after:
            print("README.md differs from benchmarks/results; run python benchmarks/render_readme.py", file=sys.stderr)
        return int(before != after)
    write_text(README, after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
