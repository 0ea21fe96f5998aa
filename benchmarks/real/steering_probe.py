"""The teacher-forced probe of study 4: what a direction does to two continuations of real beginnings, one of the target
and one of other text, and to plain text; and what each direction does where plain text costs the same."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.real.page import shown
from qscope_posttrain.features.build import difference_of_means
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.steering import feature_steering
from qscope_posttrain.intervals import bootstrap_over_prompts
from qscope_posttrain.models.layers import evaluation_mode
from qscope_posttrain.models.loading import load_model
from qscope_posttrain.models.steering import Steering, steer
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.summary import write_text
from qscope_posttrain.report.tables import Table
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

MEANS = "difference of means"
COST = 0.1
"""Nats per token that plain text loses where directions are compared"""
TOKENS = 8
"""Tokens of a continuation that the probe reads"""


@dataclass(frozen=True)
class Item:
    """One beginning, and two continuations: one of the target, one of other text; and a plain text, as beginning and
    continuation, that has nothing to do with either."""

    context: str
    target: str
    other: str
    plain: tuple[str, str]


Rows = Sequence[dict[str, Any]]
"""Of each layer, direction and strength: see `compare`"""


def probe_all(
    label: str,
    sign: int,
    items: Sequence[Item],
    options: argparse.Namespace,
    layers: Sequence[int],
    strengths: Sequence[float],
    features: FeatureSet,
    path: Path,
) -> list[dict[str, Any]]:
    """Every layer, direction and strength, of which those in the file were measured before; rows with intervals over
    items."""
    known = {key_of(row): row for row in json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}
    model, tokenizer = load_model(str(options.model), dtype="float32", device="cpu")
    batch = encode(tokenizer, items)
    rows: list[dict[str, Any]] = []
    with evaluation_mode(model):
        base = losses(model, batch)
        for layer in layers:
            sae = SparseAutoencoder.load(options.saes, layer=layer)
            one = feature_steering(features, layer=layer, label=label, strength=1.0, positions="all")
            for name, direction in directions(features, label, layer, sae).items():
                for strength in (sign * strength for strength in strengths):
                    about = {"layer": layer, "direction": name, "strength": strength}
                    if key_of(about) not in known:
                        status(f"probe of {label}: layer {layer}, {name}, {strength}")
                        steering = replace(one, direction=direction, strength=strength)
                        known[key_of(about)] = {**about, **compare(base, losses(model, batch, steering))}
                        write_text(path, json.dumps(list(known.values()), indent=1) + "\n")
                    rows.append(known[key_of(about)])
    return rows


def key_of(row: Mapping[str, Any]) -> tuple[int, str, float]:
    return row["layer"], row["direction"], row["strength"]


def directions(features: FeatureSet, label: str, layer: int, sae: SparseAutoencoder) -> dict[str, Tensor]:
    """The features together, the best one, the difference of means, and two random features of the SAE."""
    rows = features.layers[layer]
    both = feature_steering(features, layer=layer, label=label, strength=1.0)
    drawn = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(layer))[:2]
    return {
        "five features": both.direction,
        "best feature": rows.decoder[0],
        MEANS: difference_of_means(rows.mean_residual, features.language_index(label)),
        **{f"random {number}": row for number, row in enumerate(sae.select(drawn).decoder.float(), 1)},
    }


def encode(tokenizer: Any, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """[3 items, length] ids padded on the left, that end with `TOKENS` tokens of a continuation, and their mask."""
    pairs = [(item.context, item.target) for item in items] + [(item.context, item.other) for item in items]
    rows = []
    for context, text in [*pairs, *(item.plain for item in items)]:
        kept = tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS]
        rows.append([*tokenizer(context)["input_ids"], *kept])
        if len(kept) < TOKENS:
            raise ValueError(f"a continuation of fewer than {TOKENS} tokens: {text!r}")
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def losses(model: nn.Module, batch: tuple[Tensor, Tensor], steering: Steering | None = None) -> Tensor:
    """[items, 3]: mean loss per token of the two continuations, and of plain text."""
    ids, mask = batch
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    found = []
    with nullcontext() if steering is None else steer(model, steering):
        for part in torch.arange(len(ids)).split(16):
            logits = model(input_ids=ids[part], attention_mask=mask[part], position_ids=places[part], use_cache=False,
                           logits_to_keep=TOKENS + 1).logits[:, :-1]  # fmt: skip
            each = cross_entropy(logits.flatten(0, 1).float(), ids[part, -TOKENS:].flatten(), reduction="none")
            found.append(each.view(len(part), TOKENS).mean(dim=1))
    return torch.cat(found).view(3, -1).T.double()


def compare(base: Tensor, steered: Tensor) -> dict[str, Any]:
    """Changes against no steering, nats per token: of the log-probability of the target, of the other text and of plain
    text, and of the first less the second, the preference; 95 % bootstrap intervals over items. And those of each item.
    """
    gain = (base - steered).numpy()
    columns = dict(zip(("target", "other", "plain"), gain.T, strict=True)) | {"preference": gain[:, 0] - gain[:, 1]}
    found = {name: bootstrap_over_prompts(values[:, None].tolist(), 2000) for name, values in columns.items()}
    return {**found, "items": gain.round(4).tolist()}


def preference_at_cost(rows: Rows, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """[draws] change of the preference where plain text has lost `COST` nats per token, between the strengths of
    `rows`, those of one direction; at the greatest strength where it never lost so much. `weights` [draws, items]."""
    gains = np.array([row["items"] for row in sorted(rows, key=lambda row: abs(row["strength"]))])
    target, other, plain = (weights @ gains[:, :, column].T for column in range(3))
    start = np.zeros((len(weights), 1))
    costs = np.maximum.accumulate(np.hstack([start, -plain]), axis=1)
    preferences = np.hstack([start, target - other])
    return np.array([np.interp(COST, *draw) for draw in zip(costs, preferences, strict=True)])


def equal_cost_table(label: str, sign: int, rows: Rows) -> Table:
    """Each layer and direction at one cost, and its difference from the difference of means, over the same draws."""
    count = len(rows[0]["items"])
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=2000) / count
    weights = np.vstack([np.full(count, 1 / count), draws])
    cells = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        found = {}
        for name in dict.fromkeys(row["direction"] for row in rows):
            same = [row for row in rows if (row["layer"], row["direction"]) == (layer, name)]
            found[name] = preference_at_cost(same, weights)
        for name, values in found.items():
            against = values - found[MEANS]
            cells.append([layer, name, between(values), "-" if name == MEANS else between(against)])
    columns = ["layer", "steered along", f"{label} against other text", "against the difference of means"]
    caption = (
        f"Where plain text has lost {COST:g} nats per token ({100 * np.expm1(COST):.0f} % of perplexity), between the "
        "strengths that were measured; 95 % bootstrap intervals over beginnings."
    )
    title = f"{'Suppressing' if sign < 0 else 'Causing'} {label} at equal cost"
    return Table(title, columns, cells, caption)


def between(values: NDArray[np.float64]) -> str:
    """The first value, and the interval of the others."""
    return shown((values[0], *np.quantile(values[1:], [0.025, 0.975])), "+.2f")


def best_layer(rows: Rows, sign: int) -> int:
    """The layer at which the features change the preference most at equal cost."""
    own = [row for row in rows if row["direction"] == "five features"]
    weights = np.full((1, len(rows[0]["items"])), 1 / len(rows[0]["items"]))
    found = {
        layer: sign * float(preference_at_cost([row for row in own if row["layer"] == layer], weights)[0])
        for layer in dict.fromkeys(row["layer"] for row in own)
    }
    return max(found, key=lambda layer: found[layer])


def probe_table(label: str, sign: int, rows: Rows) -> Table:
    """Each layer, direction and strength."""
    cells = [
        [row["layer"], row["direction"], f"{row['strength']:g}",
         *(shown(row[name], "+.2f") for name in ("preference", "target")), f"{100 * np.expm1(-row['plain'][0]):+.1f}"]
        for row in rows
    ]  # fmt: skip
    columns = ["layer", "steered along", "strength", f"{label} against other text", f"log P({label})",
               "perplexity of plain text, %"]  # fmt: skip
    title = f"{'Suppressing' if sign < 0 else 'Causing'} {label}: teacher-forced"
    caption = (
        f"Changes against no steering over {TOKENS} tokens after {len(rows[0]['items'])} real beginnings, in nats per "
        "token; 95 % bootstrap intervals over beginnings. Directions of one layer and strength have equal length."
    )
    return Table(title, columns, cells, caption)
