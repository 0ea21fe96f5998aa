"""The loop: prompts for the features that are missing, verified, rewritten, verified again, answered."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from qscope_posttrain.endpoint.failures import BudgetSpent
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.endpoint.templates import PromptTemplates
from qscope_posttrain.features.explanation import Explanation, FeatureId
from qscope_posttrain.synthesis.prompts import Draft, PromptWriter, RewriteJob, VanillaJob
from qscope_posttrain.synthesis.responses import Response, decide_kinds, write_responses
from qscope_posttrain.synthesis.settings import Kind, SynthesisSettings

Verify = Callable[[Sequence[str], Sequence[FeatureId]], Sequence[float]]
"""(texts, one feature for each) -> the feature's largest activation on its text; 0 where it does not fire"""


@dataclass(frozen=True)
class Example:
    """One row of the data: a verified prompt and its response."""

    draft: Draft
    response: Response
    activation: float
    """Of its feature, the largest over the prompt's tokens"""


@dataclass
class SynthesisRun:
    """What came out."""

    examples: list[Example] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    """Every prompt that was written, kept or not, in order"""
    drawn: int = 0
    """Prompts asked for, each once, further draws for unreadable answers aside"""
    vanilla_drawn: int = 0
    """Those of them that were vanilla"""
    unfinished: tuple[FeatureId, ...] = ()
    """Targets that the budget did not reach"""
    without: tuple[FeatureId, ...] = ()
    """Targets worked on of which no prompt fired"""
    undecided: int = 0
    """Verified prompts without a kind, or without a whole response"""


@dataclass(frozen=True)
class _Slot:
    """One vanilla prompt, and one rewrite of it, wanted for one feature."""

    feature: FeatureId
    kind: Kind
    number: int
    """Among those of its feature and kind"""
    style: str
    """Of the rewrite; empty where none is wanted"""


_Found: TypeAlias = dict[_Slot, tuple[Draft, float]]
"""The drafts whose feature fires, with its activation"""


def synthesize(
    targets: Sequence[FeatureId],
    explanations: Mapping[FeatureId, Explanation],
    session: ChatSession,
    templates: PromptTemplates,
    settings: SynthesisSettings,
    verify: Verify,
    *,
    judge: ChatSession | None = None,
) -> SynthesisRun:
    """Write data for `targets`, in their order, until all are done or the session's budget is spent.

    A prompt is kept only if its feature fires on it (h = 1); a judge has no say in that. Of a group of features that
    the budget cuts short nothing is used, but its answers stay in the cache.
    """
    run = SynthesisRun()
    writer = PromptWriter(session, templates, settings)
    without: list[FeatureId] = []
    for start in range(0, len(targets), settings.features_at_once):
        group = targets[start : start + settings.features_at_once]
        try:
            drafts, vanilla_drawn, kept = _verified(group, start, explanations, writer, settings, verify)
            kinds = decide_kinds(judge or session, templates, [draft for draft, _ in kept], settings)
            responses = write_responses(session, templates, [draft for draft, _ in kept], kinds, settings)
        except BudgetSpent:
            run.unfinished = tuple(targets[start:])
            break
        run.drafts += drafts
        run.drawn, run.vanilla_drawn = writer.drawn, run.vanilla_drawn + vanilla_drawn
        run.undecided += sum(response is None for response in responses)
        run.examples += [
            Example(draft, response, activation)
            for (draft, activation), response in zip(kept, responses, strict=True)
            if response is not None
        ]
        reached = {draft.feature for draft, _ in kept}
        without += [feature for feature in group if feature not in reached]
    run.without = tuple(without)
    return run


def _verified(
    group: Sequence[FeatureId],
    start: int,
    explanations: Mapping[FeatureId, Explanation],
    writer: PromptWriter,
    settings: SynthesisSettings,
    verify: Verify,
) -> tuple[list[Draft], int, list[tuple[Draft, float]]]:
    """(all drafts, vanilla prompts drawn, kept drafts with their activations) of one group of features."""
    slots = _slots(group, start, settings)
    before = writer.drawn

    def vanilla_again(wanted: Sequence[_Slot], attempt: int) -> list[Draft | None]:
        return writer.vanilla([
            VanillaJob(explanations[slot.feature], slot.kind, slot.number * settings.rounds + attempt)
            for slot in wanted
        ])  # fmt: skip

    drafts, vanilla = _until_it_fires(slots, settings.rounds, verify, vanilla_again)
    vanilla_drawn = writer.drawn - before

    def rewritten(wanted: Sequence[_Slot], attempt: int) -> list[Draft | None]:
        return writer.adversarial([RewriteJob(vanilla[slot][0], slot.style, attempt) for slot in wanted])

    written, rewrites = _until_it_fires([slot for slot in vanilla if slot.style], settings.rounds, verify, rewritten)
    kept = [found[slot] for slot in slots for found in (vanilla, rewrites) if slot in found]
    return drafts + written, vanilla_drawn, kept


def _slots(group: Sequence[FeatureId], start: int, settings: SynthesisSettings) -> list[_Slot]:
    """All that is wanted for some features, the first of which is target number `start`; styles take turns."""
    styles = itertools.cycle(settings.styles or ("",))
    turns = itertools.islice(styles, start * len(settings.kinds) * settings.prompts_per_kind, None)
    return [
        _Slot(feature, kind, number, next(turns))
        for feature in group
        for number in range(settings.prompts_per_kind)
        for kind in settings.kinds
    ]


def _until_it_fires(
    slots: Sequence[_Slot],
    rounds: int,
    verify: Verify,
    write: Callable[[Sequence[_Slot], int], list[Draft | None]],
) -> tuple[list[Draft], _Found]:
    """(all drafts, those whose feature fires), asking in at most `rounds` rounds for those that are still wanted."""
    drafts: list[Draft] = []
    kept: _Found = {}
    for attempt in range(rounds):
        wanted = [slot for slot in slots if slot not in kept]
        if not wanted:
            break
        written = [
            (slot, draft) for slot, draft in zip(wanted, write(wanted, attempt), strict=True) if draft is not None
        ]
        drafts += [draft for _, draft in written]
        values = verify([draft.text for _, draft in written], [slot.feature for slot, _ in written]) if written else []
        for (slot, draft), value in zip(written, values, strict=True):
            if value > 0:
                kept[slot] = (draft, float(value))
    return drafts, kept


def random_synthesis(
    vanilla: int,
    rewrites: int,
    session: ChatSession,
    templates: PromptTemplates,
    settings: SynthesisSettings,
) -> list[Draft]:
    """The control: as many prompts by the same templates, written for the topic alone, and rewrites of them."""
    writer = PromptWriter(session, templates, settings)
    kinds = settings.kinds
    jobs = [VanillaJob(None, kinds[number % len(kinds)], number // len(kinds)) for number in range(vanilla)]
    drafts = [draft for draft in writer.vanilla(jobs) if draft is not None]
    if not (drafts and settings.styles):
        return drafts
    again = [
        RewriteJob(drafts[number % len(drafts)], settings.styles[number % len(settings.styles)], number // len(drafts))
        for number in range(rewrites)
    ]
    return drafts + [draft for draft in writer.adversarial(again) if draft is not None]
