"""Contexts in which chosen features fire, and in which they do not: collected in one pass, a bounded number of each,
and shown token by token."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import FREE_DIRECTION
from qscope_posttrain.models import batches
from qscope_posttrain.models.batches import Text, TokenBatch, TokenSequence
from qscope_posttrain.models.calibration import calibrate, calibration_sample, layer_rows
from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.models.layers import check_layers, evaluation_mode
from qscope_posttrain.report.html import ShadedText, ShadedTexts
from qscope_posttrain.report.progress import progress
from qscope_posttrain.sae.autoencoder import SparseAutoencoder


@dataclass(frozen=True)
class Context:
    """A window of one text, with the activation of one feature at each token."""

    text: int  # Position of the text among those that were read
    ids: tuple[int, ...]  # Token ids of the window
    values: tuple[float, ...]  # Activation at each; 0 where it does not fire or the token does not count

    @property
    def peak(self) -> float:
        return max(self.values)


@dataclass(frozen=True)
class ContextSettings:
    """Number and length of the contexts that are kept per feature."""

    top: int = 10  # Texts on which it fires most strongly
    sampled: int = 100  # Texts drawn at random from all on which it fires
    absent: int = 40  # Windows in which it does not fire
    window: int = 32  # Length of a context in tokens
    before: int = 24  # Number of them before its center: the strongest token, or any where it does not fire
    seed: int = 0  # Seed of the draws

    def __post_init__(self) -> None:
        if min(self.top, self.sampled, self.absent) < 1:
            raise UserValueError("top, sampled and absent must be at least 1.")
        if not 0 <= self.before < self.window:
            raise UserValueError(f"before must lie in 0..{self.window - 1}, within the window; got {self.before}.")


@dataclass(frozen=True)
class FeatureContexts:
    """Contexts of one feature. No two contexts of a list come from the same text."""

    layer: int
    feature_id: int
    firing_texts: int  # Distinct texts on which it fires
    texts: int  # Distinct texts read
    top: tuple[Context, ...]  # Strongest first
    sampled: tuple[Context, ...]  # A uniform draw, in random order
    absent: tuple[Context, ...]  # A uniform draw, in random order; all values are 0


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

    One pass over the texts. Equal texts are read once; the draw depends on their content and the seed alone, not on
    their order or the batches. The first token of a text and norm outliers do not count, as in
    `text_features.collect_text_features`. Memory: top + sampled windows of each feature, and 4 * absent that they
    share.
    """
    settings = settings or ContextSettings()
    batches.check_texts({"texts": texts})
    layers = check_layers(model, sorted(feature_ids))
    slots = {layer: _slots(layer, saes, feature_ids[layer]) for layer in layers}
    distinct: dict[bytes, TokenSequence] = {}
    for sequence in batches.tokenize_texts(tokenizer, {"texts": texts}, batches.longest_allowed(model, max_length)):
        distinct.setdefault(sequence.content_hash(), sequence)
    sequences = [sequence for sequence in distinct.values() if sequence.counted]
    pad_id = batches.pad_token(tokenizer)
    features = [(layer, feature) for layer in layers for feature in feature_ids[layer]]
    top = {feature: _Best() for feature in features}
    drawn = {feature: _Best() for feature in features}
    absent = _Best()
    firing_texts = Counter[tuple[int, int]]()
    with evaluation_mode(model), torch.no_grad():
        sample = batches.token_batches(calibration_sample(sequences)[0], tokens_per_batch, pad_id)
        medians = calibrate(model, layers, sample).medians
        every = batches.token_batches(sequences, tokens_per_batch, pad_id)
        for batch in progress(every, description="contexts of features", enabled=show_progress):
            anywhere = [_any_window(sequence, settings) for sequence in batch.sequences]
            for sequence, entry in zip(batch.sequences, anywhere, strict=True):
                score = -_priority(sequence, f"{settings.seed} absent")
                absent.offer(4 * settings.absent, score, sequence.content_hash(), entry)
            for layer, rows, _ in layer_rows(model, layers, batch):
                limit = outlier_factor * medians[layer]
                for number, slot, positions, values in _firings(batch, rows, saes[layer], slots[layer], limit):
                    feature, sequence = (layer, int(feature_ids[layer][slot])), batch.sequences[number]
                    window, _, firing = anywhere[number]
                    if any(position in window for position in positions):
                        firing.add(feature)
                    firing_texts[feature] += 1
                    peak, key = max(values), sequence.content_hash()
                    shown = _window(sequence, positions[values.index(peak)], settings)
                    at = dict(zip(positions, values, strict=True))
                    ids = sequence.ids[shown.start : shown.stop]
                    context = Context(sequence.text, ids, tuple(at.get(position, 0.0) for position in shown))
                    top[feature].offer(settings.top, peak, key, context)
                    score = -_priority(sequence, f"{settings.seed} {layer} {feature[1]}")
                    drawn[feature].offer(settings.sampled, score, key, context)
    found = []
    for feature in features:
        free = [context for _, context, firing in absent.entries() if feature not in firing][: settings.absent]
        best, random = top[feature].entries(), drawn[feature].entries()
        found.append(
            FeatureContexts(*feature, firing_texts[feature], len(sequences), tuple(best), tuple(random), tuple(free))
        )
    return found


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


