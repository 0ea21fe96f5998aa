"""What a feature fires on: the passages with its highest activations, and the tokens on which it is strongest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.testbed.language_model import LanguageModel
from qscope_posttrain.testbed.tokenizer import decode
from qscope_posttrain.testbed.windows import Windows

_BATCH = 32
_MIN_OCCURRENCES = 3
_PASSAGE_TOKENS = 40
_BYTES_IN_A_CHARACTER = 4


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens of one window and a feature's activation on each; halves of a character count as one."""

    language: str
    tokens: tuple[str, ...]
    activations: tuple[float, ...]


@dataclass(frozen=True)
class FeatureContexts:
    """Where one feature fires."""

    feature: int
    passages: tuple[Passage, ...]
    """The windows with the highest single activations, one passage each, strongest first."""
    tokens: tuple[tuple[str, float], ...]
    """Token and its mean activation, for tokens seen at least three times, strongest first."""


def feature_contexts(
    language_model: LanguageModel,
    sae: SparseAutoencoder,
    layer: int,
    features: Sequence[int],
    windows: Windows,
    passages: int = 3,
    tokens: int = 12,
) -> list[FeatureContexts]:
    """Run `windows` through the model and look where `features` of `sae` fire; the first token of a window is left out.

    Args:
        language_model: the testbed's model.
        sae: the dictionary of `layer`.
        layer: decoder layer, from 0.
        features: feature ids.
        windows: text to look at.
        passages: passages per feature.
        tokens: tokens per feature.
    """
    activations: dict[int, list[list[float]]] = {feature: [] for feature in features}
    for batch in windows.input_ids.split(_BATCH):
        hidden = forward_to_layer(language_model.model, [layer], input_ids=batch)[layer]
        values, indices = sae.encode(hidden.flatten(0, 1))
        for feature in features:
            fired = (values * (indices == feature)).sum(-1).view(batch.shape)
            fired[:, 0] = 0
            activations[feature] += fired.tolist()
    return [
        FeatureContexts(
            feature,
            tuple(_passages(language_model, windows, activations[feature], passages)),
            tuple(_tokens(language_model, windows, activations[feature], tokens)),
        )
        for feature in features
    ]


def _passages(
    language_model: LanguageModel, windows: Windows, activations: Sequence[Sequence[float]], count: int
) -> list[Passage]:
    """The neighbourhood of the strongest activation in each of the `count` strongest windows."""
    order = sorted(range(len(windows)), key=lambda row: max(activations[row]), reverse=True)[:count]
    found = []
    for row in order:
        values = activations[row]
        peak = max(range(len(values)), key=values.__getitem__)
        start = min(max(0, peak - _PASSAGE_TOKENS // 2), max(0, len(values) - _PASSAGE_TOKENS))
        span = slice(start, start + _PASSAGE_TOKENS)
        texts, peaks = _whole_characters(language_model, windows.input_ids[row, span].tolist(), values[span])
        found.append(Passage(windows.languages[row], tuple(texts), tuple(peaks)))
    return found


def _whole_characters(
    language_model: LanguageModel, tokens: Sequence[int], values: Sequence[float]
) -> tuple[list[str], list[float]]:
    """Texts of the tokens, those that only together write a character joined, with the largest of their values."""
    texts: list[str] = []
    peaks: list[float] = []
    pending: list[int] = []
    peak = 0.0
    for token, value in zip(tokens, values, strict=True):
        pending.append(token)
        peak = max(peak, value)
        text = decode(language_model.tokenizer, pending)
        if "\N{REPLACEMENT CHARACTER}" in text and len(pending) < _BYTES_IN_A_CHARACTER:
            continue
        texts.append(text)
        peaks.append(peak)
        pending, peak = [], 0.0
    return texts, peaks


def _tokens(
    language_model: LanguageModel, windows: Windows, activations: Sequence[Sequence[float]], count: int
) -> list[tuple[str, float]]:
    """Mean activation per vocabulary entry, the highest first."""
    seen: dict[int, list[float]] = defaultdict(list)
    for row, values in zip(windows.input_ids.tolist(), activations, strict=True):
        for token, value in zip(row[1:], values[1:], strict=True):
            seen[token].append(value)
    means = [(token, sum(values) / len(values)) for token, values in seen.items() if len(values) >= _MIN_OCCURRENCES]
    strongest = sorted(means, key=lambda entry: entry[1], reverse=True)[:count]
    return [(decode(language_model.tokenizer, [token]), mean) for token, mean in strongest if mean > 0]
