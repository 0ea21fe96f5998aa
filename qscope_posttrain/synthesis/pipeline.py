"""The loop: prompts for the features that are missing, verified, rewritten, verified again, answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from qscope_posttrain.endpoint.failures import BudgetSpent
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.endpoint.templates import PromptTemplates
from qscope_posttrain.features.explain.explanation import Explanation, FeatureId
from qscope_posttrain.synthesis.prompts import Draft, PromptWriter, RewriteJob, VanillaJob
from qscope_posttrain.synthesis.responses import NoResponse, Response, decide_kinds, write_responses
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
    stopped: str = ""
    """What the budget said when it ended the run; empty where it did not"""
    without: tuple[FeatureId, ...] = ()
    """Targets worked on of which no prompt fired"""
    rejected: Counter[str] = field(default_factory=Counter)
    """Verified prompts that have no whole response, by the reason (`NoResponse`)"""

    @property
    def undecided(self) -> int:
        """Verified prompts without a kind, or without a whole response."""
        return self.rejected.total()


@dataclass(frozen=True)
class _Slot:
    """One vanilla prompt, and one rewrite of it, wanted for one feature."""

    feature: FeatureId
    kind: Kind
    number: int
    """Among those of its explanation and kind"""
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
    slots = _slots(targets, explanations, settings)
    for start in range(0, len(targets), settings.features_at_once):
        group = targets[start : start + settings.features_at_once]
        try:
            wanted = [slot for feature in group for slot in slots[feature]]
            drafts, vanilla_drawn, kept = _verified(wanted, explanations, writer, settings, verify)
            kinds = decide_kinds(judge or session, templates, [draft for draft, _ in kept], settings)
            responses = write_responses(session, templates, [draft for draft, _ in kept], kinds, settings)
        except BudgetSpent as error:
            run.unfinished, run.stopped = tuple(targets[start:]), str(error)
            break
        run.drafts += drafts
        run.drawn, run.vanilla_drawn = writer.drawn, run.vanilla_drawn + vanilla_drawn
        run.rejected.update(response.reason for response in responses if isinstance(response, NoResponse))
        run.examples += [
            Example(draft, response, activation)
            for (draft, activation), response in zip(kept, responses, strict=True)
            if isinstance(response, Response)
        ]
        reached = {draft.feature for draft, _ in kept}
        without += [feature for feature in group if feature not in reached]
    run.without = tuple(without)
    return run


def _verified(
    slots: Sequence[_Slot],
    explanations: Mapping[FeatureId, Explanation],
    writer: PromptWriter,
    settings: SynthesisSettings,
    verify: Verify,
) -> tuple[list[Draft], int, list[tuple[Draft, float]]]:
    """(all drafts, vanilla prompts drawn, kept drafts with their activations) of one group of features."""
    before = writer.drawn

    def vanilla_again(wanted: Sequence[_Slot], attempt: int) -> list[Draft | None]:
        return writer.vanilla([
            VanillaJob(explanations[slot.feature], slot.kind, slot.number * settings.rounds + attempt)
            for slot in wanted
        ])  # fmt: skip

    drafts, vanilla = _until_it_fires(slots, settings.rounds, verify, vanilla_again)
    vanilla_drawn = writer.drawn - before

    def rewritten(wanted: Sequence[_Slot], attempt: int) -> list[Draft | None]:
        # Two slots of one explanation may hold the same words, of either kind: each is to have its own draw.
        kinds = len(settings.kinds)
        return writer.adversarial([
            RewriteJob(
                vanilla[slot][0],
                slot.style,
                (slot.number * kinds + settings.kinds.index(slot.kind)) * settings.rounds + attempt,
            )
            for slot in wanted
        ])  # fmt: skip

    written, rewrites = _until_it_fires([slot for slot in vanilla if slot.style], settings.rounds, verify, rewritten)
    kept = [found[slot] for slot in slots for found in (vanilla, rewrites) if slot in found]
    return drafts + written, vanilla_drawn, kept


def _slots(
    targets: Sequence[FeatureId], explanations: Mapping[FeatureId, Explanation], settings: SynthesisSettings
) -> dict[FeatureId, list[_Slot]]:
    """All that is wanted. Features of one explanation share its numbers, so that no two slots share a request."""
    each = settings.prompts_per_kind
    before = occurrences(explanations[feature].text for feature in targets)
    return {
        feature: [
            _Slot(feature, kind, earlier * each + number, style_of(kind, place * each + number, settings))
            for number in range(each)
            for kind in settings.kinds
        ]
        for place, (feature, earlier) in enumerate(zip(targets, before, strict=True))
    }


def style_of(kind: Kind, turn: int, settings: SynthesisSettings) -> str:
    """The style of rewrite number `turn` of a kind; empty where there are none.

    Every kind goes through all styles, each from another place: a style must not give the kind away, nor one style be
    commoner than another.
    """
    if not settings.styles:
        return ""
    offset = settings.kinds.index(kind) * len(settings.styles) // len(settings.kinds)
    return settings.styles[(turn + offset) % len(settings.styles)]


def occurrences(values: Iterable[Hashable]) -> list[int]:
    """How often each value has come before."""
    seen: Counter[Hashable] = Counter()
    found = []
    for value in values:
        found.append(seen[value])
        seen[value] += 1
    return found


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
    chosen = [drafts[number % len(drafts)] for number in range(rewrites)]
    turns = occurrences(draft.kind for draft in chosen)
    styles = [style_of(draft.kind, turn, settings) for draft, turn in zip(chosen, turns, strict=True)]
    # Two drafts may hold the same words: each rewrite is to have its own draw.
    samples = occurrences((draft.text, style) for draft, style in zip(chosen, styles, strict=True))
    again = [RewriteJob(*job) for job in zip(chosen, styles, samples, strict=True)]
    return drafts + [draft for draft in writer.adversarial(again) if draft is not None]
