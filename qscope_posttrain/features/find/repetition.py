"""From a model, its SAEs and prompts to a FeatureSet: features of endless repetition, and how to steer with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import feature_set_from, features_from_rows
from qscope_posttrain.features.feature_set import REPETITION, FeatureSet
from qscope_posttrain.features.find.language import load_sae
from qscope_posttrain.features.find.loops import LoopCollection, collect_loops
from qscope_posttrain.features.find.repetition_choice import SteeringCurve
from qscope_posttrain.features.find.repetition_curve import CurveSettings
from qscope_posttrain.features.find.repetition_scan import Contrast, steering_curve
from qscope_posttrain.features.find.repetition_scores import (
    Ranking,
    rank_features,
    repetition_differences,
    repetition_gradients,
)
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.features.statistics import PassStatistics, collect_statistics
from qscope_posttrain.features.steering import SETTINGS_KEY
from qscope_posttrain.models.batches import Text
from qscope_posttrain.models.generation import Prompt, encode_prompts
from qscope_posttrain.models.layers import check_layers
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.sae.autoencoder import SAESource, SparseAutoencoder

LOOP, NORMAL, BENIGN = "loop", "normal", "benign"
DEFAULT_CURVE = CurveSettings()
COPIES = 2
"""Repeats whose probability the attribution is about."""


def find_repetition_features(
    model: nn.Module,
    tokenizer: Any,
    saes: Mapping[int, SparseAutoencoder | str | Path],
    prompts: Sequence[Prompt] | None = None,
    *,
    loops: LoopCollection | None = None,
    benign: Sequence[Text] | None = None,
    top: int = 4,
    rank_by: Ranking = "both",
    curve: CurveSettings | None = DEFAULT_CURVE,
    collect: Mapping[str, Any] | None = None,
    chat: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    k: int | None = None,
    saes_at_once: int | None = None,
    show_progress: bool | None = None,
    **statistics_options: Any,
) -> FeatureSet:
    """Find the features of endless repetition in every layer, and the direction that makes the model loop by itself.

    1. Loops: given, or sampled on `prompts` (`loops.collect_loops`).
    2. One pass over them, ordinary completions and `benign` text gives the firing rates: the classes "loop" (tokens
       of the repeated tail from its second copy on), "normal" (tokens of completions that ended by themselves) and
       "benign".
    3. Two scores for every feature: its rise from the first to the last occurrence of a token in the loop
       (`repetition.repetition_differences`, Qwen-Scope report 8.1), stored as `scores`, and the gradient of
       log P(two more repeats) along its decoder row (`repetition.repetition_gradients`), stored as `effects`, in nats
       per unit of the row. The `top` features of each layer become rows labelled "loop", best first.
    4. The steering curve (`repetition_scan.steering_curve`) tries them against random directions of equal length and
       the difference of means between "loop" and "normal", and chooses layer, rows, strength and window by
       `repetition_choice.choose`. Of the chosen layer only the chosen rows are kept, so that the set steers as chosen
       (`features.steering.feature_steering`).

    In `settings["steering"]`: what `SteeringCurve.to_settings` gives. A choice that is not clearly more than random
    comes with a warning and `specific` false; when nothing makes the model loop there is no such entry, and a warning.
    In `provenance`: "steering_curve" and "ranking" as `Table.to_dict`, "loops" with their number and rate.

    Args:
        model (nn.Module): Causal language model of transformers.
        tokenizer (PreTrainedTokenizerBase): Its tokenizer.
        saes (dict of int to SparseAutoencoder or path): {layer: SAE, or a source for `SparseAutoencoder.load`}, layers
            counted from 0.
        prompts (sequence, default None): For the curve, and to sample loops on; texts or chats (see
            `models.generation.generate_samples`).
        loops (LoopCollection, default None): Loops that are there already; None samples them.
        benign (sequence, default None): Texts that repeat for a good reason (lists, tables, copied questions): strings
            or token ids.
        top (int, default 4): Features per layer.
        rank_by (str, default "both"): "difference", "attribution", or "both" in turn, see `repetition.rank_features`.
        curve (CurveSettings, default `DEFAULT_CURVE`): Of the steering curve; None leaves it out.
        collect (dict, default None): Further arguments of `collect_loops`. It samples as `curve.sampling` says unless
            `settings` are given.
        chat (bool, default False): Send prompts through the chat template.
        chat_template_options (dict, default None): For the template, e.g. `{"enable_thinking": False}`.
        k (int, default None): Of TopK, for sources that do not say it.
        saes_at_once (int, default None): Maximum number of SAEs in memory, with one pass for each such group; None: all
            in one pass.
        show_progress (bool, default None): Show progress bars; None: on a terminal.
        statistics_options: see `statistics.collect_statistics`. `max_length` is by default that of the longest
            completion, because a loop is at the end of its text.

    Raises:
        ValueError: neither loops nor prompts, a curve without prompts, no ordinary completion, no layer, an SAE that
            does not fit the model; and what `collect_loops` raises when nothing loops.

    Example:
        >>> collect = {"settings": sampling, "wanted": 4}  # sampling: SamplingSettings
        >>> found = qp.find_repetition_features(
        ...     model, tokenizer, saes, prompts, top=1, rank_by="difference", curve=None, collect=collect
        ... )
        >>> found.languages
        ('loop', 'normal')
    """
    layers = check_layers(model, sorted(saes))
    if saes_at_once is not None and saes_at_once < 1:
        raise UserValueError(f"saes_at_once must be at least 1, got {saes_at_once}.")
    if prompts is None and (loops is None or curve is not None):
        raise UserValueError(
            "Prompts are needed: to sample loops on, where none are given, and for the steering curve."
        )
    templated: dict[str, Any] = {"chat": chat, "chat_template_options": chat_template_options}
    prompt_ids = encode_prompts(tokenizer, prompts, **templated) if prompts is not None else []
    if loops is None:
        options: dict[str, Any] = {"settings": curve.sampling} if curve is not None else {}
        options |= {**templated, "show_progress": show_progress, **(collect or {})}
        loops = collect_loops(model, tokenizer, prompts or [], **options)
    if not loops.loops or not loops.normal:
        raise UserValueError(
            f"Both loops and ordinary completions are needed; there are {len(loops.loops)} and {len(loops.normal)}. "
            "Ordinary ones end by themselves: raise max_new_tokens, or give some."
        )
    texts: dict[str, Sequence[Text]] = {
        LOOP: [loop.text() for loop in loops.loops],
        NORMAL: [entry.text() for entry in loops.normal],
    }
    if benign is not None:
        texts[BENIGN] = benign
    longest = max(len(entry.ids) for entry in (*loops.loops, *loops.normal))
    statistics_options = {"max_length": longest, "show_progress": show_progress, **statistics_options}

    size = saes_at_once or len(layers)
    groups = []
    for start in range(0, len(layers), size):
        group = {layer: load_sae(saes[layer], layer, k, model) for layer in layers[start : start + size]}
        groups.append(_rank(model, tokenizer, texts, loops, group, top, rank_by, statistics_options))
        del group  # the next group has the memory
    rows = {layer: kept for group in groups for layer, kept in group.rows.items()}
    counts = {layer: kept for group in groups for layer, kept in group.statistics.layers.items()}
    settings: dict[str, Any] = {"selector": REPETITION, "rank_by": rank_by, "top": top, "loops": dict(loops.settings)}
    sources = {layer: source for group in groups for layer, source in group.sources.items()}
    features = feature_set_from(replace(groups[0].statistics, layers=counts), rows, settings, sources)
    found = {"ranking": repetition_table(features).to_dict(), "loops": _describe(loops)}
    features = replace(features, provenance={**features.provenance, **found})
    if curve is None:
        return features
    contrast = Contrast(LOOP, features.language_index(LOOP), features.language_index(NORMAL))
    measured = steering_curve(
        model,
        tokenizer,
        prompt_ids,
        features,
        contrast,
        curve,
        periods=loops.periods,
        show_progress=show_progress,
    )
    return with_choice(features, measured)


def with_choice(features: FeatureSet, curve: SteeringCurve) -> FeatureSet:
    """The set with the curve in it; of the chosen layer only the chosen rows. A choice that is not specific is told."""
    settings = {**features.settings, "curve": asdict(curve.settings)}
    layers = dict(features.layers)
    chosen = curve.to_settings(LOOP)
    if curve.chosen is not None and chosen is not None:
        settings[SETTINGS_KEY] = chosen
        push = curve.chosen.trial.push
        layers[chosen["layer"]] = layers[chosen["layer"]].take(push.rows)
    if not curve.specific:
        status(f"warning: {curve.verdict()}", enabled=True)
    provenance = {**features.provenance, "steering_curve": curve.to_table().to_dict()}
    return replace(features, layers=layers, settings=settings, provenance=provenance)


def repetition_table(features: FeatureSet) -> Table:
    """One line per row labelled "loop": both scores and the firing rate in every class."""
    lines: list[list[Cell]] = []
    for layer, rows in features.layers.items():
        for i, label in enumerate(rows.labels):
            if label != LOOP:
                continue
            length = rows.residual_median_norm / float(rows.decoder[i].norm())
            rates = [float(rate) for rate in rows.firing_rate[:, i]]
            lines.append([layer, rows.names[i], float(rows.scores[i]), float(rows.effects[i]) * length, *rates])
    tokens = ", ".join(
        f"{name} {count}"
        for name, count in zip(features.languages, next(iter(features.layers.values())).tokens.tolist(), strict=True)
    )
    return Table(
        title=f"Features of endless repetition in {features.model.get('name_or_path') or features.model['model_type']}",
        columns=["layer", "feature", "rise", "attribution", *(f"fires in {name}" for name in features.languages)],
        rows=lines,
        caption="rise: mean activation at the last occurrence of a token in the loop minus its first one. attribution: "
        f"first-order change of log P({COPIES} more repeats), in nats, for a push of one median residual norm. fires: "
        f"share of tokens (counted: {tokens}).",
    )


@dataclass(frozen=True, eq=False)
class _Group:
    """What is kept of a group of layers when its SAEs and its sums are gone."""

    statistics: PassStatistics
    """Counts only"""
    rows: dict[int, LayerFeatures]
    sources: dict[int, SAESource]


def _rank(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[Text]],
    loops: LoopCollection,
    saes: Mapping[int, SparseAutoencoder],
    top: int,
    rank_by: Ranking,
    statistics_options: Mapping[str, Any],
) -> _Group:
    passed = collect_statistics(model, tokenizer, texts, saes, **statistics_options)
    factor = float(passed.settings["outlier_factor"])
    limits = {layer: factor * measured.median_norm for layer, measured in passed.layers.items()}
    shown: dict[str, Any] = {"show_progress": statistics_options.get("show_progress")}
    rises = repetition_differences(model, loops.loops, saes, limits, **shown)
    gradients = repetition_gradients(model, loops.loops, list(saes), copies=COPIES, **shown)
    rows = {}
    for layer, sae in saes.items():
        measured = passed.layers[layer]
        fires = measured.firing_rate[passed.languages.index(LOOP)] > 0
        effects = decoder_effects(sae, gradients[layer])
        norms = sae.W_dec.float().norm(dim=1).double().cpu()
        ids = rank_features(rises[layer], effects / norms.clamp_min(1e-12), fires, top, rank_by)
        names = [f"{LOOP} #{feature}" for feature in ids.tolist()]
        kept = features_from_rows(measured, sae.select(ids), [LOOP] * top, names, rises[layer][ids])
        rows[layer] = replace(kept, effects=effects[ids].float())
    counts = {layer: measured.counts_only() for layer, measured in passed.layers.items()}
    return _Group(replace(passed, layers=counts), rows, {layer: sae.source for layer, sae in saes.items()})


def decoder_effects(sae: SparseAutoencoder, gradient: Tensor) -> Tensor:
    """W_dec g for all features: [d_sae] fp64 from a gradient [d_model]."""
    return torch.cat([part.cpu().double() @ gradient for part in sae.W_dec.split(4096)])


def _describe(loops: LoopCollection) -> dict[str, Any]:
    rate = loops.rate
    return {
        "loops": len(loops.loops),
        "normal": len(loops.normal),
        "samples": loops.samples,
        "rate": None if rate is None else list(rate),
        "periods": [loop.tail.period for loop in loops.loops],
    }
