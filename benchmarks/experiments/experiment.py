"""One experiment as one command: run its grid, then put rows, tables, report and completions in a folder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.completions_page import write_completions_pages
from benchmarks.experiments.recipe import ExperimentRecipe, RepetitionCell, SwitchingCell
from benchmarks.experiments.repetition_grid import run_repetition_bases
from benchmarks.experiments.repetition_page import repetition_report
from benchmarks.experiments.rows import write_rows
from benchmarks.experiments.switching_grid import cell_jobs, run_switching_cell
from benchmarks.experiments.switching_page import switching_report
from qscope_posttrain.provenance import machine, package_versions
from qscope_posttrain.report.html import Figure, Section, write_html
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import writable_folder, write_summary, write_text
from qscope_posttrain.report.tables import Cell, Table

REPORT = "report.html"
PAGES = "completions"
FIGURES = "figures"


def run_experiment(recipe: ExperimentRecipe, output: str | Path) -> Path:
    """Run the grid and write `runs.jsonl`, `summary.json`, `report.html` and `completions/` into a folder.

    Runs that are in the cache are not repeated, so an experiment that was stopped goes on where it was; rows are
    written after every base model.

    Args:
        recipe: what to run.
        output: folder.

    Returns:
        The path of the report.

    Raises:
        ValueError: a folder that cannot be written, or settings that cannot work.
        FileNotFoundError: a corpus that is not there.
    """
    folder = writable_folder(output)
    grid_table(recipe).print()
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    worlds: list[dict[str, Any]] = []
    for cell in recipe.cells:
        for found, world in _run_cell(cell):
            rows += found
            worlds.append(world)
            write_rows(folder, rows)
    return write_report(recipe, rows, worlds, folder, time.monotonic() - started)


def write_report(
    recipe: ExperimentRecipe,
    rows: Sequence[Mapping[str, Any]],
    worlds: Sequence[Mapping[str, Any]],
    folder: Path,
    seconds: float,
) -> Path:
    """Tables, report and pages from the rows of an experiment."""
    titles = {cell.name: cell.title for cell in recipe.cells}
    build = switching_report if recipe.kind == "switching" else repetition_report
    sections, tables = build(rows, worlds, titles)
    for table in tables.values():
        table.print()
    _write_figures(sections, folder / FIGURES)
    pages = write_completions_pages(rows, folder / PAGES)
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    place = write_html(
        folder / REPORT,
        recipe.title,
        sections,
        recipe.question,
        {
            "time": f"{seconds:.0f} s (runs from the cache take none)",
            "runs": str(len(rows)),
            "completions at random": ", ".join(str(page.relative_to(folder)) for page in pages),
            "versions": versions,
            "machine": ", ".join(f"{name} {value}" for name, value in machine().items()),
        },
    )
    results = {"seconds": seconds, "runs": len(rows), "tables": tables, "worlds": worlds, "report": place}
    seeds = sorted({seed for cell in recipe.cells for seed in cell.seeds})
    write_summary(folder, "experiment", recipe.content, results, seeds)
    status(f"{seconds:.0f} s; the report is {place}")
    return place


def _write_figures(sections: Sequence[Section], folder: Path) -> None:
    """Every figure of the report as a file of its own, numbered in the order of the report."""
    figures = list(_figures(sections))
    if figures:
        writable_folder(folder)
    for number, figure in enumerate(figures, start=1):
        write_text(folder / f"{number}.svg", figure.svg)


def _figures(sections: Sequence[Section]) -> Iterator[Figure]:
    for section in sections:
        yield from section.figures
        yield from _figures(section.sections)


def grid_table(recipe: ExperimentRecipe) -> Table:
    """Return a table of the runs that the recipe asks for."""
    lines: list[list[Cell]] = []
    for cell in recipe.cells:
        if isinstance(cell, SwitchingCell):
            each = len(cell_jobs(cell))
            arms = ["sft", *(entry.arm.name for entry in cell.arms)]
        else:
            arms = list(dict.fromkeys(("plain", *cell.arms)))
            each = len(cell.seeds) * (1 + len(arms))
        bases, seeds = ", ".join(map(str, cell.bases)), ", ".join(map(str, cell.seeds))
        lines.append([cell.name, cell.title, bases, seeds, ", ".join(arms), each * len(cell.bases)])
    columns = ["cell", "what", "bases", "seeds", "arms", "runs"]
    return Table(f"Grid of {len(recipe.cells)} cells", columns, lines)


def _run_cell(cell: SwitchingCell | RepetitionCell) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    if isinstance(cell, SwitchingCell):
        return run_switching_cell(cell)
    return run_repetition_bases(cell.settings, cell.name, cell.bases, cell.arms, cell.seeds)
