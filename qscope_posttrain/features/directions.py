"""Baselines as FeatureSets: directions that no SAE chose, so that every control runs through the same code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import feature_set_from, features_from_directions, features_from_rows
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.features.selection import difference_of_means, monolinguality, random_features
from qscope_posttrain.features.statistics import LayerStatistics, PassStatistics
from qscope_posttrain.sae.autoencoder import SparseAutoencoder


def direction_feature_set(
    statistics: PassStatistics, layer: int, direction: Tensor, name: str | Sequence[str], *, language: str
) -> FeatureSet:
    """Any direction [d_model], or several [F, d_model] with as many names, as a FeatureSet for `language`."""
    rows = torch.atleast_2d(torch.as_tensor(direction))
    names = [name] if isinstance(name, str) else list(name)
    width = statistics.model["hidden_size"]
    if rows.dim() != 2 or rows.shape[1] != width or len(rows) != len(names):
        raise UserValueError(
            f"Expected directions [{len(names)}, {width}], one per name, got {list(torch.as_tensor(direction).shape)}."
        )
    target = _target_index(statistics, language)
    features = features_from_directions(_layer(statistics, layer), rows, names, language, target)
    return feature_set_from(statistics, {layer: features}, {"selector": "direction"})


def difference_of_means_set(statistics: PassStatistics, target: str, layers: Iterable[int] | None = None) -> FeatureSet:
    """Per layer the mean residual of the target minus the unweighted mean of the other languages' means."""
    index = _target_index(statistics, target)
    built = {}
    for layer in statistics.layers if layers is None else layers:
        rows = difference_of_means(_layer(statistics, layer).mean_residual, index)[None]
        name = f"{target} difference of means"
        built[layer] = features_from_directions(_layer(statistics, layer), rows, [name], target, index)
    return feature_set_from(statistics, built, {"selector": "difference of means", "target": target})


def random_feature_set(
    statistics: PassStatistics, saes: Mapping[int, SparseAutoencoder], like: FeatureSet, *, seed: int = 0
) -> FeatureSet:
    """Random SAE features (see `selection.random_features`), one for each row of `like`, as controls.

    Each takes the label of its row and is scaled to the norms of its encoder and decoder, so that neither readout
    differs in size. Activations are those of the feature as trained.
    """
    built = {}
    for layer, rows in like.layers.items():
        if layer not in saes:
            raise UserValueError(f"random_feature_set needs the SAE of layer {layer}; got {sorted(saes)}.")
        built[layer] = random_layer_features(_layer(statistics, layer), saes[layer], rows, statistics.languages, seed)
    sources = {layer: saes[layer].source for layer in like.layers}
    return feature_set_from(statistics, built, {"selector": "random features", "seed": seed}, sources)


def random_layer_features(
    statistics: LayerStatistics, sae: SparseAutoencoder, like: LayerFeatures, languages: Sequence[str], seed: int
) -> LayerFeatures:
    """The rows of one layer of `random_feature_set`."""
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


def random_directions(norms: Tensor, d_model: int, seed: int) -> Tensor:
    """[F, d_model] uniformly distributed directions with the given norms [F]."""
    drawn = torch.randn(len(norms), d_model, generator=torch.Generator().manual_seed(seed))
    return drawn * (norms / drawn.norm(dim=1))[:, None]


def _norm_ratio(reference: Tensor, rows: Tensor) -> Tensor:
    norms = rows.float().cpu().norm(dim=1)
    if bool((norms == 0).any()):
        raise UserValueError("A random feature of this SAE has a row of norm 0; take another seed.")
    return reference.norm(dim=1) / norms


def _layer(statistics: PassStatistics, layer: int) -> LayerStatistics:
    if layer not in statistics.layers:
        raise UserValueError(
            f"layer {layer} is not in these statistics; they have {', '.join(map(str, statistics.layers))}."
        )
    return statistics.layers[layer]


def _target_index(statistics: PassStatistics, language: str) -> int:
    if language not in statistics.languages:
        raise UserValueError(
            f"language {language!r} is not in these statistics; they have {', '.join(statistics.languages)}."
        )
    return statistics.languages.index(language)
