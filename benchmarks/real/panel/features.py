"""The SAE features of every item, from one pass: `python -m benchmarks.real.panel.features`.

Three sets per item and layer: at the last token of the question (the report's form), at the last token of an ending
that all items share, and at any token of the question. Beside them the mean residual stream of each of the three.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from benchmarks.real.panel.items import ENDING, Item, benchmark_sets
from benchmarks.real.panel.likelihoods import LONGEST
from qscope_posttrain.analysis.benchmarks.feature_sets import ItemFeatures, fingerprints
from qscope_posttrain.analysis.benchmarks.items import plain_text
from qscope_posttrain.models.batches import TokenSequence, pad_token, token_batches
from qscope_posttrain.models.calibration import calibrate, calibration_sample, layer_rows
from qscope_posttrain.models.layers import evaluation_mode
from qscope_posttrain.models.loading import load_model
from qscope_posttrain.report.progress import progress
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

FORMS = ("last", "ending", "any")
"""Last token of the question, last token of the common ending, any token of the question"""
OUTLIER = 10.0
"""Times the median norm from which a token counts as an outlier and is left out, as in `qscope analyze`"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    model, tokenizer = load_model(str(options.model), dtype="float32", device="cpu")
    saes = {layer: SparseAutoencoder.load(options.saes, layer=layer) for layer in options.layers}
    items = [item for found in benchmark_sets(options.items).values() for item in found]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = read_features(model, tokenizer, items, saes)
    with options.output.open("wb") as stream:
        np.savez_compressed(stream, **found)
    return 0


@torch.no_grad()
def read_features(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    saes: Mapping[int, SparseAutoencoder],
    tokens_per_batch: int = 4096,
) -> dict[str, NDArray[Any]]:
    """{"LAYER/FORM/sizes": [items], "LAYER/FORM/indices": features of one item after another, "LAYER/FORM/residual":
    [items, d_model]}; as `collect_item_features`, for three forms at once. The first token never counts, nor do norm
    outliers."""
    ending = tokenizer(ENDING, add_special_tokens=False)["input_ids"]
    asked = [tokenizer(item.question)["input_ids"] for item in items]
    asked = [ids if len(ids) <= LONGEST else ids[:1] + ids[1 - LONGEST :] for ids in asked]
    sequences = [TokenSequence(0, row, (*ids, *ending), False) for row, ids in enumerate(asked)]
    layers, pad = sorted(saes), pad_token(tokenizer)
    parts: dict[str, list[Any]] = {f"{layer}/{form}": [None] * len(items) for layer in layers for form in FORMS}
    with evaluation_mode(model):
        sample = token_batches(calibration_sample(sequences)[0], tokens_per_batch, pad)
        medians = calibrate(model, layers, sample).medians
        for batch in progress(token_batches(sequences, tokens_per_batch, pad), description="features of each item"):
            counts = [sequence.counted for sequence in batch.sequences]
            for layer, rows, _ in layer_rows(model, layers, batch):
                values, indices = saes[layer].encode(rows)
                kept = rows.norm(dim=1) <= OUTLIER * medians[layer]
                fires = (values > 0) & kept[:, None]
                stop = 0
                for sequence, count in zip(batch.sequences, counts, strict=True):
                    start, stop = stop, stop + count
                    own = stop - len(ending)
                    for form, span in zip(FORMS, ((own - 1, own), (stop - 1, stop), (start, own)), strict=True):
                        at = slice(*span)
                        fired = indices[at][fires[at]].unique().numpy().astype(np.int32)
                        parts[f"{layer}/{form}"][sequence.text] = (fired, rows[at].mean(dim=0).numpy())
    found: dict[str, NDArray[Any]] = {}
    for key, rows_of in parts.items():
        found[f"{key}/sizes"] = np.array([len(fired) for fired, _ in rows_of])
        found[f"{key}/indices"] = np.concatenate([fired for fired, _ in rows_of])
        found[f"{key}/residual"] = np.stack([residual for _, residual in rows_of])
        found[f"{key}/width"] = np.array(saes[int(key.split("/")[0])].d_sae)
    return found


def by_benchmark(sets: Mapping[str, Sequence[Item]], sizes: NDArray[Any], indices: NDArray[Any], width: int) -> Any:
    """{benchmark: ItemFeatures} from what `read_features` returns of one layer and form."""
    stops = np.cumsum(sizes)
    fired = [indices[stop - size : stop].tolist() for stop, size in zip(stops, sizes, strict=True)]
    found, start = {}, 0
    for name, items in sets.items():
        texts = fingerprints([plain_text(item.question) for item in items])
        units = fingerprints([item.unit for item in items])
        found[name] = ItemFeatures.from_sets(name, fired[start : start + len(items)], width, texts, units)
        start += len(items)
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--saes", type=Path, required=True, help="folder of its SAEs")
    parser.add_argument("--layers", type=int, nargs="+", required=True, help="layers to read")
    parser.add_argument("--items", type=int, default=40, help="items of each benchmark at most (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="npz file of the features")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
