"""FeatureSets of the experiments, from a pass that is already there: language features, directions, random features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import (
    difference_of_means,
    feature_set_from,
    features_from_rows,
    monolinguality,
    random_features,
)
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.find.contrast import SCORE, language_rows
from qscope_posttrain.features.layer_features import FREE_DIRECTION, LayerFeatures
from qscope_posttrain.features.statistics import LayerStatistics, PassStatistics
from qscope_posttrain.sae.autoencoder import FeatureRows, SAESource, SparseAutoencoder


def language_feature_set(
    statistics: PassStatistics, saes: Mapping[int, SparseAutoencoder], *, top: int = 2
) -> FeatureSet:
    """The FeatureSet of `find_language_features`; effects are not measured."""
    layers = {
        layer: language_rows(statistics.layers[layer], sae, statistics.languages, top) for layer, sae in saes.items()
    }
    sources = {layer: sae.source for layer, sae in saes.items()}
    return feature_set_from(statistics, layers, {"selector": "monolinguality", "score": SCORE, "top": top}, sources)


def features_from_directions(
    statistics: LayerStatistics, directions: Tensor, names: Sequence[str], label: str, target: int
) -> LayerFeatures:
    """LayerFeatures of free directions [F, d_model] that stand for language `label`, number `target`.

    Encoder and decoder are the direction itself and the bias is 0. The score is the direction's own contrast between
    languages, mean of h . d in the target minus the unweighted mean of the others.
    """
    mean, _ = statistics.moments(directions)
    count = len(directions)
    scores = monolinguality(mean)[target] if len(mean) > 1 else torch.full((count,), math.nan)
    ids, directions = torch.full((count,), FREE_DIRECTION), directions.float()
    rows = FeatureRows(ids, directions, torch.zeros(count), directions, SAESource("free direction"))
    return features_from_rows(statistics, rows, [label] * count, scores, names)


def direction_feature_set(
    statistics: PassStatistics, layer: int, direction: Tensor, name: str, *, language: str
) -> FeatureSet:
    """Any direction [d_model] as a FeatureSet for `language`."""
    target = statistics.languages.index(language)
    rows = features_from_directions(statistics.layers[layer], direction[None], [name], language, target)
    return feature_set_from(statistics, {layer: rows}, {"selector": "direction"})


def difference_of_means_set(statistics: PassStatistics, target: str) -> FeatureSet:
    """Per layer the mean residual of the target minus the unweighted mean of the other languages' means."""
    index = statistics.languages.index(target)
    built = {}
    for layer, measured in statistics.layers.items():
        direction = difference_of_means(measured.mean_residual, index)[None]
        built[layer] = features_from_directions(measured, direction, [f"{target} difference of means"], target, index)
    return feature_set_from(statistics, built, {"selector": "difference of means", "target": target})


def random_feature_set(
    statistics: PassStatistics, saes: Mapping[int, SparseAutoencoder], like: FeatureSet, *, seed: int = 0
) -> FeatureSet:
    """Random SAE features (see `build.random_features`), one for each row of `like`, as controls."""
    built = {}
    for layer, rows in like.layers.items():
        if layer not in saes:
            raise UserValueError(f"random_feature_set needs the SAE of layer {layer}; got {sorted(saes)}.")
        built[layer] = _random_rows(statistics.layers[layer], saes[layer], rows, statistics.languages, seed)
    sources = {layer: saes[layer].source for layer in like.layers}
    return feature_set_from(statistics, built, {"selector": "random features", "seed": seed}, sources)


def _random_rows(
    statistics: LayerStatistics, sae: SparseAutoencoder, like: LayerFeatures, languages: Sequence[str], seed: int
) -> LayerFeatures:
    """Each takes the label of its row of `like` and is scaled to the norms of its encoder and decoder, so that neither
    readout differs in size. Activations are those of the feature as trained."""
    scores = monolinguality(statistics.mean_activation)
    target = scores[languages.index(like.labels[0])]
    taken = [feature for feature in like.feature_ids.tolist() if feature >= 0]
    ids = random_features(statistics.firing_rate, target, len(like), seed, exclude=taken)
    rows = sae.select(ids)
    encoder_scale = _norm_ratio(like.encoder, rows.encoder)
    rows = replace(
        rows,
        encoder=rows.encoder.float().cpu() * encoder_scale[:, None],
        encoder_bias=rows.encoder_bias.float().cpu() * encoder_scale,
        decoder=rows.decoder.float().cpu() * _norm_ratio(like.decoder, rows.decoder)[:, None],
    )
    names = [f"random #{feature}" for feature in ids.tolist()]
    own = torch.stack([scores[languages.index(label), i] for label, i in zip(like.labels, ids.tolist(), strict=True)])
    return features_from_rows(statistics, rows, like.labels, own, names)


def _norm_ratio(reference: Tensor, rows: Tensor) -> Tensor:
    norms = rows.float().cpu().norm(dim=1)
    if bool((norms == 0).any()):
        raise UserValueError("A random feature of this SAE has a row of norm 0; take another seed.")
    return reference.norm(dim=1) / norms
