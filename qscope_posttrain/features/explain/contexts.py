"""Contexts in which chosen features fire, and in which they do not: one pass, a bounded number of each kept."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.batches import (
    Text,
    TokenBatch,
    TokenSequence,
    check_texts,
    longest_allowed,
    pad_token,
    token_batches,
    tokenize_texts,
)
from qscope_posttrain.models.calibration import calibrate, calibration_sample, layer_rows
from qscope_posttrain.models.layers import check_layers, evaluation_mode
from qscope_posttrain.report.progress import progress
from qscope_posttrain.sae.autoencoder import SparseAutoencoder


@dataclass(frozen=True)
class Context:
    """A window of one text, and what one feature does in it."""

    text: int
    """Position of the text among those that were read"""
    ids: tuple[int, ...]
    """Token ids of the window"""
    values: tuple[float, ...]
    """Activation at each of them; 0 where the feature does not fire or the token does not count"""

    @property
    def peak(self) -> float:
        return max(self.values)


@dataclass(frozen=True)
class ContextSettings:
    """How many contexts are kept of a feature, and how long they are."""

    top: int = 10
    """Texts on which it fires most strongly"""
    sampled: int = 100
    """Texts drawn at random from all on which it fires"""
    absent: int = 40
    """Windows in which it does not fire"""
    window: int = 32
    """Tokens of a context"""
    before: int = 24
    """Tokens of it that stand before its centre: the strongest token, or any where it does not fire"""
    seed: int = 0
    """Of what is drawn"""

    def __post_init__(self) -> None:
        if min(self.top, self.sampled, self.absent) < 1:
            raise UserValueError("top, sampled and absent must be at least 1.")
        if not 0 <= self.before < self.window:
            raise UserValueError(f"before must lie in 0..{self.window - 1}, within the window; got {self.before}.")


@dataclass(frozen=True)
class FeatureContexts:
    """What was kept of one feature. No two contexts of a list come from the same text."""

    layer: int
    feature_id: int
    firing_texts: int
    """Distinct texts on which it fires"""
    texts: int
    """Distinct texts read"""
    top: tuple[Context, ...]
    """Strongest first"""
    sampled: tuple[Context, ...]
    """A uniform draw, in random order"""
    absent: tuple[Context, ...]
    """A uniform draw, in random order; all values are 0"""


def collect_contexts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    saes: Mapping[int, SparseAutoencoder],
    feature_ids: Mapping[int, Sequence[int]],
    settings: ContextSettings | None = None,
    *,
    tokens_per_batch: int = 4096,
    max_length: int = 512,
    outlier_factor: float = 10.0,
    show_progress: bool | None = None,
) -> list[FeatureContexts]:
    """Contexts of the features `feature_ids` {layer: ids}, in the order of layers and ids.

    One pass over the texts. Equal texts are read once; what is drawn depends on their content and the seed alone, not
    on their order or the batches. The first token of a text and norm outliers do not count, as in
    `text_features.collect_text_features`. Memory: top + sampled windows of each feature, and 4 * absent that they
    share.

    Raises:
        TypeError, ValueError: no texts, a layer without an SAE or out of range, an id that the SAE does not have.
    """
    settings = settings or ContextSettings()
    check_texts({"texts": texts})
    layers = check_layers(model, sorted(feature_ids))
    slots = {layer: _slots(layer, saes, feature_ids[layer]) for layer in layers}
    distinct: dict[bytes, TokenSequence] = {}
    for sequence in tokenize_texts(tokenizer, {"texts": texts}, longest_allowed(model, max_length)):
        distinct.setdefault(sequence.content_hash(), sequence)
    sequences = [sequence for sequence in distinct.values() if sequence.counted]
    pad_id = pad_token(tokenizer)
    pool = _AbsentPool(settings)
    kept = {(layer, feature): _Kept(settings) for layer in layers for feature in feature_ids[layer]}
    with evaluation_mode(model), torch.no_grad():
        sample = token_batches(calibration_sample(sequences)[0], tokens_per_batch, pad_id)
        medians = calibrate(model, layers, sample).medians
        batches = token_batches(sequences, tokens_per_batch, pad_id)
        for batch in progress(batches, description="contexts of features", enabled=show_progress):
            pool.offer(batch.sequences)
            for layer, rows, _ in layer_rows(model, layers, batch):
                limit = outlier_factor * medians[layer]
                for number, slot, positions, values in _firings(batch, rows, saes[layer], slots[layer], limit):
                    feature, sequence = int(feature_ids[layer][slot]), batch.sequences[number]
                    kept[layer, feature].offer(sequence, positions, values, f"{layer} {feature}")
                    pool.fires(sequence, positions, (layer, feature))
    return [
        FeatureContexts(
            layer=layer,
            feature_id=feature,
            firing_texts=found.texts,
            texts=len(sequences),
            top=found.top(),
            sampled=found.sampled(),
            absent=pool.without((layer, feature)),
        )
        for (layer, feature), found in kept.items()
    ]


def _slots(layer: int, saes: Mapping[int, SparseAutoencoder], ids: Sequence[int]) -> Tensor:
    """[d_sae] int64: the place of each feature among `ids`, -1 elsewhere."""
    if layer not in saes:
        raise UserValueError(f"layer {layer} has no SAE; there are SAEs of {', '.join(map(str, sorted(saes)))}.")
    width = saes[layer].d_sae
    wrong = [feature for feature in ids if not 0 <= feature < width]
    if wrong or len(set(ids)) != len(ids) or not ids:
        raise UserValueError(f"layer {layer} needs distinct feature ids from 0 to {width - 1}; got {list(ids)[:20]}.")
    slots = torch.full((width,), -1, dtype=torch.long)
    slots[torch.tensor(ids)] = torch.arange(len(ids))
    return slots


def _firings(
    batch: TokenBatch, rows: Tensor, sae: SparseAutoencoder, slots: Tensor, norm_limit: float
) -> Iterator[tuple[int, int, list[int], list[float]]]:
    """(number of the sequence, slot, positions, values) for every sequence and chosen feature that fires on it."""
    rows = rows.float()
    kept = (torch.linalg.vector_norm(rows, dim=1) <= norm_limit).cpu()
    values, indices = (part.cpu() for part in sae.encode(rows.to(sae.device, sae.dtype)))
    chosen = slots[indices.long()]
    token, entry = torch.where((chosen >= 0) & (values > 0) & kept[:, None])
    starts = torch.tensor([sequence.start for sequence in batch.sequences])
    counts = torch.tensor([sequence.counted for sequence in batch.sequences])
    owners = torch.arange(len(counts)).repeat_interleave(counts)[token]
    positions = token - (counts.cumsum(0) - counts)[owners] + starts[owners]
    width = int(slots.max()) + 1
    keys = owners * width + chosen[token, entry]
    order = torch.argsort(keys, stable=True)
    groups, sizes = keys[order].unique_consecutive(return_counts=True)
    where, what = positions[order].tolist(), values[token, entry][order].tolist()
    start = 0
    for key, size in zip(groups.tolist(), sizes.tolist(), strict=True):
        yield key // width, key % width, where[start : start + size], what[start : start + size]
        start += size


def _priority(sequence: TokenSequence, salt: str) -> float:
    """A number in [0, 1) that the content of a text and the salt decide: the smallest ones are a uniform draw."""
    digest = hashlib.sha256(sequence.content_hash() + salt.encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _window(sequence: TokenSequence, centre: int, settings: ContextSettings) -> tuple[int, int]:
    """Start and end of the window around a token, moved into the text where it would stand out of it."""
    start = max(min(centre - settings.before, len(sequence.ids) - settings.window), 0)
    return start, min(start + settings.window, len(sequence.ids))


@dataclass(order=True)
class _Ranked:
    """An entry of a heap whose smallest entry is the first to go; equal scores fall to the text's content."""

    score: float
    tie: bytes
    context: Context = field(compare=False)


