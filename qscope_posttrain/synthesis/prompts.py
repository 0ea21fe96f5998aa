"""Settings of a synthesis, and prompts written from templates: vanilla ones and rewrites of them (equation 21)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qscope_posttrain.endpoint.chat import ChatRequest, Message, Sampling
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.endpoint.templates import PromptTemplates, text_field
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


class PromptWriter:
    """Writes prompts, with one request each, in the order of the jobs."""

    def __init__(self, session: ChatSession, templates: PromptTemplates, settings: SynthesisSettings) -> None:
        self._session, self._templates, self._settings = session, templates, settings
        self._sampling = Sampling(temperature=settings.temperature, max_tokens=settings.max_tokens)
        self.drawn = 0  # Number of prompts asked for, readable or not

    def write(self, prompt_type: PromptType, jobs: Sequence[PromptJob]) -> list[Draft | None]:
        """x ~ G_van(explanation), or x' ~ G_adv(x, style); None where the answer could not be read."""
        if not jobs:
            return []
        requests = [ChatRequest(self._messages(prompt_type, job), self._sampling, job.sample) for job in jobs]
        answers = self._session.complete_parsed(requests, text_field("prompt"), f"{prompt_type} prompts")
        self.drawn += len(requests)
        drafts: list[Draft | None] = []
        for job, answer in zip(jobs, answers, strict=True):
            text, completion = answer.value, answer.completion
            about = (job.kind, prompt_type, job.style, completion.request_id, job.explanation, completion.tokens)
            drafts.append(None if text is None else Draft(text, *about))
        return drafts

    def _messages(self, prompt_type: PromptType, job: PromptJob) -> tuple[Message, ...]:
        explanation = "" if job.explanation is None else job.explanation.text
        values = {"kind": job.kind} if job.rewritten is None else {"prompt": job.rewritten.text, "style": job.style}
        return self._templates.messages(prompt_type, topic=self._settings.topic, explanation=explanation, **values)
