"""Testing an explanation by prediction: which contexts are shown, which are held out, and what a judge makes of them.

After Paulo et al. 2025 ("Automatically Interpreting Millions of Features in Large Language Models"): detection asks
whether a feature is active in a context, fuzzing whether the marked tokens are the ones that it is active on.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qscope_posttrain.endpoint.chat import ChatRequest, Sampling
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.endpoint.templates import PromptTemplates, read_json
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.explain.contexts import Context, FeatureContexts
from qscope_posttrain.features.explain.explanation import FeatureId, Prediction
from qscope_posttrain.features.explain.token_view import marked, text_pieces

Method = Literal["detection", "fuzzing"]
QUANTILES = 10
"""Contexts drawn at random are taken evenly from so many bands of activation, so that weak ones are tested too."""


@dataclass(frozen=True)
class Split:
    """The contexts of one feature: what its explainer sees, and what is held out. They share no text."""

    strongest: tuple[Context, ...]
    others: tuple[Context, ...]
    tests: tuple[Context, ...]
    absent: tuple[Context, ...]


def split_contexts(contexts: FeatureContexts, strongest: int, others: int, tests: int) -> Split:
    """Show the strongest and `others` from the bands; of what is left, hold out `tests`, from the bands too."""
    top = contexts.top[:strongest]
    seen = {context.text for context in top}
    drawn = from_bands([context for context in contexts.sampled if context.text not in seen])
    # Tests come first: with few contexts an explanation that nobody can test is worth less than one made from fewer.
    held_out = drawn[:tests]
    shown = drawn[len(held_out) : len(held_out) + others]
    texts = seen | {context.text for context in shown}
    absent = tuple(context for context in contexts.absent if context.text not in texts)[:tests]
    return Split(top, tuple(shown), tuple(held_out), absent)


def from_bands(contexts: Sequence[Context]) -> list[Context]:
    """All contexts in an order in which every stretch of ten holds one from each tenth of the activations.

    Within a band the given order is kept, which is random for a random draw.
    """
    ranked = sorted(range(len(contexts)), key=lambda index: -contexts[index].peak)
    edges = [band * len(ranked) // QUANTILES for band in range(QUANTILES + 1)]
    bands = [sorted(ranked[start:stop]) for start, stop in itertools.pairwise(edges)]
    longest = max(map(len, bands), default=0)
    return [contexts[band[place]] for place in range(longest) for band in bands if place < len(band)]


@dataclass(frozen=True)
class Item:
    """One context as a judge reads it, and what is right."""

    text: str
    positive: bool


def detection_items(tokenizer: Any, split: Split) -> list[Item]:
    """Contexts in which the feature fires, and as many in which it does not; nothing is marked."""
    count = min(len(split.tests), len(split.absent))
    found = [Item(_text(tokenizer, context), True) for context in split.tests[:count]]
    return found + [Item(_text(tokenizer, context), False) for context in split.absent[:count]]


def fuzzing_items(tokenizer: Any, split: Split, name: str) -> list[Item]:
    """Contexts in which it fires: half with the firing pieces marked, half with as many others, drawn at random.

    Where a context has too few others, all of them are marked.
    """
    found: list[Item] = []
    mixed = list(split.tests)
    random.Random(name).shuffle(mixed)
    for number, context in enumerate(mixed):
        pieces, values = text_pieces(tokenizer, context.ids, context.values)
        right = number % 2 == 0
        if not right:
            quiet = [place for place, value in enumerate(values) if value == 0]
            firing = len(values) - len(quiet)
            chosen = random.Random(f"{name} {number}").sample(quiet, min(firing, len(quiet)))
            values = [float(place in chosen) for place in range(len(values))]
        if any(values):
            found.append(Item(marked(pieces, values), right))
    return found


def predict(
    session: ChatSession,
    templates: PromptTemplates,
    method: Method,
    tests: Mapping[FeatureId, Sequence[Item]],
    explanations: Mapping[FeatureId, str],
    *,
    per_request: int = 5,
    seed: int = 0,
    max_tokens: int = 256,
) -> dict[FeatureId, Prediction]:
    """Let the judge decide on every item by the words given for its feature.

    Items that the judge's answers leave undecided, also when asked again, count nowhere.
    """
    asked: list[tuple[FeatureId, list[Item]]] = []
    for feature, items in tests.items():
        mixed = list(items)
        random.Random(f"{seed} {feature}").shuffle(mixed)
        asked += [(feature, mixed[start : start + per_request]) for start in range(0, len(mixed), per_request)]
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
    decided: dict[FeatureId, list[tuple[Item, bool]]] = {feature: [] for feature in tests}
    # Requests of one length are read by one reader.
    for length in sorted({len(items) for _, items in asked}):
        group = [entry for entry in asked if len(entry[1]) == length]
        requests = [
            ChatRequest(
                templates.messages(method, explanation=explanations[feature], passages=[item.text for item in items]),
                sampling,
            )
            for feature, items in group
        ]
        answers = session.complete_parsed(requests, decisions(length), description=f"{method} of contexts")
        for (feature, items), answer in zip(group, answers, strict=True):
            if answer.value is not None:
                decided[feature] += zip(items, answer.value, strict=True)
    return {feature: _prediction(found) for feature, found in decided.items()}


def decisions(count: int) -> Callable[[str], list[bool]]:
    """A reader of answers such as `[0, 1, 1]`; ValueError where there are not `count` decisions."""

    def read(text: str) -> list[bool]:
        found = read_json(text)
        if not isinstance(found, list) or len(found) != count or any(value not in (0, 1) for value in found):
            raise UserValueError(f"expected a list of {count} zeros and ones, got {str(found)[:200]}.")
        return [bool(value) for value in found]

    return read


def _prediction(decided: Sequence[tuple[Item, bool]]) -> Prediction:
    positives = [taken for item, taken in decided if item.positive]
    negatives = [taken for item, taken in decided if not item.positive]
    return Prediction(sum(positives), len(positives), len(negatives) - sum(negatives), len(negatives))


def _text(tokenizer: Any, context: Context) -> str:
    return "".join(text_pieces(tokenizer, context.ids, context.values)[0])
