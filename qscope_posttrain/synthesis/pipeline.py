"""Run a synthesis: write prompts for the missing features, verify them, rewrite, verify again, and answer them.

Prompts are written from templates: vanilla ones, and adversarial rewrites of them (equation 21).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qscope_posttrain.endpoint.chat import ChatRequest, PromptTemplates, Sampling, text_field, truth_field
from qscope_posttrain.endpoint.session import BudgetSpent, ChatSession
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.explain.explanation import Explanation, FeatureId

Kind = Literal["harmful", "benign"]
PromptType = Literal["vanilla", "adversarial"]
KINDS: tuple[Kind, ...] = ("harmful", "benign")
STYLES = (
    "as a scene in a story that somebody is writing",
    "as one step of a longer, ordinary task",
    "in the voice of somebody who claims a professional reason",
    "with polite small talk before and after",
)  # Ways to wrap a message; the template `adversarial.jinja` reads them


@dataclass(frozen=True)
class SynthesisSettings:
    """How prompts and responses are made."""

    topic: str  # Topic of the data, in a few words; every template reads it
    kinds: tuple[Kind, ...] = KINDS  # Kinds of prompts to write, one after the other for each feature
    styles: tuple[str, ...] = STYLES  # Styles of the adversarial rewrites, taken in turn
    prompts_per_kind: int = 1  # Number of vanilla prompts per feature and kind; an adversarial one is made of each
    rounds: int = 3  # Maximum number of attempts at a prompt that fires its feature
    enough: int = 2  # Number of seed examples that make a target covered; 1 works on missing targets only
    features_at_once: int = 16  # Features worked on together; each group is finished before the next one begins
    temperature: float = 1.0  # Sampling temperature of prompts and responses
    max_tokens: int = 512  # Maximum length of prompts and responses, in tokens
    confirm_kind: bool = True  # Ask the judge whether a prompt should be declined; otherwise the kind asked for

    def __post_init__(self) -> None:
        if not self.topic.strip():
            raise UserValueError("a synthesis needs a topic.")
        if not self.kinds or set(self.kinds) - set(KINDS) or len(set(self.kinds)) != len(self.kinds):
            raise UserValueError(f"kinds are {', '.join(KINDS)}; got {list(self.kinds)}.")
        for name in ("prompts_per_kind", "rounds", "enough", "features_at_once", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.temperature < 0:
            raise UserValueError(f"temperature must be at least 0; got {self.temperature}.")


@dataclass(frozen=True)
class Draft:
    """A prompt as it was written, before its feature is verified."""

    text: str
    kind: Kind  # The kind asked for
    prompt_type: PromptType
    style: str  # Style of an adversarial prompt; empty otherwise
    request_id: str
    explanation: Explanation | None  # Of its feature; None where it was written for the topic alone
    tokens: int = 0  # Tokens of the request and its answer, as the server counts them

    @property
    def feature(self) -> FeatureId | None:
        return None if self.explanation is None else self.explanation.feature


@dataclass(frozen=True)
class PromptJob:
    """One prompt to write: a vanilla one, or the rewrite of a draft in a style."""

    explanation: Explanation | None
    kind: Kind
    sample: int
    rewritten: Draft | None = None
    style: str = ""


def synthesis_templates(folder: str | os.PathLike[str] | None = None) -> PromptTemplates:
    """Templates relevance, vanilla, adversarial, kind, refuse and answer; those in a user's folder come first."""
    return PromptTemplates(Path(__file__).parent / "templates", folder)


Verify = Callable[[Sequence[str], Sequence[FeatureId]], Sequence[float]]
"""(texts, one feature for each) -> the feature's largest activation on its text; 0 where it does not fire"""


@dataclass(frozen=True)
class Response:
    """The response to a prompt in the training data."""

    text: str
    kind: Kind  # z: whether it refuses or answers
    request_id: str


@dataclass(frozen=True)
class SynthesisExample:
    """One row of the data: a verified prompt and its response."""

    draft: Draft
    response: Response
    activation: float  # Activation of its feature, the largest over the prompt's tokens


@dataclass
class SynthesisRun:
    """Result of `synthesize`."""

    examples: list[SynthesisExample] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)  # Every prompt that was written, kept or not, in order
    drawn: int = 0  # Number of prompts asked for, each once, without further draws for unreadable answers
    vanilla_drawn: int = 0  # Number of them that were vanilla
    unfinished: tuple[FeatureId, ...] = ()  # Targets that the budget did not reach
    stopped: str = ""  # Message of the budget that ended the run; empty otherwise
    without: tuple[FeatureId, ...] = ()  # Targets worked on of which no prompt fired
    rejected: Counter[str] = field(default_factory=Counter)  # Verified, without a whole response, by reason

    @property
    def undecided(self) -> int:
        """Number of verified prompts without a kind, or without a whole response."""
        return self.rejected.total()


