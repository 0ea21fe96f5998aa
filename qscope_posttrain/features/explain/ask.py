"""Auto-interpretation: a model explains features from their contexts, and its explanations are tested by prediction.

After Paulo et al. 2025 ("Automatically Interpreting Millions of Features in Large Language Models"): detection asks
whether a feature is active in a context, fuzzing whether the marked tokens are the ones that it is active on.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from qscope_posttrain.endpoint.chat import ChatRequest, PromptTemplates, Sampling, read_json, text_field
from qscope_posttrain.endpoint.session import ChatSession, require_one_read
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.explain.contexts import (
    Context,
    ContextSettings,
    FeatureContexts,
    collect_contexts,
    marked,
    text_pieces,
)
from qscope_posttrain.features.explain.explanation import METHODS, Explained, Explanation, FeatureId, Method, Prediction
from qscope_posttrain.models.batches import Text
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

QUANTILES = 10  # Bands of activation from which contexts are drawn evenly, so that weak ones are tested too
PER_REQUEST = 5  # Contexts per request to the judge
SAMPLING = Sampling(temperature=0.0, max_tokens=256)  # Sampling of explainer and judge


def explain_templates(folder: str | os.PathLike[str] | None = None) -> PromptTemplates:
    """`explain.jinja`, `detection.jinja` and `fuzzing.jinja`, from the user's folder where it has them."""
    return PromptTemplates(Path(__file__).parent / "templates", folder)


@dataclass(frozen=True)
class ExplainSettings:
    """Settings for explaining features and testing the explanations."""

    contexts: ContextSettings = field(default_factory=ContextSettings)  # Their numbers and lengths
    strongest: int = 10  # Strongest contexts that the explainer sees
    others: int = 10  # Contexts of all strengths that it sees beside them
    tests: int = 20  # Held-out contexts in which the feature fires, and as many in which it does not, for each score
    methods: tuple[Method, ...] = METHODS  # Tests of the explanations; empty for no test
    control: bool = True  # Score every feature by the explanation of another one too
    min_texts: int = 5  # A feature that fires on fewer distinct texts is not explained
    seed: int = 0  # Seed of the order of contexts and of the control

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown:
            raise UserValueError(f"methods are {', '.join(METHODS)}; got {', '.join(unknown)}.")
        for name in ("strongest", "tests", "min_texts"):
            if getattr(self, name) < 1:
                raise UserValueError(f"{name} must be at least 1; got {getattr(self, name)}.")


def explain_features(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    saes: Mapping[int, SparseAutoencoder],
    feature_ids: Mapping[int, Sequence[int]],
    session: ChatSession,
    settings: ExplainSettings | None = None,
    *,
    judge: ChatSession | None = None,
    templates: PromptTemplates | None = None,
    **pass_options: Any,
) -> Explained:
    """Explain the features `feature_ids` {layer: ids} and test the explanations.

    One pass over the texts (see `contexts.collect_contexts`, which takes `pass_options`), one request to `session` for
    each explanation, and for each method 2 * tests / 5 to `judge` (by default the same model, in separate requests),
    as many again for the control.
    """
    settings = settings or ExplainSettings()
    templates = templates or explain_templates()
    found = collect_contexts(model, tokenizer, texts, saes, feature_ids, settings.contexts, **pass_options)
    splits: dict[FeatureId, Split] = {}
    skipped: dict[FeatureId, str] = {}
    for entry in found:
        feature = FeatureId(entry.layer, entry.feature_id)
        if entry.firing_texts >= settings.min_texts:
            splits[feature] = split_contexts(entry, settings.strongest, settings.others, settings.tests)
        else:
            skipped[feature] = f"fires on {entry.firing_texts} of {entry.texts} texts"
    words = _explanations(session, templates, tokenizer, splits)
    skipped |= {feature: "no readable explanation" for feature in splits if feature not in words}
    unread: dict[Method, tuple[int, int]] = {}
    own: dict[Method, Mapping[FeatureId, Prediction]] = {}
    controls: dict[Method, Mapping[FeatureId, Prediction]] = {}
    others = shuffled_words(words, settings.seed) if settings.control else {}
    for method in settings.methods:
        items = detection_items if method == "detection" else fuzzing_items
        tests = {feature: items(tokenizer, splits[feature], str(feature)) for feature in words}
        asked = Counter[str]()
        own[method] = _predict(judge or session, templates, method, tests, words, settings.seed, asked)
        if others:
            controls[method] = _predict(judge or session, templates, method, tests, others, settings.seed, asked)
        unread[method] = (asked["unread"], asked.total())
    name = str(session.model.identity.get("name", ""))
    explanations = tuple(
        Explanation(*feature, text, name, *(own.get(method, {}).get(feature) for method in METHODS))
        for feature, text in words.items()
    )
    return Explained(explanations, controls, tuple(found), skipped, unread)


def shuffled_words(words: Mapping[FeatureId, str], seed: int) -> dict[FeatureId, str]:
    """Give every feature the words of another: a random cycle, so that none keeps its own. Empty for one feature."""
    order = list(words)
    if len(order) < 2:
        return {}
    random.Random(seed).shuffle(order)
    return {feature: words[other] for feature, other in zip(order, order[1:] + order[:1], strict=True)}


