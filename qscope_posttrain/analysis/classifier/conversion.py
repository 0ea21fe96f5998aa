"""The features of a classifier as a FeatureSet, for steering, for a penalty, for looking at them.

There is no way back: a FeatureSet has neither a rule nor thresholds, and knows rates per token, not per text.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qscope_posttrain.analysis.classifier.estimator import FeatureClassifier
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import feature_set_from, features_from_rows
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.statistics import PassStatistics
from qscope_posttrain.sae.autoencoder import SparseAutoencoder


def to_feature_set(
    classifier: FeatureClassifier, statistics: PassStatistics, saes: Mapping[int, SparseAutoencoder]
) -> FeatureSet:
    """One row a feature; its score is the difference in firing rate, its label the positive class.

    Args:
        statistics: `collect_statistics(model, tokenizer, {class: texts}, saes)`, over texts of both classes: the
            "languages" of the FeatureSet are the classes, by their names as strings.
        saes: those of the classifier's layers.

    Raises:
        ValueError: the statistics lack a class, or a layer is missing.
    """
    negative, positive = (str(kind) for kind in classifier.classes_.tolist())
    if not {negative, positive} <= set(statistics.languages):
        raise UserValueError(
            f"The statistics are of {', '.join(statistics.languages)}, not of {negative} and {positive}."
        )
    layers = {}
    for layer in dict.fromkeys(classifier.feature_layers_.tolist()):
        if layer not in saes or layer not in statistics.layers:
            raise UserValueError(f"Layer {layer} of the classifier needs its SAE and its statistics.")
        mine = classifier.feature_layers_ == layer
        ids = torch.from_numpy(classifier.feature_ids_[mine].copy())
        layers[layer] = features_from_rows(
            statistics.layers[layer],
            saes[layer].select(ids),
            labels=[positive] * len(ids),
            names=[f"{positive} #{feature}" for feature in ids.tolist()],
            scores=torch.from_numpy(classifier.differences_[mine].copy()),
        )
    settings = {
        "selector": "firing-rate difference",
        "rule": classifier.rule,
        "k": int(classifier.k),
        "n_layers": int(classifier.n_layers),
    }
    return feature_set_from(statistics, layers, settings, {layer: saes[layer].source for layer in layers})
