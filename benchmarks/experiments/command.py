"""`qscope experiment`: a controlled experiment from a recipe, with its tables, curves and completions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qscope_posttrain.cli.parsing.parser import CommandParser
from qscope_posttrain.errors import require_extra


def run(arguments: Sequence[str]) -> int:
    """Run the grid of a recipe, print its tables, write everything into a folder, and return the exit status."""
    options = _parser().parse(arguments)
    require_extra("analysis", "report")  # their tests of significance use scipy
    from benchmarks.experiments.experiment import grid_table, run_experiment
    from benchmarks.experiments.recipe import load_recipe

    settings: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("workers", "cache", "device", "corpus")
        if getattr(options, name) is not None
    }
    if options.no_cache:
        settings["no_cache"] = True
    recipe = load_recipe(options.config, options.variant, settings)
    if options.cells:
        recipe = recipe.only(options.cells)
    if options.dry_run:
        grid_table(recipe).print()
        return 0
    name = Path(options.config).stem + (f"-{options.variant}" if options.variant else "")
    run_experiment(recipe, options.output or Path("runs") / "experiments" / name)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(prog="qscope experiment", description=__doc__)
    parser.add_argument(
        "--config", required=True, help="recipe (YAML), for example recipes/experiments/sasft_real_text.yaml"
    )
    parser.add_argument("--variant", help="variant of the recipe, such as small or gpu; by default none")
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="cells of the grid to run; by default all")
    parser.add_argument(
        "--output", help="folder for runs.jsonl, summary.json and report.html; by default runs/experiments/RECIPE"
    )
    parser.add_argument("--corpus", help="folder of <language>.txt, in place of the recipe's")
    parser.add_argument("--device", help="cpu, cuda or auto, in place of the recipe's")
    parser.add_argument(
        "--workers", type=int, help="number of parallel processes, one thread each; by default one per core"
    )
    parser.add_argument(
        "--cache", help="folder of cached artefacts and runs; by default ~/.cache/qscope_posttrain/testbed"
    )
    parser.add_argument("--no-cache", action="store_true", help="ignore the cache and run everything again")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe, show its grid, and stop")
    return parser
