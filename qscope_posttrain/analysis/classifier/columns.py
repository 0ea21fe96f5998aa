"""The features of several layers side by side in one matrix, so that whatever splits rows needs to know one thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array, hstack

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.text_features import TextFeatures


@dataclass(frozen=True)
class LayerColumns:
    """Which columns belong to which layer."""

    layers: tuple[int, ...]
    """Ascending"""
    widths: tuple[int, ...]
    """Features of each"""

    @classmethod
    def from_widths(cls, widths: Mapping[int, int]) -> LayerColumns:
        """From {layer: width}.

        Raises:
            ValueError: no layer, or a number that is none.
        """
        pairs = sorted((_whole(layer, 0, "a layer"), _whole(width, 1, "a width")) for layer, width in widths.items())
        if not pairs:
            raise UserValueError("layer_widths must name at least one layer.")
        return cls(tuple(layer for layer, _ in pairs), tuple(width for _, width in pairs))

    @property
    def total(self) -> int:
        return sum(self.widths)

    def slice(self, layer: int) -> slice:
        """The columns of a layer.

        Raises:
            ValueError: no such layer.
        """
        if layer not in self.layers:
            raise UserValueError(
                f"there are no features of layer {layer}; there are of {', '.join(map(str, self.layers))}."
            )
        place = self.layers.index(layer)
        start = sum(self.widths[:place])
        return slice(start, start + self.widths[place])

    def owner(self, column: int) -> tuple[int, int]:
        """(layer, feature id) of a column."""
        for layer in self.layers:
            part = self.slice(layer)
            if column < part.stop:
                return layer, column - part.start
        raise UserValueError(f"column {column} is beyond the {self.total} columns.")


def stack(features: Mapping[int, Any]) -> tuple[csr_array, LayerColumns]:
    """Side by side: `{layer: TextFeatures, or a matrix [texts, features]}`, in the order of the layers.

    Raises:
        ValueError: no layer, or layers with different numbers of texts.
    """
    matrices = {
        layer: found.matrix() if isinstance(found, TextFeatures) else csr_array(found)
        for layer, found in sorted(features.items())
    }
    columns = LayerColumns.from_widths({layer: matrix.shape[1] for layer, matrix in matrices.items()})
    counts = {layer: matrix.shape[0] for layer, matrix in matrices.items()}
    if len(set(counts.values())) > 1:
        raise UserValueError(f"layers must have the features of the same texts; they have {counts}.")
    return csr_array(hstack(list(matrices.values()), format="csr")), columns


def take_texts(features: TextFeatures, rows: Sequence[int]) -> TextFeatures:
    """The features of some texts, in the given order."""
    import torch

    index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
    part = csr_array(features.matrix()[index.numpy()])
    return TextFeatures(
        offsets=torch.from_numpy(part.indptr.astype(np.int64)),
        indices=torch.from_numpy(part.indices.astype(np.int32)),
        values=torch.from_numpy(part.data),
        d_sae=features.d_sae,
        tokens=features.tokens[index],
        truncated=features.truncated[index],
        residual=None if features.residual is None else features.residual[index],
        median_norm=features.median_norm,
    )


def _whole(value: Any, least: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UserValueError(f"{what} must be a whole number from {least} on, got {value!r}.")
    return int(value)
