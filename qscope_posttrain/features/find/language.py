"""From a model, its SAEs and text to a FeatureSet: the language features of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import feature_set_from, features_from_rows
from qscope_posttrain.features.causal import causal_check, measure_effects
from qscope_posttrain.features.directions import random_layer_features
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.features.selection import monolinguality, top_features
from qscope_posttrain.features.statistics import LayerStatistics, PassStatistics, collect_statistics
from qscope_posttrain.models.batches import check_texts, input_device
from qscope_posttrain.models.layers import check_layers, text_config
from qscope_posttrain.models.scoring import contrast_sample
from qscope_posttrain.report.progress import status
from qscope_posttrain.sae.autoencoder import SAESource, SparseAutoencoder
from qscope_posttrain.text.language_labels import language_hint

CHECKED_LAYERS = 2
"""By default the causal check covers the two deepest layers, the ones that SASFT trains on."""


def find_language_features(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    saes: Mapping[int, SparseAutoencoder | str | Path],
    *,
    top: int = 2,
    target: str | None = None,
    target_tokens: Tensor | None = None,
    causal: bool = True,
    causal_layers: Sequence[int] | None = None,
    controls: int = 5,
    k: int | None = None,
    saes_at_once: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    show_progress: bool | None = None,
    **statistics_options: Any,
) -> FeatureSet:
    """Find the `top` features of every language in every layer, by monolinguality, in one pass over the texts.

    The FeatureSet holds, per layer, the rows grouped by language (best first) and the exact mean and covariance of
    their encoder and decoder readouts in every language.

    With a `target`, the effect of its rows on log P(target's tokens) is measured as well (one forward and backward
    pass over a sample), and with `causal` its directions are ablated and added in `causal_layers`, next to random
    features and the difference of means. That table is kept in `provenance["causal_check"]`, in the form of
    `report.tables.Table.to_dict`; `causal.causal_check` gives it as an object.

    Memory: the second moments behind the covariances take languages * d_model^2 * 8 bytes a layer, 0.7 GiB for 5
    languages at width 4096. `saes_at_once` bounds them and the SAEs in memory; `second_moments=False` does without.

    Args:
        model (nn.Module): Causal language model of transformers.
        tokenizer (PreTrainedTokenizerBase): Its tokenizer.
        texts (dict of str to sequence of str): {language: texts}, at least two languages.
        saes (dict of int to SparseAutoencoder or path): {layer: SAE, or a source for `SparseAutoencoder.load`}, layers
            counted from 0.
        top (int, default 2): Features per language and layer.
        target (str, default None): Language whose features are measured for their effect; None measures none.
        target_tokens (Tensor, default None): Ids that count as the target's tokens; None: those that write its script.
        causal (bool, default True): Run the causal check, where there is a target.
        causal_layers (sequence of int, default None): Layers of that check; None: the two deepest in `saes`.
        controls (int, default 5): Random features in it.
        k (int, default None): Of TopK, for sources that do not say it.
        saes_at_once (int, default None): Maximum number of SAEs in memory, with one pass over the texts for each such
            group of layers; None: all in one pass.
        seed (int, default 0): Of the random features and the bootstrap.
        checkpoint (path, default None): See `statistics.collect_statistics`.
        show_progress (bool, default None): Show progress bars; None: on a terminal.
        statistics_options: further arguments of `statistics.collect_statistics`.

    Raises:
        ValueError: fewer than two languages, an unknown target, no layer, an SAE that does not fit the model.

    Example:
        >>> found = qp.find_language_features(model, tokenizer, texts, saes, top=2, target="zh", causal=False)
        >>> found.languages
        ('en', 'fr', 'zh', 'ru', 'ko')
        >>> len(found.select("zh"))  # two features in each of two layers
        4
    """
    languages = check_texts(texts)
    if len(languages) < 2:
        raise UserValueError(f"Language features need at least two languages to compare, got {', '.join(languages)}.")
    if target is not None and target not in languages:
        hint = language_hint(target, languages)
        raise UserValueError(f"target {target!r} is not among the languages of texts: {', '.join(languages)}.{hint}")
    layers = check_layers(model, sorted(saes))
    if causal_layers is not None and not set(causal_layers) <= set(layers):
        raise UserValueError(
            f"causal_layers {list(causal_layers)} must be among the layers with an SAE: {list(layers)}."
        )
    if saes_at_once is not None and saes_at_once < 1:
        raise UserValueError(f"saes_at_once must be at least 1, got {saes_at_once}.")
    if controls < 1:
        raise UserValueError(f"controls must be at least 1, got {controls}; causal=False leaves the check out.")
    if target is not None:
        # Everything that can be wrong with the target is found out before the pass, not after it.
        contrast_sample(model, tokenizer, texts, target, target_tokens=target_tokens)
    checked = tuple(causal_layers) if causal_layers is not None else layers[-CHECKED_LAYERS:]
    checked = checked if causal and target is not None else ()

    size = saes_at_once or len(layers)
    found: list[_Group] = []
    for start in range(0, len(layers), size):
        group = layers[start : start + size]
        # The SAEs and sums of a group die with this call, so that the next group has the memory.
        found.append(
            _find_group(
                model,
                tokenizer,
                texts,
                {layer: load_sae(saes[layer], layer, k, model) for layer in group},
                top,
                _Controls(target, frozenset(checked), controls, seed),
                checkpoint=_group_file(checkpoint, group, layers),
                show_progress=show_progress,
                **statistics_options,
            )
        )
    settings = {"selector": "monolinguality", "top": top, "target": target, "seed": seed}
    counts = {layer: kept for group in found for layer, kept in group.statistics.layers.items()}
    features = feature_set_from(
        replace(found[0].statistics, layers=counts),
        {layer: rows for group in found for layer, rows in group.rows.items()},
        settings,
        {layer: source for group in found for layer, source in group.sources.items()},
    )
    control_rows = {layer: rows for group in found for layer, rows in group.controls.items()}
    if target is None:
        return features
    sample_options: dict[str, Any] = {"target_tokens": target_tokens, "show_progress": show_progress}
    features = measure_effects(features, model, tokenizer, texts, target, **sample_options)
    if not checked:
        return features
    report = causal_check(
        model,
        tokenizer,
        texts,
        features.select(language=target, layers=checked),
        target,
        controls=replace(features, layers=control_rows) if control_rows else None,
        random_count=controls,
        seed=seed,
        **sample_options,
    )
    return replace(features, provenance={**features.provenance, "causal_check": report.to_table().to_dict()})


@dataclass(frozen=True)
class _Controls:
    """Which random features to draw for the causal check, while the SAE is there."""

    target: str | None
    layers: frozenset[int]
    count: int
    seed: int


@dataclass(frozen=True, eq=False)
class _Group:
    """What is kept of a group of layers when its SAEs and its sums are gone."""

    statistics: PassStatistics
    """Counts only"""
    rows: dict[int, LayerFeatures]
    controls: dict[int, LayerFeatures]
    sources: dict[int, SAESource]


def _find_group(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    saes: Mapping[int, SparseAutoencoder],
    top: int,
    controls: _Controls,
    **statistics_options: Any,
) -> _Group:
    for layer, sae in saes.items():
        if not 1 <= top <= sae.d_sae:
            raise UserValueError(f"top must lie between 1 and the {sae.d_sae} features of layer {layer}, got {top}.")
    passed = collect_statistics(model, tokenizer, texts, saes, **statistics_options)
    languages, rows, drawn = passed.languages, {}, {}
    for layer, sae in saes.items():
        rows[layer] = language_rows(passed.layers[layer], sae, languages, top)
        if controls.target is not None and layer in controls.layers:
            best = rows[layer].take([languages.index(controls.target) * top] * controls.count)
            try:
                drawn[layer] = random_layer_features(passed.layers[layer], sae, best, languages, controls.seed)
            except ValueError as error:  # a small SAE may have too few; a long pass must not be lost over it
                status(f"Layer {layer}: random directions are the controls. {error}", enabled=True)
    counts = {layer: measured.counts_only() for layer, measured in passed.layers.items()}
    sources = {layer: sae.source for layer, sae in saes.items()}
    return _Group(replace(passed, layers=counts), rows, drawn, sources)


def language_feature_set(
    statistics: PassStatistics, saes: Mapping[int, SparseAutoencoder], *, top: int = 2
) -> FeatureSet:
    """The FeatureSet of `find_language_features`, from a pass that is already there; effects are not measured."""
    layers = {
        layer: language_rows(statistics.layers[layer], sae, statistics.languages, top) for layer, sae in saes.items()
    }
    sources = {layer: sae.source for layer, sae in saes.items()}
    return feature_set_from(statistics, layers, {"selector": "monolinguality", "top": top}, sources)


def language_rows(
    statistics: LayerStatistics, sae: SparseAutoencoder, languages: Sequence[str], top: int
) -> LayerFeatures:
    """The `top` features of each language in one layer, grouped by language in the order given, best first."""
    scores = monolinguality(statistics.mean_activation)
    ids = torch.stack([top_features(scores[i], top) for i in range(len(languages))])
    labels = [language for language in languages for _ in range(top)]
    names = [f"{label} #{feature}" for label, feature in zip(labels, ids.flatten().tolist(), strict=True)]
    return features_from_rows(statistics, sae.select(ids.flatten()), labels, names, scores.gather(1, ids).flatten())


def load_sae(source: SparseAutoencoder | str | Path, layer: int, k: int | None, model: nn.Module) -> SparseAutoencoder:
    """The SAE itself, or the one at `source`, on the model's device; ValueError when it is of another width."""
    if isinstance(source, SparseAutoencoder):
        return source
    width = int(text_config(model).hidden_size)
    return SparseAutoencoder.load(source, layer=layer, k=k, d_model=width, device=input_device(model))


def _group_file(checkpoint: str | Path | None, group: Sequence[int], layers: Sequence[int]) -> Path | None:
    """One checkpoint file for each group of layers."""
    if checkpoint is None or len(group) == len(layers):
        return None if checkpoint is None else Path(checkpoint)
    path = Path(checkpoint)
    return path.with_name(f"{path.name}.layers{group[0]}-{group[-1]}")
