"""Turn texts into feature matrices, layers side by side, so that a split into train and test handles one array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.sparse import csr_array, hstack
from sklearn.base import BaseEstimator, TransformerMixin
from torch import nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.text_features import Pooling, TextFeatures, collect_text_features
from qscope_posttrain.models.batches import TokenText
from qscope_posttrain.provenance import model_shape
from qscope_posttrain.sae.autoencoder import SparseAutoencoder


def check_widths(widths: Mapping[int, int]) -> dict[int, int]:
    """{layer: number of its columns} in ascending order. ValueError without a layer, or for a number that is none."""
    if not widths:
        raise UserValueError("layer_widths must name at least one layer.")
    return dict(sorted((_whole(layer, 0, "a layer"), _whole(width, 1, "a width")) for layer, width in widths.items()))


def layer_slice(widths: Mapping[int, int], layer: int) -> slice:
    """The columns of a layer in a matrix with the layers side by side."""
    if layer not in widths:
        raise UserValueError(f"there are no features of layer {layer}; there are of {', '.join(map(str, widths))}.")
    start = sum(width for other, width in widths.items() if other < layer)
    return slice(start, start + widths[layer])


def stack(features: Mapping[int, Any]) -> tuple[csr_array, dict[int, int]]:
    """Put `{layer: TextFeatures, or a matrix [texts, features]}` side by side: (matrix, {layer: width}), ascending.
    ValueError: no layer, or layers with different numbers of texts."""
    matrices = {
        layer: found.matrix if isinstance(found, TextFeatures) else csr_array(found)
        for layer, found in sorted(features.items())
    }
    widths = check_widths({layer: matrix.shape[1] for layer, matrix in matrices.items()})
    counts = {layer: matrix.shape[0] for layer, matrix in matrices.items()}
    if len(set(counts.values())) > 1:
        raise UserValueError(f"layers must have the features of the same texts; they have {counts}.")
    return csr_array(hstack(list(matrices.values()), format="csr")), widths


class TextFeaturizer(TransformerMixin, BaseEstimator):
    """Features of texts under a model and its SAEs, as a transformer of scikit-learn.

    See `features.text_features.collect_text_features`, which leaves out first tokens and norm outliers. `clone` shares
    model, tokenizer and SAEs.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        saes: {layer: SAE}.
        pooling: "max" (equation 13), "last" or "mean".
        max_length: Truncate each text to this many tokens.
        median_norms: {layer: norm} that decides about norm outliers, so that a text's features do not depend on the
            texts beside it; None: measured on the texts of each call, and by `fit` on those of the training.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        saes: Mapping[int, SparseAutoencoder],
        *,
        pooling: Pooling = "max",
        max_length: int = 512,
        outlier_factor: float = 10.0,
        tokens_per_batch: int = 4096,
        median_norms: Mapping[int, float] | None = None,
        show_progress: bool | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.saes = saes
        self.pooling = pooling
        self.max_length = max_length
        self.outlier_factor = outlier_factor
        self.tokens_per_batch = tokens_per_batch
        self.median_norms = median_norms
        self.show_progress = show_progress

    def features(
        self, texts: Sequence[Any], residual: bool = False, layers: Sequence[int] | None = None
    ) -> dict[int, TextFeatures]:
        """{layer: TextFeatures} of texts, with `residual` the mean residual stream of each too; `layers` None: all."""
        saes = self.saes if layers is None else {layer: self.saes[layer] for layer in layers}
        options = {"tokens_per_batch": self.tokens_per_batch, "show_progress": self.show_progress, **self.settings()}
        return collect_text_features(self.model, self.tokenizer, list(texts), saes, residual=residual, **options)

    def with_norms(self, features: Mapping[int, TextFeatures]) -> TextFeaturizer:
        """A copy with the median norms that were measured for `features`."""
        return self.with_settings({"median_norms": {layer: found.median_norm for layer, found in features.items()}})

    def with_settings(self, settings: Mapping[str, Any]) -> TextFeaturizer:
        """A copy with other settings, such as those of another one (see `settings`)."""
        return type(self)(**{**self.get_params(deep=False), **settings})

    def fit(self, texts: Sequence[Any], y: Any = None) -> TextFeaturizer:
        """Measure the median norms on `texts`, unless they were given."""
        self.median_norms_ = self.median_norms or self.with_norms(self.features(texts)).median_norms
        return self

    def transform(self, texts: Sequence[Any]) -> csr_array:
        """[texts, sum of the d_sae], the layers side by side in ascending order, see `layer_widths`."""
        norms = getattr(self, "median_norms_", self.median_norms)
        return stack(self.with_settings({"median_norms": norms}).features(texts))[0]

    @property
    def layer_widths(self) -> dict[int, int]:
        """{layer: d_sae}, for `FeatureClassifier(layer_widths=...)` on the result of `transform`."""
        return {layer: sae.d_sae for layer, sae in sorted(self.saes.items())}

    def settings(self) -> dict[str, Any]:
        """Settings that change the features of a text, besides model and SAEs; JSON values, layers as integers."""
        found = {name: getattr(self, name) for name in ("pooling", "max_length", "outlier_factor")}
        return found | {"median_norms": None if self.median_norms is None else dict(self.median_norms)}

    def origin(self) -> dict[str, Any]:
        """Identity of the model and sources of its SAEs; JSON values."""
        saes = {str(layer): asdict(sae.source) for layer, sae in sorted(self.saes.items())}
        return {"model": model_shape(self.model), "saes": saes}

    def __sklearn_clone__(self) -> TextFeaturizer:
        return self.with_settings({})


def are_texts(value: Any) -> bool:
    """Whether `value` is a sequence of strings or `TokenText`s, not of features."""
    if isinstance(value, Mapping | str) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        return False
    if (hasattr(value, "shape") and len(value.shape) != 1) or not len(value):
        return False
    first = value.iloc[0] if hasattr(value, "iloc") else value[0]
    return isinstance(first, str | np.str_ | TokenText)


def _whole(value: Any, least: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UserValueError(f"{what} must be a whole number from {least} on, got {value!r}.")
    return int(value)
