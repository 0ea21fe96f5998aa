"""Collect the set of features that each item of a benchmark fires: F(x) (Eq. 2), and their union F(D) (Eq. 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from qscope_posttrain.analysis.benchmarks.items import BenchmarkItems
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.text_features import Pooling, collect_text_features
from qscope_posttrain.models.batches import longest_allowed
from qscope_posttrain.report.progress import status
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

ITEMS_AT_ONCE = 1024  # Number of items whose activations, not only feature ids, are held in memory


@dataclass(frozen=True, eq=False)
class ItemFeatures:
    """The feature sets of the N items of one benchmark in one layer.

    Memory: 4 bytes per feature of an item and 24 bytes per item. With a top-k SAE and the last token an item has at
    most k features; with other poolings min(k * tokens, d_sae). No array has N times d_sae entries.
    """

    name: str
    offsets: NDArray[np.int64]  # [N + 1]: the features of item n are indices[offsets[n] : offsets[n + 1]]
    indices: NDArray[np.int32]  # [entries], distinct within an item
    width: int  # d_sae
    texts: NDArray[np.int64]  # [N]: equal for items with the same text, in this benchmark or between benchmarks
    units: NDArray[np.int64]  # [N]: equal for items that are one observation: the same text, or translations of one
    cut: int = 0  # Number of items that were too long, of which only the end was read

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def from_sets(
        cls,
        name: str,
        sets: Sequence[Sequence[int]],
        width: int,
        texts: ArrayLike | None = None,
        units: ArrayLike | None = None,
    ) -> ItemFeatures:
        """Make from lists of feature ids. By default every text is unlike any other, and a unit of its own."""
        distinct = [np.unique(np.asarray(list(entry), dtype=np.int64)) for entry in sets]
        indices = np.concatenate([*distinct, np.zeros(0, dtype=np.int64)])
        if indices.size and not 0 <= indices.min() <= indices.max() < width:
            raise UserValueError(f"features are 0 to {width - 1}, got {indices.min()} to {indices.max()} in '{name}'.")
        said = np.asarray(fingerprints([f"{name}/{n}" for n in range(len(distinct))]) if texts is None else texts)
        unit = said if units is None else np.asarray(units)
        offsets = np.concatenate([[0], np.cumsum([len(entry) for entry in distinct])])
        return cls(name, offsets.astype(np.int64), indices.astype(np.int32), width, said, unit)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """[width]: number of items that fire each feature."""
        return np.bincount(self.indices, minlength=self.width)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[N]: number of features of each item."""
        return np.diff(self.offsets)

    @property
    def features(self) -> int:
        """|F(D)|."""
        return int(np.count_nonzero(self.counts))

    @property
    def empty(self) -> int:
        """Number of items that fire nothing: those of one token, or whose last token is a norm outlier."""
        return int(np.count_nonzero(self.sizes == 0))

    def item(self, number: int) -> NDArray[np.int32]:
        """F(x), ascending."""
        return self.indices[self.offsets[number] : self.offsets[number + 1]]

    def sum_over_features(self, weights: ArrayLike) -> NDArray[np.float64]:
        """[N]: sum of `weights` [width] over the features of each item."""
        entries = np.asarray(weights, dtype=np.float64)[self.indices]
        owners = np.repeat(np.arange(len(self)), self.sizes)
        return np.bincount(owners, weights=entries, minlength=len(self)).astype(np.float64)

    def leave_one_out(self, kept: NDArray[Any], fewer: NDArray[Any]) -> NDArray[np.float64]:
        """[N]: a sum over all features, without each item in turn. `kept` [width] is the term of a feature that the
        item left out does not fire, `fewer` that of one that it fires, whose count is then smaller by one."""
        kept, fewer = kept.astype(np.float64), fewer.astype(np.float64)
        return kept.sum() + self.sum_over_features(fewer - kept)

    def select(self, keep: ArrayLike) -> ItemFeatures:
        """The items at the positions `keep`, or where a mask `keep` [N] is true."""
        chosen = np.arange(len(self))[np.asarray(keep)]
        starts, sizes = self.offsets[chosen], self.sizes[chosen]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        indices = self.indices[np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)]
        return replace(self, offsets=offsets, indices=indices, texts=self.texts[chosen], units=self.units[chosen])

    def also_in(self, other: ItemFeatures) -> NDArray[np.bool_]:
        """[N]: whether the other benchmark has an item with the same text."""
        return np.isin(self.texts, other.texts)


