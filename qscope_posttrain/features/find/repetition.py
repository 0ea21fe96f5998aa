"""From a model, its SAEs and prompts to a FeatureSet: features of endless repetition, and how to steer with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import Sources, features_from_rows, search
from qscope_posttrain.features.dose_curve import CurveSettings
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.find.loops import LoopCollection, collect_loops
from qscope_posttrain.features.find.repetition_curve import CURVE_KEY, LOOP, NORMAL, SteeringCurve, steering_curve
from qscope_posttrain.features.find.repetition_scores import (
    Ranking,
    rank_features,
    repetition_differences,
    repetition_gradients,
)
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.features.statistics import PassStatistics
from qscope_posttrain.features.steering import SETTINGS_KEY
from qscope_posttrain.models.batches import Text
from qscope_posttrain.models.generation import Prompt, encode_prompts
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

BENIGN = "benign"
REPETITION = "repetition"
"""`settings["selector"]` of these features"""
DEFAULT_CURVE = CurveSettings()
COPIES = 2
"""Repeats whose probability the attribution is about."""


def find_repetition_features(
    model: nn.Module,
    tokenizer: Any,
    saes: Sources,
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
    show_progress: bool | None = None,
    **pass_options: Any,
) -> FeatureSet:
    """Find the features of endless repetition in every layer, and the direction that makes the model loop by itself.

    1. Loops: given, or sampled on `prompts` (`loops.collect_loops`).
    2. One pass over them, ordinary completions and `benign` text gives the firing rates: the classes "loop" (tokens
       of the repeated tail from its second copy on), "normal" (tokens of completions that ended by themselves) and
       "benign".
    3. Two scores for every feature: its rise from the first to the last occurrence of a token in the loop
       (`repetition_scores.repetition_differences`, Qwen-Scope report 8.1), stored as `scores`, and the gradient of
       log P(two more repeats) along its decoder row (`repetition_scores.repetition_gradients`), stored as `effects`,
       in nats per unit of the row. The `top` features of each layer become rows labeled "loop", best first.
    4. The steering curve (`repetition_curve.steering_curve`) tries them against random directions of equal length and
       the difference of means between "loop" and "normal", and chooses layer, rows, strength and window by
       `repetition_curve.choose`. Of the chosen layer only the chosen rows are kept, so that the set steers as chosen
       (`features.steering.feature_steering`).

    `settings["steering"]` is the result of `SteeringCurve.to_settings`. A choice that is not clearly more than random
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
        top (int, default 4): Number of features per layer.
        rank_by (str, default "both"): "difference", "attribution", or "both" in turn, see
            `repetition_scores.rank_features`.
        curve (CurveSettings, default `DEFAULT_CURVE`): Of the steering curve; None leaves it out.
        collect (dict, default None): Further arguments of `collect_loops`. It samples as `curve.sampling` says unless
            `settings` are given.
        chat (bool, default False): Send prompts through the chat template.
        chat_template_options (dict, default None): For the template, e.g. `{"enable_thinking": False}`.
        show_progress (bool, default None): Show progress bars; None: on a terminal.
        pass_options: `k` and `saes_at_once` of `build.search`, and the options of `statistics.collect_statistics`.
            `max_length` is by default that of the longest completion, because a loop is at the end of its text.

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
    found = loops

    def choose(passed: PassStatistics, loaded: Mapping[int, SparseAutoencoder]) -> dict[int, LayerFeatures]:
        factor = float(passed.settings["outlier_factor"])
        limits = {layer: factor * measured.median_norm for layer, measured in passed.layers.items()}
        rises = repetition_differences(model, found.loops, loaded, limits, show_progress=show_progress)
        gradients = repetition_gradients(model, found.loops, list(loaded), copies=COPIES, show_progress=show_progress)
        rows = {}
        for layer, sae in loaded.items():
            measured = passed.layers[layer]
            fires = measured.firing_rate[passed.languages.index(LOOP)] > 0
            effects = torch.cat([part.cpu().double() @ gradients[layer] for part in sae.W_dec.split(4096)])
            norms = sae.W_dec.float().norm(dim=1).double().cpu()
            ids = rank_features(rises[layer], effects / norms.clamp_min(1e-12), fires, top, rank_by)
            kept = features_from_rows(measured, sae.select(ids), [LOOP] * top, rises[layer][ids])
            rows[layer] = replace(kept, effects=effects[ids].float())
        return rows

    score = "activation at the last occurrence of a token in a loop minus its first"
    settings = {"selector": REPETITION, "score": score, "rank_by": rank_by, "top": top, "loops": dict(loops.settings)}
    longest = max(len(entry.ids) for entry in (*loops.loops, *loops.normal))
    pass_options = {"max_length": longest, "show_progress": show_progress, **pass_options}
    features = search(model, tokenizer, texts, saes, choose, settings, **pass_options)
    rate = loops.rate
    described = {
        "loops": len(loops.loops),
        "normal": len(loops.normal),
        "samples": loops.samples,
        "rate": None if rate is None else list(rate),
        "periods": [loop.tail.period for loop in loops.loops],
    }
    tables = {"ranking": repetition_table(features).to_dict(), "loops": described}
    features = replace(features, provenance={**features.provenance, **tables})
    if curve is None:
        return features
    shown: dict[str, Any] = {"periods": loops.periods, "show_progress": show_progress}
    return with_choice(features, steering_curve(model, tokenizer, prompt_ids, features, curve, **shown))


def with_choice(features: FeatureSet, curve: SteeringCurve) -> FeatureSet:
    """Add the curve, and keep only the chosen rows of the chosen layer; warn of a choice that is not specific."""
    settings = {**features.settings, "curve": asdict(curve.settings)}
    layers = dict(features.layers)
    chosen = curve.to_settings(LOOP)
    if curve.chosen is not None and chosen is not None:
        settings[SETTINGS_KEY] = chosen
        layers[chosen["layer"]] = layers[chosen["layer"]].take(curve.chosen.trial.rows)
    if not curve.specific:
        status(f"warning: {curve.verdict()}", enabled=True)
    provenance = {**features.provenance, CURVE_KEY: curve.to_table().to_dict()}
    return replace(features, layers=layers, settings=settings, provenance=provenance)


def repetition_table(features: FeatureSet) -> Table:
    """One line per row labeled "loop": both scores and the firing rate in every class."""
    lines: list[list[Cell]] = []
    for layer, rows in features.layers.items():
        for i, label in enumerate(rows.labels):
            if label != LOOP:
                continue
            length = rows.residual_median_norm / float(rows.decoder[i].norm())
            rates = [float(rate) for rate in rows.firing_rate[:, i]]
            lines.append([layer, rows.names[i], float(rows.scores[i]), float(rows.effects[i]) * length, *rates])
    counts = next(iter(features.layers.values())).tokens.tolist()
    tokens = ", ".join(f"{name} {count}" for name, count in zip(features.languages, counts, strict=True))
    return Table(
        title=f"Features of endless repetition in {features.model.get('name_or_path') or features.model['model_type']}",
        columns=["layer", "feature", "rise", "attribution", *(f"fires in {name}" for name in features.languages)],
        rows=lines,
        caption="rise: mean activation at the last occurrence of a token in the loop minus its first one. attribution: "
        f"first-order change of log P({COPIES} more repeats), in nats, for a push of one median residual norm. fires: "
        f"share of tokens (counted: {tokens}).",
    )