def _explanations(
    session: ChatSession, templates: PromptTemplates, tokenizer: Any, splits: Mapping[FeatureId, Split]
) -> dict[FeatureId, str]:
    def passages(contexts: Sequence[Context]) -> list[dict[str, Any]]:
        shown = (text_pieces(tokenizer, context.ids, context.values) for context in contexts)
        return [{"text": marked(*found), "peak": c.peak} for found, c in zip(shown, contexts, strict=True)]

    requests = []
    for split in splits.values():
        content = {"strongest": passages(split.strongest), "others": passages(split.others)}
        requests.append(ChatRequest(templates.messages("explain", **content), SAMPLING))
    answers = session.complete_parsed(requests, text_field("explanation"), description="explanations")
    require_one_read(
        answers,
        f"the chat model explained none of {len(answers)} features",
        '{"explanation": "..."}',
        "Take another model, or change explain.jinja (--templates).",
    )
    return {feature: answer.value for feature, answer in zip(splits, answers, strict=True) if answer.value is not None}


@dataclass(frozen=True)
class Split:
    """The contexts of one feature: those that its explainer sees, and those held out. They share no text."""

    strongest: tuple[Context, ...]
    others: tuple[Context, ...]
    tests: tuple[Context, ...]
    absent: tuple[Context, ...]


def split_contexts(contexts: FeatureContexts, strongest: int, others: int, tests: int) -> Split:
    """Show the strongest and `others` from the bands; of the rest, hold out `tests`, from the bands too."""
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
    """All contexts in an order in which every stretch of ten holds one from each tenth of the activations. Within a
    band the given order is kept, which is random for a random draw."""
    ranked = sorted(range(len(contexts)), key=lambda index: -contexts[index].peak)
    edges = [band * len(ranked) // QUANTILES for band in range(QUANTILES + 1)]
    bands = [sorted(ranked[start:stop]) for start, stop in itertools.pairwise(edges)]
    longest = max(map(len, bands), default=0)
    return [contexts[band[place]] for place in range(longest) for band in bands if place < len(band)]


@dataclass(frozen=True)
class Item:
    """One context as a judge reads it, and the right answer."""

    text: str
    positive: bool


def detection_items(tokenizer: Any, split: Split, name: str) -> list[Item]:
    """Contexts in which the feature fires, and as many in which it does not; nothing is marked."""
    pairs = list(zip(split.tests, split.absent, strict=False))  # as many of each
    found = [(tests, True) for tests, _ in pairs] + [(absent, False) for _, absent in pairs]
    return [Item("".join(text_pieces(tokenizer, c.ids, c.values)[0]), positive) for c, positive in found]


def fuzzing_items(tokenizer: Any, split: Split, name: str) -> list[Item]:
    """Contexts in which it fires: half with the firing pieces marked, half with as many others, drawn at random. Where
    a context has too few others, all of them are marked."""
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


def _predict(
    session: ChatSession,
    templates: PromptTemplates,
    method: Method,
    tests: Mapping[FeatureId, Sequence[Item]],
    explanations: Mapping[FeatureId, str],
    seed: int,
    count: Counter[str],
) -> dict[FeatureId, Prediction]:
    """Let the judge decide on every item by the words given for its feature. Items that the judge's answers leave
    undecided, also when asked again, count nowhere; `count` has the requests that were read and unread."""
    asked: list[tuple[FeatureId, list[Item]]] = []
    for feature, items in tests.items():
        mixed = list(items)
        random.Random(f"{seed} {feature}").shuffle(mixed)
        asked += [(feature, mixed[start : start + PER_REQUEST]) for start in range(0, len(mixed), PER_REQUEST)]
    # How often the judge said yes and no, by feature and right answer.
    counts: Counter[tuple[FeatureId, bool, bool]] = Counter()
    # Requests of one length are read by one reader.
    for length in sorted({len(items) for _, items in asked}):
        group = [entry for entry in asked if len(entry[1]) == length]
        requests = []
        for feature, items in group:
            content = {"explanation": explanations[feature], "passages": [item.text for item in items]}
            requests.append(ChatRequest(templates.messages(method, **content), SAMPLING))
        answers = session.complete_parsed(requests, decisions(length), description=f"{method} of contexts")
        for (feature, items), answer in zip(group, answers, strict=True):
            count["unread" if answer.value is None else "read"] += 1
            if answer.value is not None:
                counts.update((feature, item.positive, said) for item, said in zip(items, answer.value, strict=True))
    found = {}
    for feature in tests:
        hits, misses, alarms, rejections = (
            counts[feature, positive, said] for positive in (True, False) for said in (True, False)
        )
        found[feature] = Prediction(hits, hits + misses, rejections, alarms + rejections)
    return found


def decisions(count: int) -> Callable[[str], list[bool]]:
    """A reader of answers such as `[0, 1, 1]`; ValueError where there are not `count` decisions."""

    def read(text: str) -> list[bool]:
        found = read_json(text)
        if not isinstance(found, list) or len(found) != count or any(value not in (0, 1) for value in found):
            raise UserValueError(f"expected a list of {count} zeros and ones, got {str(found)[:200]}.")
        return [bool(value) for value in found]

    return read