def collect_item_features(
    model: nn.Module,
    tokenizer: Any,
    benchmarks: Sequence[BenchmarkItems],
    saes: Mapping[int, SparseAutoencoder],
    *,
    pooling: Pooling = "last",
    max_length: int = 2048,
    tokens_per_batch: int = 4096,
    items_at_once: int = ITEMS_AT_ONCE,
    show_progress: bool | None = None,
) -> dict[int, list[ItemFeatures]]:
    """Collect the feature sets of every benchmark, in their order, by layer, `items_at_once` items at a time.

    An item longer than `max_length` tokens (or than the model allows) keeps its first token and its END, so that the
    last token is the last of the item. The median norm of the first items read decides about norm outliers in all
    benchmarks. Otherwise as `collect_text_features`.
    """
    longest = longest_allowed(model, max_length)
    options: dict[str, Any] = {"pooling": pooling, "max_length": longest}
    options |= {"tokens_per_batch": tokens_per_batch, "show_progress": show_progress}
    found: dict[int, list[ItemFeatures]] = {layer: [] for layer in sorted(saes)}
    norms: dict[int, float] | None = None
    for benchmark in benchmarks:
        status(f"{benchmark.name}: {len(benchmark.texts)} items", show_progress)
        parts: dict[int, list[tuple[NDArray[np.int64], NDArray[np.int32]]]] = {layer: [] for layer in found}
        cut = 0
        for part in _parts(benchmark.texts, items_at_once):
            ids = [list(entry) for entry in tokenizer(list(part), verbose=False)["input_ids"]]
            cut += sum(len(entry) > longest for entry in ids)
            ends = [entry if len(entry) <= longest else entry[:1] + entry[1 - longest :] for entry in ids]
            read = collect_text_features(model, tokenizer, ends, saes, median_norms=norms, **options)
            norms = {layer: features.median_norm for layer, features in read.items()}
            for layer, features in read.items():
                parts[layer].append((np.diff(features.matrix.indptr), features.matrix.indices))
        texts, units = fingerprints(benchmark.plain_texts()), fingerprints(benchmark.units)
        for layer, pieces in parts.items():
            sizes = np.concatenate([size for size, _ in pieces])
            offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
            indices = np.concatenate([index for _, index in pieces]).astype(np.int32)
            found[layer].append(ItemFeatures(benchmark.name, offsets, indices, saes[layer].d_sae, texts, units, cut))
    return found


def token_sets(tokenizer: Any, benchmarks: Sequence[BenchmarkItems]) -> list[ItemFeatures]:
    """Control without a model and SAE: the distinct token ids of each item in place of its features."""
    return [
        ItemFeatures.from_sets(
            benchmark.name,
            [ids for part in _parts(benchmark.texts, ITEMS_AT_ONCE) for ids in tokenizer(list(part))["input_ids"]],
            len(tokenizer),
            fingerprints(benchmark.plain_texts()),
            fingerprints(benchmark.units),
        )
        for benchmark in benchmarks
    ]


def fingerprints(keys: Sequence[str]) -> NDArray[np.int64]:
    """[N] 64 bits of the SHA-256 of each key."""
    digests = [sha256(key.encode("utf-8", errors="surrogatepass")).digest()[:8] for key in keys]
    return np.frombuffer(b"".join(digests), dtype=np.int64)


def _parts(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))