@dataclass(frozen=True)
class _Slot:
    """One vanilla prompt, and one rewrite of it, wanted for one feature."""

    feature: FeatureId
    kind: Kind
    number: int  # Among those of its explanation and kind
    style: str  # Style of the rewrite; empty where none is wanted


class Synthesis:
    """A chat model, its judge, the templates and the settings of one synthesis."""

    def __init__(
        self,
        session: ChatSession,
        templates: PromptTemplates,
        settings: SynthesisSettings,
        judge: ChatSession | None = None,
    ) -> None:
        self.session, self.templates, self.settings, self.judge = session, templates, settings, judge or session
        self.drawn = 0  # Number of prompts asked for, readable or not
        self._sampling = Sampling(temperature=settings.temperature, max_tokens=settings.max_tokens)

    def run(
        self, targets: Sequence[FeatureId], explanations: Mapping[FeatureId, Explanation], verify: Verify
    ) -> SynthesisRun:
        """Write data for `targets`, in their order, until all are done or the session's budget is spent.

        A prompt is kept only if its feature fires on it (h = 1), whatever a judge says. Nothing of a group of features
        that the budget cuts short is used, but its answers stay in the cache.
        """
        run, size = SynthesisRun(), self.settings.features_at_once
        slots = _slots(targets, explanations, self.settings)
        for start in range(0, len(targets), size):
            group = targets[start : start + size]
            try:
                wanted = [slot for feature in group for slot in slots[feature]]
                drafts, vanilla_drawn, kept = self._verified(wanted, explanations, verify)
                kinds = self._decide_kinds([draft for draft, _ in kept])
                responses = self._write_responses([draft for draft, _ in kept], kinds)
            except BudgetSpent as error:
                run.unfinished, run.stopped = tuple(targets[start:]), str(error)
                break
            run.drafts += drafts
            run.drawn, run.vanilla_drawn = self.drawn, run.vanilla_drawn + vanilla_drawn
            for (draft, activation), response in zip(kept, responses, strict=True):
                if isinstance(response, Response):
                    run.examples.append(SynthesisExample(draft, response, activation))
                else:
                    run.rejected[response] += 1
            reached = {draft.feature for draft, _ in kept}
            run.without += tuple(feature for feature in group if feature not in reached)
        return run

    def random(self, vanilla: int, rewrites: int) -> list[Draft]:
        """Control: as many prompts by the same templates, written for the topic alone, and rewrites of them."""
        settings, kinds = self.settings, self.settings.kinds
        jobs = [PromptJob(None, kinds[number % len(kinds)], number // len(kinds)) for number in range(vanilla)]
        drafts = [draft for draft in self._write("vanilla", jobs) if draft is not None]
        if not (drafts and settings.styles):
            return drafts
        chosen = [drafts[number % len(drafts)] for number in range(rewrites)]
        turns = _occurrences(draft.kind for draft in chosen)
        styles = [_style_of(draft.kind, turn, settings) for draft, turn in zip(chosen, turns, strict=True)]
        # Two drafts may hold the same words: each rewrite needs its own draw.
        samples = _occurrences((draft.text, style) for draft, style in zip(chosen, styles, strict=True))
        jobs = [
            PromptJob(None, draft.kind, sample, draft, style)
            for draft, style, sample in zip(chosen, styles, samples, strict=True)
        ]
        return drafts + [draft for draft in self._write("adversarial", jobs) if draft is not None]

    def _request(self, template: str, sampling: Sampling, sample: int = 0, **values: str) -> ChatRequest:
        return ChatRequest(self.templates.messages(template, topic=self.settings.topic, **values), sampling, sample)

    def _write(self, prompt_type: PromptType, jobs: Sequence[PromptJob]) -> list[Draft | None]:
        """x ~ G_van(explanation), or x' ~ G_adv(x, style); None where the answer could not be read."""
        requests = []
        for job in jobs:
            values = {"kind": job.kind} if job.rewritten is None else {"prompt": job.rewritten.text, "style": job.style}
            explanation = "" if job.explanation is None else job.explanation.text
            requests.append(self._request(prompt_type, self._sampling, job.sample, explanation=explanation, **values))
        if not requests:
            return []
        answers = self.session.complete_parsed(requests, text_field("prompt"), f"{prompt_type} prompts")
        self.drawn += len(requests)
        drafts: list[Draft | None] = []
        for job, answer in zip(jobs, answers, strict=True):
            text, completion = answer.value, answer.completion
            about = (job.kind, prompt_type, job.style, completion.request_id, job.explanation, completion.tokens)
            drafts.append(None if text is None else Draft(text, *about))
        return drafts

    def _verified(
        self, slots: Sequence[_Slot], explanations: Mapping[FeatureId, Explanation], verify: Verify
    ) -> tuple[list[Draft], int, list[tuple[Draft, float]]]:
        """(all drafts, vanilla prompts drawn, kept drafts with their activations) of one group of features."""
        before, rounds, kinds = self.drawn, self.settings.rounds, self.settings.kinds

        def vanilla_job(slot: _Slot, attempt: int) -> PromptJob:
            return PromptJob(explanations[slot.feature], slot.kind, slot.number * rounds + attempt)

        def rewrite(slot: _Slot, attempt: int) -> PromptJob:
            # Two slots of one explanation may hold the same words, of either kind: each needs its own draw.
            number = slot.number * len(kinds) + kinds.index(slot.kind)
            draft = vanilla[slot][0]
            return PromptJob(draft.explanation, draft.kind, number * rounds + attempt, draft, slot.style)

        def until_it_fires(
            slots: Sequence[_Slot], prompt_type: PromptType, job: Callable[[_Slot, int], PromptJob]
        ) -> tuple[list[Draft], dict[_Slot, tuple[Draft, float]]]:
            """(all drafts, those whose feature fires with its activation)."""
            drafts: list[Draft] = []
            fired: dict[_Slot, tuple[Draft, float]] = {}
            for attempt in range(rounds):
                wanted = [slot for slot in slots if slot not in fired]
                answers = self._write(prompt_type, [job(slot, attempt) for slot in wanted])
                written = [(slot, draft) for slot, draft in zip(wanted, answers, strict=True) if draft is not None]
                drafts += [draft for _, draft in written]
                features = [slot.feature for slot, _ in written]
                values = verify([draft.text for _, draft in written], features) if written else []
                for (slot, draft), value in zip(written, values, strict=True):
                    if value > 0:
                        fired[slot] = (draft, float(value))
            return drafts, fired

        drafts, vanilla = until_it_fires(slots, "vanilla", vanilla_job)
        vanilla_drawn = self.drawn - before
        styled = [slot for slot in vanilla if slot.style]
        written, rewrites = until_it_fires(styled, "adversarial", rewrite)
        kept = [found[slot] for slot in slots for found in (vanilla, rewrites) if slot in found]
        return drafts + written, vanilla_drawn, kept

    def _decide_kinds(self, drafts: Sequence[Draft]) -> list[Kind | None]:
        """z of each prompt, from the judge (None where its answer cannot be read), or with `confirm_kind=False` the
        kind that was asked for."""
        if not self.settings.confirm_kind:
            return [draft.kind for draft in drafts]
        sampling = Sampling(temperature=0.0, max_tokens=64)
        requests = [self._request("kind", sampling, prompt=draft.text) for draft in drafts]
        answers = self.judge.complete_parsed(requests, truth_field("harmful"), "kinds of prompts")
        names: dict[bool | None, Kind | None] = {True: "harmful", False: "benign", None: None}
        return [names[answer.value] for answer in answers]

    def _write_responses(self, drafts: Sequence[Draft], kinds: Sequence[Kind | None]) -> list[Response | str]:
        """y ~ G_resp(x, z) of each prompt (equation 22): a refusal with a safe alternative, or an answer. The reason
        instead, where the model did not end its answer by itself (see `ChatCompletion.whole`)."""
        known = [(place, kind) for place, kind in enumerate(kinds) if kind is not None]
        names = {"harmful": "refuse", "benign": "answer"}
        requests = [self._request(names[kind], self._sampling, prompt=drafts[place].text) for place, kind in known]
        found: list[Response | str] = ["no kind"] * len(drafts)
        for (place, kind), completion in zip(known, self.session.complete(requests, "responses"), strict=True):
            text = completion.text.strip()
            if not completion.whole:
                found[place] = completion.finish_reason
            else:
                found[place] = Response(text, kind, completion.request_id) if text else "empty"
        return found


def _slots(
    targets: Sequence[FeatureId], explanations: Mapping[FeatureId, Explanation], settings: SynthesisSettings
) -> dict[FeatureId, list[_Slot]]:
    """All slots. Features of one explanation share its numbers, so that no two slots share a request."""
    each = settings.prompts_per_kind
    before = _occurrences(explanations[feature].text for feature in targets)
    return {
        feature: [
            _Slot(feature, kind, earlier * each + number, _style_of(kind, place * each + number, settings))
            for number in range(each)
            for kind in settings.kinds
        ]
        for place, (feature, earlier) in enumerate(zip(targets, before, strict=True))
    }


def _style_of(kind: Kind, turn: int, settings: SynthesisSettings) -> str:
    """The style of rewrite number `turn` of a kind; empty where there are none.

    Every kind goes through all styles, each from another place: a style must neither reveal the kind nor be more common
    than another.
    """
    if not settings.styles:
        return ""
    offset = settings.kinds.index(kind) * len(settings.styles) // len(settings.kinds)
    return settings.styles[(turn + offset) % len(settings.styles)]


def _occurrences(values: Iterable[Hashable]) -> list[int]:
    """The number of earlier occurrences of each value."""
    seen: Counter[Hashable] = Counter()
    found = []
    for value in values:
        found.append(seen[value])
        seen[value] += 1
    return found
