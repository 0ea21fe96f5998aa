"""Labelled texts in every form that a method of the comparison reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from qscope_posttrain.analysis.classifier.columns import LayerColumns, stack
from qscope_posttrain.analysis.classifier.featurizer import TextFeaturizer
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.text_features import TextFeatures


@dataclass(frozen=True, eq=False)
class Examples:
    """N labelled texts."""

    inputs: Mapping[str, Any]
    """"features" csr [N, sum of d_sae] and "residual" [N, layers * d_model] with the layers side by side, "tokens" csr
    [N, vocabulary] counts, "length" [N, 1] tokens"""
    features: LayerColumns
    """Layers of `inputs["features"]`"""
    residual: LayerColumns
    """Layers of `inputs["residual"]`"""
    labels: NDArray[np.bool_]
    """[N] whether positive"""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Examples:
        """Some of the texts, in the given order."""
        index = np.asarray(rows, dtype=np.int64)
        inputs = {name: matrix[index] for name, matrix in self.inputs.items()}
        return Examples(inputs, self.features, self.residual, self.labels[index])


def collect_examples(featurizer: TextFeaturizer, texts: Sequence[str], labels: Sequence[bool]) -> Examples:
    """One pass over labelled texts: features, mean residual stream, and the tokens themselves.

    Raises:
        ValueError: other numbers of texts and labels, or one class only.
    """
    tokens = token_counts(token_lists(featurizer, texts), len(featurizer.tokenizer))
    return examples_from(featurizer.features(texts, residual=True), tokens, labels)


def examples_from(features: Mapping[int, TextFeatures], tokens: csr_array, labels: Sequence[bool]) -> Examples:
    """From collected features (with their residual) and token counts [N, vocabulary].

    Raises:
        ValueError: different numbers of texts, one class only, or features without residual.
    """
    flags = np.asarray(labels, dtype=bool)
    matrix, columns = stack(features)
    if not matrix.shape[0] == tokens.shape[0] == len(flags):
        raise UserValueError(
            f"{matrix.shape[0]} texts with features, {tokens.shape[0]} with tokens, {len(flags)} labels."
        )
    if flags.all() or not flags.any():
        raise UserValueError(f"{int(flags.sum())} of {len(flags)} texts are positive; both classes are needed.")
    states = {layer: found.residual for layer, found in sorted(features.items())}
    if any(state is None for state in states.values()):
        raise UserValueError("These features have no residual; collect them with residual=True.")
    residual = np.concatenate([state.numpy() for state in states.values()], axis=1)  # type: ignore[union-attr]
    widths = {layer: state.shape[1] for layer, state in states.items()}  # type: ignore[union-attr]
    inputs = {
        "features": matrix,
        "residual": residual,
        "tokens": tokens,
        "length": np.asarray(tokens.sum(axis=1), dtype=np.float64)[:, None],
    }
    return Examples(inputs, columns, LayerColumns.from_widths(widths), flags)


def token_lists(featurizer: TextFeaturizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, cut as the featurizer cuts it."""
    found = featurizer.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [list(row[: featurizer.max_length]) for row in found]


def token_counts(tokens: Sequence[Sequence[int]], vocabulary: int) -> csr_array:
    """[texts, vocabulary] how often each token occurs."""
    counts = [sorted(Counter(row).items()) for row in tokens]
    offsets = np.cumsum([0, *(len(row) for row in counts)])
    indices = np.array([token for row in counts for token, _ in row], dtype=np.int32)
    values = np.array([count for row in counts for _, count in row], dtype=np.float64)
    return csr_array((values, indices, offsets), shape=(len(tokens), vocabulary))
