"""What `qscope analyze` reads: benchmarks, scores, and the features of every item."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_posttrain.cli.inputs import load_model, parse_layers
from qscope_posttrain.cli.options import add_model_options
from qscope_posttrain.cli.recipe_keys import as_text
from qscope_posttrain.errors import UserValueError, did_you_mean
from qscope_posttrain.recipe_file import read_yaml

if TYPE_CHECKING:
    from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures
    from qscope_posttrain.analysis.benchmarks.items import BenchmarkItems, ItemSource
    from qscope_posttrain.analysis.benchmarks.performance import ScoreTable

TOKENS = "tokens, no model"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of both commands."""
    add_model_options(parser)
    parser.add_argument("--sae", required=True, help="folder of layer files, file of one layer, or hub id of a release")
    parser.add_argument("--layers", nargs="+", required=True, help="numbers from 0, ranges such as 20-27, or all")
    parser.add_argument("--k", type=int, help="k of TopK, where neither file nor release name says it")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        required=True,
        help="a YAML file (see recipes/analysis), or NAME=SOURCE:FIELD for each; SOURCE is .jsonl, .csv or .tsv, also "
        "with .gz, a folder written by datasets, or a hub id; a template such as {question} may stand for FIELD",
    )
    parser.add_argument("--prompt", default="{text}", help="around every item; \\n is a line break")
    parser.add_argument("--pooling", choices=("last", "max", "mean"), default="last", help="which tokens count")
    parser.add_argument("--max-items", type=int, help="items of a benchmark at most, the first ones")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of an item at most; the end is kept")
    parser.add_argument("--tokens-per-batch", type=int, default=4096, help="tokens in one forward pass")
    parser.add_argument("--correctness", help="folder of <benchmark>.csv: a column a model, a row an item, 0 to 1")
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals")
    parser.add_argument("--output", required=True, help="folder for summary.json and report.html")
    parser.add_argument("--seed", type=int, default=0, help="of random subsets and permutations")


def read_benchmarks(options: argparse.Namespace) -> list[BenchmarkItems]:
    """The items of all benchmarks.

    Raises:
        FileNotFoundError, ValueError: as `items.read_items`, or a name given twice.
    """
    from qscope_posttrain.analysis.benchmarks.items import read_items

    sources = benchmark_sources(options.benchmarks, options.max_items)
    return [read_items(source, options.prompt.replace("\\n", "\n")) for source in sources]


def benchmark_sources(words: Sequence[str], limit: int | None = None) -> list[ItemSource]:
    """From NAME=SOURCE:FIELD words, or from a YAML file that maps names to the fields of `items.ItemSource`.

    Raises:
        FileNotFoundError: no such YAML file.
        ValueError: an unknown key, a word of another form, or a name given twice.
    """
    from qscope_posttrain.analysis.benchmarks.items import ItemSource

    if len(words) == 1 and Path(words[0]).suffix in (".yaml", ".yml"):
        entries, written = read_yaml(words[0]), read_yaml(words[0], as_written=True)
        sources = [_source(str(name), entry, written.get(str(name)), words[0]) for name, entry in entries.items()]
    else:
        sources = [ItemSource.parse(word) for word in words]
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise UserValueError(f"benchmarks need different names, got {', '.join(names)}.")
    return sources if limit is None else [source.limited(limit) for source in sources]


def read_performance(
    options: argparse.Namespace, benchmarks: Sequence[BenchmarkItems]
) -> tuple[dict[str, tuple[tuple[str, ...], Any]], ScoreTable | None]:
    """Per-item correctness by benchmark, none without `--correctness`; and the scores, from `--scores` or its means.

    Raises:
        FileNotFoundError, ValueError: no such file, one of another form, or not one row an item.
    """
    from qscope_posttrain.analysis.benchmarks.performance import read_correctness, read_scores, scores_of

    table = read_scores(options.scores) if getattr(options, "scores", None) else None
    if options.correctness is None:
        return {}, table
    found = read_correctness(options.correctness, [benchmark.name for benchmark in benchmarks])
    for benchmark in benchmarks:
        if benchmark.name in found and len(found[benchmark.name][1]) != len(benchmark.texts):
            raise UserValueError(
                f"{options.correctness}/{benchmark.name}.csv has {len(found[benchmark.name][1])} items, the benchmark "
                f"{len(benchmark.texts)}: they must be the same, in the same order."
            )
    return found, table or scores_of(found)


def collect(
    options: argparse.Namespace, benchmarks: Sequence[BenchmarkItems], token_control: bool = False
) -> tuple[dict[int | str, list[ItemFeatures]], dict[str, Any]]:
    """Feature sets by layer, with `token_control` also those of token ids; and where all of it came from."""
    from qscope_posttrain.analysis.benchmarks.feature_sets import collect_item_features, token_sets
    from qscope_posttrain.models.layers import decoder_layers
    from qscope_posttrain.provenance import model_shape, text_fingerprint
    from qscope_posttrain.sae.autoencoder import SparseAutoencoder

    model, tokenizer = load_model(options.model, options.revision, options.dtype, options.device)
    layers = parse_layers(options.layers, len(decoder_layers(model)))
    identity = model_shape(model)
    saes = {
        layer: SparseAutoencoder.load(options.sae, layer=layer, k=options.k, d_model=identity["hidden_size"]).to(
            device=model.device
        )
        for layer in layers
    }
    features = collect_item_features(
        model,
        tokenizer,
        benchmarks,
        saes,
        pooling=options.pooling,
        max_length=options.max_length,
        tokens_per_batch=options.tokens_per_batch,
    )
    found: dict[int | str, list[ItemFeatures]] = dict(features.items())
    if token_control:
        found[TOKENS] = token_sets(tokenizer, benchmarks)
    facts = {
        "model": identity,
        "saes": {str(layer): str(sae.source) for layer, sae in saes.items()},
        "benchmarks": {
            entry.name: {
                "source": entry.source,
                "items": len(entry.texts),
                "sha256": text_fingerprint({entry.name: entry.texts}),
            }
            for entry in benchmarks
        },
        "prompt": options.prompt,
    }
    return found, facts


def _source(name: str, entry: Any, written: Any, path: str) -> ItemSource:
    from qscope_posttrain.analysis.benchmarks.items import ItemSource

    if not isinstance(entry, dict):
        raise UserValueError(f"{path}: '{name}' must map keys such as source and field to values, got {entry!r}.")
    known = [item.name for item in fields(ItemSource) if item.name != "name"]
    for key in entry:
        if key not in known:
            raise UserValueError(f"{path}: unknown key '{key}' of '{name}'.{did_you_mean(str(key), known)}")
    if "source" not in entry:
        raise UserValueError(f"{path}: '{name}' has no source.")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key in ("first", "limit"):
            if not isinstance(value, int) or isinstance(value, bool):
                raise UserValueError(f"{path}: {key} of '{name}' must be a whole number, got {value!r}.")
            values[key] = value
        elif not isinstance(value, str | int | float):
            raise UserValueError(f"{path}: {key} of '{name}' must be text, got {value!r}.")
        else:
            values[key] = written.get(key, as_text(value)) if isinstance(written, dict) else as_text(value)
    return ItemSource(name=name, **values)
