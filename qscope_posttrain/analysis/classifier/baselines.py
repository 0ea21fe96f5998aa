"""What a feature classifier has to be compared with: linear probes, in the interface of scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from qscope_posttrain.analysis.classifier.columns import LayerColumns
from qscope_posttrain.errors import UserValueError


class MeanDifferenceProbe(ClassifierMixin, BaseEstimator):
    """Which class mean is nearer, along the line through both: w = mean(positive) - mean(negative).

    `decision_function` is (x - midpoint) . w, so that a text halfway between the means scores 0.
    """

    def fit(self, X: Any, y: Any) -> MeanDifferenceProbe:
        """X [texts, d_model], y two classes, the second in order being the positive one.

        Raises:
            ValueError: not two classes.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            kind = "1 class" if len(self.classes_) == 1 else f"{len(self.classes_)} classes"
            raise UserValueError(f"Only binary classification is supported: y must have two classes, got {kind}.")
        means = [X[codes == code].mean(axis=0) for code in (0, 1)]
        self.coef_ = means[1] - means[0]
        self.intercept_ = -float((means[0] + means[1]) @ self.coef_) / 2
        return self

    def decision_function(self, X: Any) -> Any:
        """[texts], above 0 for the positive class."""
        check_is_fitted(self)
        return validate_data(self, X, reset=False, dtype=np.float64) @ self.coef_ + self.intercept_

    def predict(self, X: Any) -> Any:
        """[texts] the class of each text."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(np.int64)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class LayerSlice(TransformerMixin, BaseEstimator):
    """The columns of one layer of several side by side, so that a search can choose the layer."""

    def __init__(self, columns: LayerColumns, layer: int) -> None:
        self.columns = columns
        self.layer = layer

    def fit(self, X: Any, y: Any = None) -> LayerSlice:
        """Nothing to learn."""
        return self

    def transform(self, X: Any) -> Any:
        """[texts, width of the layer]."""
        return X[:, self.columns.slice(self.layer)]

    def __sklearn_is_fitted__(self) -> bool:
        return True
