"""Prompts from templates: vanilla ones for a feature or for the topic alone, and rewrites (equation 21)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qscope_posttrain.endpoint.chat import ChatRequest, Sampling
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.endpoint.templates import PromptTemplates, text_field
from qscope_posttrain.features.explain.explanation import Explanation, FeatureId
from qscope_posttrain.synthesis.settings import Kind, SynthesisSettings

PromptType = Literal["vanilla", "adversarial"]


def synthesis_templates(folder: str | os.PathLike[str] | None = None) -> PromptTemplates:
    """relevance, vanilla, adversarial, kind, refuse and answer, from a user's folder where they are there."""
    return PromptTemplates(Path(__file__).parent / "templates", folder)


@dataclass(frozen=True)
class Draft:
    """A prompt as it was written, before anybody looked whether its feature fires."""

    text: str
    kind: Kind
    """What was asked for"""
    prompt_type: PromptType
    style: str
    """Of an adversarial prompt; empty otherwise"""
    request_id: str
    explanation: Explanation | None
    """Of the feature that it was written for; None where it was written for the topic alone"""
    tokens: int = 0
    """Of the request and its answer, as the server counts them"""

    @property
    def feature(self) -> FeatureId | None:
        return None if self.explanation is None else self.explanation.feature


@dataclass(frozen=True)
class VanillaJob:
    """One vanilla prompt wanted."""

    explanation: Explanation | None
    kind: Kind
    sample: int


@dataclass(frozen=True)
class RewriteJob:
    """One adversarial rewrite wanted."""

    draft: Draft
    style: str
    sample: int


class PromptWriter:
    """Writes prompts: one request each, in the order in which they are wanted."""

    def __init__(self, session: ChatSession, templates: PromptTemplates, settings: SynthesisSettings) -> None:
        self._session, self._templates, self._settings = session, templates, settings
        self._sampling = Sampling(temperature=settings.temperature, max_tokens=settings.max_tokens)
        self.drawn = 0
        """Prompts asked for, readable or not"""

    def vanilla(self, jobs: Sequence[VanillaJob]) -> list[Draft | None]:
        """x ~ G_van(explanation); None where the answer could not be read."""
        requests = [
            self._request("vanilla", job.sample, explanation=_words(job.explanation), kind=job.kind) for job in jobs
        ]
        found = self._write(requests, "vanilla prompts")
        return [
            None if entry is None else Draft(entry[0], job.kind, "vanilla", "", entry[1], job.explanation, entry[2])
            for job, entry in zip(jobs, found, strict=True)
        ]

    def adversarial(self, jobs: Sequence[RewriteJob]) -> list[Draft | None]:
        """x' ~ G_adv(x, style); None where the answer could not be read."""
        requests = [
            self._request(
                "adversarial",
                job.sample,
                explanation=_words(job.draft.explanation),
                prompt=job.draft.text,
                style=job.style,
            )
            for job in jobs
        ]
        found = self._write(requests, "adversarial prompts")
        return [
            None
            if entry is None
            else Draft(entry[0], job.draft.kind, "adversarial", job.style, entry[1], job.draft.explanation, entry[2])
            for job, entry in zip(jobs, found, strict=True)
        ]

    def _request(self, template: str, sample: int, **values: object) -> ChatRequest:
        messages = self._templates.messages(template, topic=self._settings.topic, **values)
        return ChatRequest(messages, self._sampling, sample)

    def _write(self, requests: Sequence[ChatRequest], description: str) -> list[tuple[str, str, int] | None]:
        """(text, request id, tokens) of each."""
        if not requests:
            return []
        answers = self._session.complete_parsed(requests, text_field("prompt"), description)
        self.drawn += len(requests)
        return [
            None if answer.value is None else (answer.value, answer.completion.request_id, answer.completion.tokens)
            for answer in answers
        ]


def _words(explanation: Explanation | None) -> str:
    return "" if explanation is None else explanation.text
