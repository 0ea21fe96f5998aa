"""The pass behind every search for features: a group of layers at a time, from which a chooser takes rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import feature_set_from
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.features.statistics import LayerStatistics, PassStatistics, collect_statistics
from qscope_posttrain.models.batches import Text
from qscope_posttrain.models.layers import check_layers
from qscope_posttrain.sae.autoencoder import SAESource, SparseAutoencoder, load_sae

Sources = Mapping[int, SparseAutoencoder | str | Path]
"""{layer: SAE, or a source for `SparseAutoencoder.load`}, layers counted from 0"""
Chooser = Callable[[PassStatistics, Mapping[int, SparseAutoencoder]], dict[int, LayerFeatures]]


def search(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[Text]],
    saes: Sources,
    choose: Chooser,
    settings: Mapping[str, Any],
    *,
    k: int | None = None,
    saes_at_once: int | None = None,
    checkpoint: str | Path | None = None,
    **statistics_options: Any,
) -> FeatureSet:
    """FeatureSet of the rows that `choose` takes from the statistics of every layer.

    Args:
        settings: of the FeatureSet; `top` among them is checked against the width of every SAE before its pass.
        k: of TopK, for sources that do not say it.
        saes_at_once: number of SAEs to load and use at a time, with one pass over the texts for each such group of
            layers; None for all in one pass.
        checkpoint: see `statistics.collect_statistics`, which also takes `statistics_options`; one file per group.
    """
    layers = check_layers(model, sorted(saes))
    if saes_at_once is not None and saes_at_once < 1:
        raise UserValueError(f"saes_at_once must be at least 1, got {saes_at_once}.")
    size = saes_at_once or len(layers)
    rows: dict[int, LayerFeatures] = {}
    counts: dict[int, LayerStatistics] = {}
    sources: dict[int, SAESource] = {}
    for start in range(0, len(layers), size):
        group = layers[start : start + size]
        loaded = {layer: load_sae(saes[layer], layer, k, model) for layer in group}
        _check_top(settings["top"], loaded)
        place = None if checkpoint is None else Path(checkpoint)
        if place is not None and len(group) < len(layers):
            place = place.with_name(f"{place.name}.layers{group[0]}-{group[-1]}")
        passed = collect_statistics(model, tokenizer, texts, loaded, checkpoint=place, **statistics_options)
        rows |= choose(passed, loaded)
        counts |= {layer: measured.counts_only() for layer, measured in passed.layers.items()}
        sources |= {layer: sae.source for layer, sae in loaded.items()}
        passed = replace(passed, layers=counts)
        del loaded  # SAEs and sums of a group make room for the next one
    return feature_set_from(passed, rows, settings, sources)


def _check_top(top: int, saes: Mapping[int, SparseAutoencoder]) -> None:
    for layer, sae in saes.items():
        if not 1 <= top <= sae.d_sae:
            raise UserValueError(f"top must lie between 1 and the {sae.d_sae} features of layer {layer}, got {top}.")
