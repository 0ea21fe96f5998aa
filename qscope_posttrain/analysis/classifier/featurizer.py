"""Texts to feature matrices, as a transformer of scikit-learn that shares its model instead of copying it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from sklearn.base import BaseEstimator, TransformerMixin
from torch import nn

from qscope_posttrain.analysis.classifier.columns import stack
from qscope_posttrain.features.text_features import Pooling, TextFeatures, collect_text_features
from qscope_posttrain.models.batches import TokenText
from qscope_posttrain.provenance import model_shape
from qscope_posttrain.sae.autoencoder import SparseAutoencoder


class TextFeaturizer(TransformerMixin, BaseEstimator):
    """Features of texts under a model and its SAEs: `features.text_features.collect_text_features` with its settings.

    First tokens and norm outliers are left out there. `clone` shares model, tokenizer and SAEs.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        saes: {layer: SAE}.
        pooling: "max" (equation 13), or "last" or "mean".
        median_norms: {layer: norm} by which outliers are told, so that a text's features do not depend on the texts
            beside it; None: measured on the texts of each call, and by `fit` on those of the training.
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
        """{layer: TextFeatures} of texts.

        Args:
            residual: keep the mean residual stream of each text too, for linear probes.
            layers: some of the layers; the forward pass ends at the deepest. None: all.
        """
        return collect_text_features(
            self.model,
            self.tokenizer,
            list(texts),
            self.saes if layers is None else {layer: self.saes[layer] for layer in layers},
            pooling=self.pooling,
            residual=residual,
            tokens_per_batch=self.tokens_per_batch,
            max_length=self.max_length,
            outlier_factor=self.outlier_factor,
            median_norms=self.median_norms,
            show_progress=self.show_progress,
        )

    def with_norms(self, features: Mapping[int, TextFeatures]) -> TextFeaturizer:
        """The same with the median norms that were measured for `features`."""
        return self._copy(median_norms={layer: found.median_norm for layer, found in features.items()})

    def with_settings(self, settings: Mapping[str, Any]) -> TextFeaturizer:
        """The same with the settings (see `settings`) of another one."""
        return self._copy(**settings)

    def fit(self, texts: Sequence[Any], y: Any = None) -> TextFeaturizer:
        """Measure the median norms on `texts`, unless they were given."""
        self.median_norms_ = self.median_norms or self.with_norms(self.features(texts)).median_norms
        return self

    def transform(self, texts: Sequence[Any]) -> csr_array:
        """[texts, sum of the d_sae], the layers side by side in ascending order; `layer_widths` says which is which."""
        norms = getattr(self, "median_norms_", self.median_norms)
        return stack(self._copy(median_norms=norms).features(texts))[0]

    @property
    def layer_widths(self) -> dict[int, int]:
        """{layer: d_sae}, for `FeatureClassifier(layer_widths=...)` on what `transform` returns."""
        return {layer: sae.d_sae for layer, sae in sorted(self.saes.items())}

    def settings(self) -> dict[str, Any]:
        """What changes the features of a text, besides model and SAEs; JSON values, layers as whole numbers."""
        norms = None if self.median_norms is None else dict(self.median_norms)
        return {
            "pooling": self.pooling,
            "max_length": self.max_length,
            "outlier_factor": self.outlier_factor,
            "median_norms": norms,
        }

    def origin(self) -> dict[str, Any]:
        """Identity of the model, and where its SAEs came from; JSON values."""
        saes = {str(layer): asdict(sae.source) for layer, sae in sorted(self.saes.items())}
        return {"model": model_shape(self.model), "saes": saes}

    def _copy(self, **changes: Any) -> TextFeaturizer:
        return type(self)(**{**self.get_params(deep=False), **changes})

    def __sklearn_clone__(self) -> TextFeaturizer:
        return self._copy()


def are_texts(value: Any) -> bool:
    """Whether `value` is a sequence of strings or `TokenText`s: not features."""
    if isinstance(value, Mapping | str) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        return False
    if hasattr(value, "shape") and len(value.shape) != 1:
        return False
    if not len(value):
        return False
    first = value.iloc[0] if hasattr(value, "iloc") else value[0]
    return isinstance(first, str | np.str_ | TokenText)