class _Kept:
    """The strongest and the randomly drawn contexts of one feature so far."""

    def __init__(self, settings: ContextSettings) -> None:
        self._settings = settings
        self._top: list[_Ranked] = []
        self._drawn: list[_Ranked] = []
        self.texts = 0

    def offer(self, sequence: TokenSequence, positions: list[int], values: list[float], name: str) -> None:
        self.texts += 1
        peak = max(values)
        priority = _priority(sequence, f"{self._settings.seed} {name}")
        for heap, size, score in (
            (self._top, self._settings.top, peak),
            (self._drawn, self._settings.sampled, -priority),
        ):
            if len(heap) < size or score >= heap[0].score:
                context = self._context(sequence, positions, values, peak)
                heapq.heappush(heap, _Ranked(score, sequence.content_hash(), context))
                if len(heap) > size:
                    heapq.heappop(heap)

    def _context(self, sequence: TokenSequence, positions: list[int], values: list[float], peak: float) -> Context:
        start, end = _window(sequence, positions[values.index(peak)], self._settings)
        at = dict(zip(positions, values, strict=True))
        shown = tuple(at.get(position, 0.0) for position in range(start, end))
        return Context(sequence.text, sequence.ids[start:end], shown)

    def top(self) -> tuple[Context, ...]:
        return tuple(entry.context for entry in sorted(self._top, reverse=True))

    def sampled(self) -> tuple[Context, ...]:
        return tuple(entry.context for entry in sorted(self._drawn, reverse=True))


@dataclass
class _PoolEntry:
    """A window drawn without looking at any feature, and the features seen to fire in it."""

    context: Context
    start: int
    end: int
    firing: set[tuple[int, int]] = field(default_factory=set)


class _AbsentPool:
    """Random windows that all features share: a feature takes those in which it does not fire."""

    def __init__(self, settings: ContextSettings) -> None:
        self._settings = settings
        self._size = 4 * settings.absent
        self._entries: dict[bytes, tuple[float, _PoolEntry]] = {}

    def offer(self, sequences: Sequence[TokenSequence]) -> None:
        """Take in what belongs to the pool, before any firing of these sequences is told."""
        for sequence in sequences:
            centre = sequence.start + int(_priority(sequence, f"{self._settings.seed} centre") * sequence.counted)
            start, end = _window(sequence, centre, self._settings)
            context = Context(sequence.text, sequence.ids[start:end], (0.0,) * (end - start))
            priority = _priority(sequence, f"{self._settings.seed} absent")
            self._entries[sequence.content_hash()] = (priority, _PoolEntry(context, start, end))
        while len(self._entries) > self._size:
            del self._entries[max(self._entries, key=lambda key: self._entries[key][0])]

    def fires(self, sequence: TokenSequence, positions: Sequence[int], feature: tuple[int, int]) -> None:
        found = self._entries.get(sequence.content_hash())
        if found is not None and any(found[1].start <= position < found[1].end for position in positions):
            found[1].firing.add(feature)

    def without(self, feature: tuple[int, int]) -> tuple[Context, ...]:
        ordered = sorted(self._entries.values(), key=lambda entry: entry[0])
        free = [entry.context for _, entry in ordered if feature not in entry.firing]
        return tuple(free[: self._settings.absent])
