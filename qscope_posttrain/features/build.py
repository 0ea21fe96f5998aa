"""Make FeatureSets from the statistics of a pass: a search for rows of an SAE, free directions, random features.

Every number follows from the sums of the pass, so directions that no SAE chose run through the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import FREE_DIRECTION, LayerFeatures
from qscope_posttrain.features.statistics import LayerStatistics, PassStatistics, collect_statistics
from qscope_posttrain.models.batches import Text
from qscope_posttrain.models.layers import check_layers
from qscope_posttrain.provenance import package_versions
from qscope_posttrain.sae.autoencoder import FeatureRows, SAESource, SparseAutoencoder, load_sae

Sources = Mapping[int, SparseAutoencoder | str | Path]  # {layer: SAE, or its source}, layers from 0
MIN_FIRING_RATE = 0.005  # Random features fire on more than this share of the tokens
MAX_RELATIVE_SCORE = 0.05  # and score less than this share of the highest score
Chooser = Callable[[PassStatistics, Mapping[int, SparseAutoencoder]], dict[int, LayerFeatures]]


def monolinguality(mean_activation: Tensor) -> Tensor:
    """nu_s^L = mu_s^L - mean over the other languages I of mu_s^I, for all features s and languages L at once.

    mu_s^L, `mean_activation` [L, features], is the mean post-activation over the tokens of language L; the languages in
    the second term count alike, whatever their number of tokens (SASFT, arXiv 2507.14894, equation 7).
    """
    if mean_activation.dim() != 2 or len(mean_activation) < 2:
        raise UserValueError(
            "Monolinguality compares languages: expected mean activations [languages, features] of at least two "
            f"languages, got {list(mean_activation.shape)}."
        )
    others = (mean_activation.sum(dim=0) - mean_activation) / (len(mean_activation) - 1)
    return mean_activation - others


def top_features(scores: Tensor, top: int) -> Tensor:
    """Ids of the `top` highest of `scores` [features], best first; equal scores in the order of their ids."""
    if not 1 <= top <= len(scores):
        raise UserValueError(f"top must lie between 1 and the {len(scores)} features of the SAE, got {top}.")
    return scores.sort(descending=True, stable=True).indices[:top]


def random_features(
    firing_rate: Tensor, scores: Tensor, count: int, seed: int = 0, exclude: Collection[int] = ()
) -> Tensor:
    """Ids of `count` random features that fire but do not depend on the language: the control group.

    Eligible are features, except `exclude`, that fire on more than 0.5 % of the tokens (`firing_rate` [L, features],
    mean over languages) and whose |score| ([features], for the target language) is below 5 % of the highest.
    """
    eligible = (firing_rate.mean(dim=0) > MIN_FIRING_RATE) & (scores.abs() < MAX_RELATIVE_SCORE * scores.max())
    eligible[list(exclude)] = False
    ids = eligible.nonzero().squeeze(1)
    if len(ids) < count:
        raise UserValueError(
            f"Only {len(ids)} features fire on more than {MIN_FIRING_RATE:g} of the tokens with a score below "
            f"{MAX_RELATIVE_SCORE:g} of the best; {count} random features were requested. Request fewer."
        )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return ids[order[:count]]


def difference_of_means(mean_residual: Tensor, target: int) -> Tensor:
    """[d_model]: the target's row of `mean_residual` [L, d_model] minus the unweighted mean of the other rows."""
    return monolinguality(mean_residual)[target]


def features_from_rows(
    statistics: LayerStatistics,
    rows: FeatureRows,
    labels: Sequence[str],
    scores: Tensor,
    names: Sequence[str] | None = None,
) -> LayerFeatures:
    """LayerFeatures of rows; `scores` [F] in their order. Names are by default `<label> #<id>`. Activations of free
    directions, whose ids are all `FREE_DIRECTION`, are not measured."""
    ids = rows.feature_ids.cpu()
    if names is None:
        names = [f"{label} #{feature}" for label, feature in zip(labels, ids.tolist(), strict=True)]
    # Round the rows first: the moments are those of the rows as stored.
    encoder, encoder_bias, decoder = map(_stored, (rows.encoder, rows.encoder_bias, rows.decoder))
    encoder_mean, encoder_covariance = map(_stored, statistics.moments(encoder, encoder_bias))
    decoder_mean, decoder_covariance = map(_stored, statistics.moments(decoder))
    free = bool((ids == FREE_DIRECTION).all())
    unmeasured = torch.full_like(encoder_mean, math.nan)
    return LayerFeatures(
        feature_ids=ids,
        labels=tuple(labels),
        names=tuple(names),
        encoder=encoder,
        encoder_bias=encoder_bias,
        decoder=decoder,
        scores=_stored(scores),
        effects=torch.full((len(ids),), math.nan),
        mean_activation=unmeasured if free else _stored(statistics.mean_activation[:, ids]),
        firing_rate=unmeasured if free else _stored(statistics.firing_rate[:, ids]),
        tokens=statistics.tokens,
        mean_residual=_stored(statistics.mean_residual),
        residual_median_norm=statistics.median_norm,
        encoder_mean=encoder_mean,
        encoder_covariance=encoder_covariance,
        decoder_mean=decoder_mean,
        decoder_covariance=decoder_covariance,
    )


def best_rows(
    statistics: LayerStatistics, sae: SparseAutoencoder, scores: Mapping[str, Tensor], top: int
) -> LayerFeatures:
    """The `top` features of each label by its scores [features], grouped by label, best first."""
    ids = {label: top_features(of_label, top) for label, of_label in scores.items()}
    labels = [label for label in scores for _ in range(top)]
    kept = torch.cat([scores[label][best] for label, best in ids.items()])
    return features_from_rows(statistics, sae.select(torch.cat(list(ids.values()))), labels, kept)


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
        saes_at_once: number of SAEs to use at a time, with one pass over the texts for each group; None for all.
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
        for layer, sae in loaded.items():
            if not 1 <= (top := settings["top"]) <= sae.d_sae:
                raise UserValueError(
                    f"top must lie between 1 and the {sae.d_sae} features of layer {layer}, got {top}."
                )
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


def random_directions(norms: Tensor, d_model: int, seed: int) -> Tensor:
    """[F, d_model] uniformly distributed directions with the given norms [F]."""
    drawn = torch.randn(len(norms), d_model, generator=torch.Generator().manual_seed(seed))
    return drawn * (norms / drawn.norm(dim=1))[:, None]