def _window(sequence: TokenSequence, center: int, settings: ContextSettings) -> range:
    """Positions of the window around a token, moved into the text where it would stand out of it."""
    start = max(min(center - settings.before, len(sequence.ids) - settings.window), 0)
    return range(start, min(start + settings.window, len(sequence.ids)))


def _any_window(sequence: TokenSequence, settings: ContextSettings) -> tuple[range, Context, set[tuple[int, int]]]:
    """A random window, which all features share: a feature takes it if it is not in the set of those that fire there,
    empty at first."""
    center = sequence.start + int(_priority(sequence, f"{settings.seed} centre") * sequence.counted)
    window = _window(sequence, center, settings)
    context = Context(sequence.text, sequence.ids[window.start : window.stop], (0.0,) * len(window))
    return window, context, set()


class _Best(list[tuple[float, bytes, Any]]):
    """A heap of the entries with the highest scores so far; equal scores are ordered by the unique key."""

    def offer(self, size: int, score: float, key: bytes, entry: Any) -> None:
        (heapq.heappush if len(self) < size else heapq.heappushpop)(self, (score, key, entry))

    def entries(self) -> list[Any]:
        """Best first."""
        return [entry for _, _, entry in sorted(self, reverse=True)]


def token_view(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    features: FeatureSet,
    saes: Mapping[int, SparseAutoencoder] | None = None,
    *,
    max_length: int = 512,
) -> list[ShadedTexts]:
    """One group of shaded texts for every row of `features`, all texts on the scale of that row.

    With the SAE of a layer a feature's value is its activation. Without, it is the positive part of the pre-activation
    `h . encoder + bias`, which a TopK SAE may have cut; so is that of a free direction.
    The first token, on which no SAE was trained, counts as 0.
    """
    features.check_model(model)
    layers = list(features.layers)
    values: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    ids: list[list[int]] = []
    with evaluation_mode(model), torch.no_grad():
        for text in texts:
            encoded = list(tokenizer(text)["input_ids"])[:max_length]
            if not encoded:
                raise UserValueError(f"a text without a token: {text!r}.")
            ids.append(encoded)
            input_ids = torch.tensor([encoded], device=batches.input_device(model))
            hidden = forward_to_layer(model, layers, input_ids=input_ids)
            for layer in layers:
                values[layer].append(_row_values(hidden[layer][0], features, layer, (saes or {}).get(layer)))
    found = []
    for layer, rows in features.layers.items():
        words = {entry.feature_id: entry.text for entry in features.explanations if entry.layer == layer}
        for number, (name, feature) in enumerate(zip(rows.names, rows.feature_ids.tolist(), strict=True)):
            passages = [
                ShadedText(*text_pieces(tokenizer, line, matrix[:, number].tolist()))
                for line, matrix in zip(ids, values[layer], strict=True)
            ]
            explained = f": {words[feature]}" if feature in words else ""
            found.append(ShadedTexts(f"layer {layer}, {name}{explained}", passages))
    return found


def _row_values(hidden: Tensor, features: FeatureSet, layer: int, sae: SparseAutoencoder | None) -> Tensor:
    """[tokens, F] of one text, on the CPU."""
    rows = features.layers[layer]
    hidden = hidden.float()
    found = (hidden.cpu() @ rows.encoder.T + rows.encoder_bias).relu()
    if sae is not None:
        values, indices = (part.cpu() for part in sae.encode(hidden.to(sae.device, sae.dtype)))
        for number, feature in enumerate(rows.feature_ids.tolist()):
            if feature != FREE_DIRECTION:
                found[:, number] = torch.where(indices == feature, values.float(), 0.0).sum(dim=1).relu()
    found[0] = 0
    return found


_INCOMPLETE = "\ufffd"


def text_pieces(tokenizer: Any, ids: Sequence[int], values: Sequence[float]) -> tuple[list[str], list[float]]:
    """(pieces, largest value of each). Tokens that are parts of one character, as in byte-level BPE, are one piece.
    Joined, the pieces are `tokenizer.decode(ids)`."""
    pieces: list[str] = []
    found: list[float] = []
    text, open_value = "", 0.0
    for position, value in enumerate(values):
        decoded = tokenizer.decode(list(ids[: position + 1]), clean_up_tokenization_spaces=False)
        open_value = max(open_value, value)
        last = position == len(values) - 1
        if (decoded.endswith(_INCOMPLETE) or not decoded.startswith(text)) and not last:
            continue
        pieces.append(decoded[len(text) :] if decoded.startswith(text) else decoded)
        found.append(open_value)
        text, open_value = decoded, 0.0
    return pieces, found


def marked(pieces: Sequence[str], values: Sequence[float]) -> str:
    """The text with runs of pieces of a value above 0 between << and >>."""
    runs = groupby(zip(pieces, values, strict=True), key=lambda pair: pair[1] > 0)
    texts = ((fires, "".join(piece for piece, _ in run)) for fires, run in runs)
    return "".join(f"<<{text}>>" if fires else text for fires, text in texts)
