"""Auto-interpretation: a model explains features from their contexts, and its explanations are put to the test."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from qscope_posttrain.endpoint.chat import ChatRequest, Sampling
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.endpoint.templates import PromptTemplates, text_field
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.explain.contexts import Context, ContextSettings, FeatureContexts, collect_contexts
from qscope_posttrain.features.explain.explanation import Explanation, FeatureId, Prediction
from qscope_posttrain.features.explain.token_view import marked, text_pieces
from qscope_posttrain.features.explain.verify import (
    Item,
    Method,
    Split,
    detection_items,
    fuzzing_items,
    predict,
    split_contexts,
)
from qscope_posttrain.intervals import Interval, bootstrap_difference, bootstrap_over_prompts
from qscope_posttrain.models.batches import Text
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

METHODS: tuple[Method, ...] = ("detection", "fuzzing")


def explain_templates(folder: str | os.PathLike[str] | None = None) -> PromptTemplates:
    """`explain.jinja`, `detection.jinja` and `fuzzing.jinja`, from a user's folder where they are there."""
    return PromptTemplates(Path(__file__).parent / "templates", folder)


@dataclass(frozen=True)
class ExplainSettings:
    """How features are explained and their explanations tested."""

    contexts: ContextSettings = field(default_factory=ContextSettings)
    """What is kept of the texts"""
    strongest: int = 10
    """Strongest contexts that the explainer sees"""
    others: int = 10
    """Contexts of all strengths that it sees beside them"""
    tests: int = 20
    """Held-out contexts in which the feature fires, and as many in which it does not, for each score"""
    methods: tuple[Method, ...] = METHODS
    """How explanations are scored; none leaves them unscored"""
    control: bool = True
    """Score every feature by the explanation of another one too"""
    min_texts: int = 5
    """A feature that fires on fewer distinct texts is not explained"""
    per_request: int = 5
    """Contexts that the judge decides on at a time"""
    temperature: float = 0.0
    """Of the explainer; the judge is greedy"""
    max_tokens: int = 256
    """Longest answer of explainer and judge"""
    seed: int = 0
    """Of the order of contexts and of the control"""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown:
            raise UserValueError(f"methods are {', '.join(METHODS)}; got {', '.join(unknown)}.")
        for name in ("strongest", "tests", "min_texts", "per_request", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserValueError(f"{name} must be at least 1; got {getattr(self, name)}.")


@dataclass(frozen=True)
class Explained:
    """Explanations, and how far they can be trusted."""

    explanations: tuple[Explanation, ...]
    controls: Mapping[Method, Mapping[FeatureId, Prediction]]
    """Scores of every feature with the explanation of another one: what words in general achieve"""
    contexts: tuple[FeatureContexts, ...]
    skipped: Mapping[FeatureId, str]
    """Features without an explanation, and why"""

    def mean(self, method: Method, control: bool = False) -> Interval | None:
        """Mean balanced accuracy over features, with a bootstrap interval over them."""
        values = [pair[control] for pair in self._pairs(method, need_control=control)]
        return bootstrap_over_prompts([[value] for value in values]) if values else None

    def gain(self, method: Method) -> Interval | None:
        """Mean difference between own and another's explanation, paired by feature."""
        pairs = self._pairs(method, need_control=True)
        return bootstrap_difference([[own] for own, _ in pairs], [[other] for _, other in pairs]) if pairs else None

    def _pairs(self, method: Method, need_control: bool) -> list[tuple[float, float]]:
        pairs = []
        for entry in self.explanations:
            own = _accuracy(getattr(entry, method))
            other = _accuracy(self.controls.get(method, {}).get(entry.feature))
            if own is not None and (other is not None or not need_control):
                pairs.append((own, float("nan") if other is None else other))
        return pairs

    def to_table(self) -> Table:
        """One line a feature: words, scores with intervals, and the score of another feature's words."""
        found = {FeatureId(entry.layer, entry.feature_id): entry for entry in self.contexts}
        used = [method for method in METHODS if any(getattr(entry, method) for entry in self.explanations)]
        rows: list[list[Cell]] = []
        for entry in self.explanations:
            row: list[Cell] = [entry.layer, entry.feature_id, found[entry.feature].firing_texts, entry.text]
            for method in used:
                own = getattr(entry, method)
                row += [
                    _shown(own.interval() if own else None),
                    _accuracy(self.controls.get(method, {}).get(entry.feature)),
                ]
            rows.append(row)
        columns = ["layer", "feature", "texts", "explanation"]
        columns += [name for method in used for name in (method, "shuffled")]
        return Table("Explanations", columns, rows, _CAPTION)

    def summary_table(self) -> Table:
        """One line a method: means over features."""
        rows: list[list[Cell]] = [
            [
                method,
                len(self._pairs(method, False)),
                *map(_shown, (self.mean(method), self.mean(method, True), self.gain(method))),
            ]
            for method in METHODS
            if self._pairs(method, False)
        ]
        return Table(
            "Explanations tested",
            ["method", "features", "balanced accuracy", "another feature's words", "difference"],
            rows,
            "Means over features, 95 % bootstrap intervals over features; the difference is paired. Chance is 0.5.",
        )


_CAPTION = (
    "texts: distinct texts on which the feature fires. detection, fuzzing: balanced accuracy on held-out contexts, and "
    "its 95 % interval (Newcombe). shuffled: the same contexts judged by the words for another feature. Chance is 0.5."
)


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

    One pass over the texts (see `contexts.collect_contexts`, which takes `pass_options`), one request for each
    explanation, and 2 * tests / per_request for each method, as many again for the control.

    Args:
        texts: natural text; what features are explained from can only be found where it occurs.
        session: the explainer.
        judge: who decides on the held-out contexts; by default the explainer, in requests of their own.
        templates: see `explain_templates`.
    """
    settings = settings or ExplainSettings()
    templates = templates or explain_templates()
    found = collect_contexts(model, tokenizer, texts, saes, feature_ids, settings.contexts, **pass_options)
    splits = {
        FeatureId(entry.layer, entry.feature_id): split_contexts(
            entry, settings.strongest, settings.others, settings.tests
        )
        for entry in found
        if entry.firing_texts >= settings.min_texts
    }
    skipped = {
        FeatureId(entry.layer, entry.feature_id): f"fires on {entry.firing_texts} of {entry.texts} texts"
        for entry in found
        if entry.firing_texts < settings.min_texts
    }
    words = _explanations(session, templates, tokenizer, splits, settings)
    skipped |= {feature: "no readable explanation" for feature in splits if feature not in words}
    own: dict[Method, Mapping[FeatureId, Prediction]] = {}
    controls: dict[Method, Mapping[FeatureId, Prediction]] = {}
    others = shuffled_words(words, settings.seed) if settings.control else {}
    for method in settings.methods:
        tests = {feature: _items(tokenizer, splits[feature], method, feature) for feature in words}
        options: dict[str, Any] = {
            "per_request": settings.per_request, "seed": settings.seed, "max_tokens": settings.max_tokens,
        }  # fmt: skip
        own[method] = predict(judge or session, templates, method, tests, words, **options)
        if others:
            controls[method] = predict(judge or session, templates, method, tests, others, **options)
    name = str(session.model.identity.get("name", ""))
    explanations = tuple(
        Explanation(
            layer=feature.layer,
            feature_id=feature.feature_id,
            text=text,
            model=name,
            detection=own.get("detection", {}).get(feature),
            fuzzing=own.get("fuzzing", {}).get(feature),
        )
        for feature, text in words.items()
    )
    return Explained(explanations, controls, tuple(found), skipped)


def shuffled_words(words: Mapping[FeatureId, str], seed: int) -> dict[FeatureId, str]:
    """Every feature with the words of another: a random cycle, so that none keeps its own. Empty for one feature."""
    order = list(words)
    if len(order) < 2:
        return {}
    random.Random(seed).shuffle(order)
    return {feature: words[other] for feature, other in zip(order, order[1:] + order[:1], strict=True)}


def _explanations(
    session: ChatSession,
    templates: PromptTemplates,
    tokenizer: Any,
    splits: Mapping[FeatureId, Split],
    settings: ExplainSettings,
) -> dict[FeatureId, str]:
    sampling = Sampling(temperature=settings.temperature, max_tokens=settings.max_tokens)
    requests = [
        ChatRequest(
            templates.messages(
                "explain",
                strongest=[_passage(tokenizer, context) for context in split.strongest],
                others=[_passage(tokenizer, context) for context in split.others],
            ),
            sampling,
        )
        for split in splits.values()
    ]
    answers = session.complete_parsed(requests, text_field("explanation"), description="explanations")
    return {feature: answer.value for feature, answer in zip(splits, answers, strict=True) if answer.value is not None}


def _passage(tokenizer: Any, context: Context) -> dict[str, Any]:
    pieces, values = text_pieces(tokenizer, context.ids, context.values)
    return {"text": marked(pieces, values), "peak": context.peak}


def _items(tokenizer: Any, split: Split, method: Method, feature: FeatureId) -> list[Item]:
    return detection_items(tokenizer, split) if method == "detection" else fuzzing_items(tokenizer, split, str(feature))


def _accuracy(prediction: Prediction | None) -> float | None:
    return None if prediction is None else prediction.balanced_accuracy


def _shown(interval: Interval | None) -> str | None:
    return None if interval is None else f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
