"""Make a FeatureSet from rows and the statistics of a pass: every number follows from the sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import FREE_DIRECTION, LayerFeatures
from qscope_posttrain.features.selection import monolinguality
from qscope_posttrain.features.statistics import LayerStatistics, PassStatistics
from qscope_posttrain.provenance import package_versions
from qscope_posttrain.sae.autoencoder import FeatureRows, SAESource


def features_from_rows(
    statistics: LayerStatistics,
    rows: FeatureRows,
    labels: Sequence[str],
    scores: Tensor,
    names: Sequence[str] | None = None,
) -> LayerFeatures:
    """LayerFeatures of SAE features; `scores` [F] in the order of the rows. Names are by default `<label> #<id>`."""
    ids = rows.feature_ids.cpu()
    if names is None:
        names = [f"{label} #{feature}" for label, feature in zip(labels, ids.tolist(), strict=True)]
    return _layer_features(
        statistics,
        feature_ids=ids,
        labels=labels,
        names=names,
        encoder=rows.encoder,
        encoder_bias=rows.encoder_bias,
        decoder=rows.decoder,
        scores=scores,
        mean_activation=statistics.mean_activation[:, ids],
        firing_rate=statistics.firing_rate[:, ids],
    )


def features_from_directions(
    statistics: LayerStatistics, directions: Tensor, names: Sequence[str], label: str, target: int
) -> LayerFeatures:
    """LayerFeatures of free directions [F, d_model] that stand for language `label`, number `target`.

    Encoder and decoder are the direction itself and the bias is 0. The score is the direction's own contrast between
    languages, mean of h . d in the target minus the unweighted mean of the others.
    """
    mean, _ = statistics.moments(directions)
    unmeasured = torch.full_like(mean, math.nan)
    return _layer_features(
        statistics,
        feature_ids=torch.full((len(directions),), FREE_DIRECTION),
        labels=[label] * len(directions),
        names=names,
        encoder=directions,
        encoder_bias=torch.zeros(len(directions)),
        decoder=directions,
        scores=monolinguality(mean)[target] if len(mean) > 1 else unmeasured[target],
        mean_activation=unmeasured,
        firing_rate=unmeasured,
    )


def _layer_features(
    statistics: LayerStatistics, *, labels: Sequence[str], names: Sequence[str], feature_ids: Tensor, **values: Tensor
) -> LayerFeatures:
    # Round the rows first: the moments are those of the rows as stored.
    stored = {name: _stored(value) for name, value in values.items()}
    encoder_mean, encoder_covariance = statistics.moments(stored["encoder"], stored["encoder_bias"])
    decoder_mean, decoder_covariance = statistics.moments(stored["decoder"])
    return LayerFeatures(
        **stored,
        feature_ids=feature_ids,
        labels=tuple(labels),
        names=tuple(names),
        effects=torch.full((len(feature_ids),), math.nan),
        tokens=statistics.tokens,
        mean_residual=_stored(statistics.mean_residual),
        residual_median_norm=statistics.median_norm,
        encoder_mean=_stored(encoder_mean),
        encoder_covariance=_stored(encoder_covariance),
        decoder_mean=_stored(decoder_mean),
        decoder_covariance=_stored(decoder_covariance),
    )


def _stored(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32)


def feature_set_from(
    statistics: PassStatistics,
    layers: Mapping[int, LayerFeatures],
    settings: Mapping[str, Any],
    sources: Mapping[int, SAESource] | None = None,
) -> FeatureSet:
    """FeatureSet with the identity, the settings and the provenance of the pass."""
    return FeatureSet(
        model=dict(statistics.model),
        languages=statistics.languages,
        layers=layers,
        settings={**settings, "statistics": dict(statistics.settings)},
        provenance={
            "saes": {str(layer): asdict(source) for layer, source in (sources or {}).items()},
            "text_fingerprint": statistics.text_fingerprint,
            "texts": dict(zip(statistics.languages, statistics.texts.tolist(), strict=True)),
            "left_out": {
                "first_tokens": dict(zip(statistics.languages, statistics.skipped.tolist(), strict=True)),
                "norm_outliers": {
                    str(layer): dict(zip(statistics.languages, measured.outliers.tolist(), strict=True))
                    for layer, measured in statistics.layers.items()
                },
            },
            "versions": package_versions(),
        },
    )
