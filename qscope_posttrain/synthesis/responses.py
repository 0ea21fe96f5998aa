"""Responses by what a prompt deserves: a refusal with a safe alternative, or an answer (equation 22)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qscope_posttrain.endpoint.chat import ChatRequest, Sampling
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.endpoint.templates import PromptTemplates, truth_field
from qscope_posttrain.synthesis.prompts import Draft
from qscope_posttrain.synthesis.settings import Kind, SynthesisSettings


@dataclass(frozen=True)
class Response:
    """What stands against a prompt in the training data."""

    text: str
    kind: Kind
    """z: whether it refuses or answers"""
    request_id: str


@dataclass(frozen=True)
class NoResponse:
    """Why nothing stands against a prompt, which then is no training data."""

    reason: str
    """"no kind", "empty", or why an answer is not whole: "length", "content_filter", "refused" and the like"""


def decide_kinds(
    judge: ChatSession, templates: PromptTemplates, drafts: Sequence[Draft], settings: SynthesisSettings
) -> list[Kind | None]:
    """z of each prompt: what the judge says, or with `confirm_kind=False` what was asked for.

    None where the judge's answer cannot be read.
    """
    if not settings.confirm_kind:
        return [draft.kind for draft in drafts]
    sampling = Sampling(temperature=0.0, max_tokens=64)
    requests = [
        ChatRequest(templates.messages("kind", prompt=draft.text, topic=settings.topic), sampling) for draft in drafts
    ]
    answers = judge.complete_parsed(requests, truth_field("harmful"), description="kinds of prompts")
    names: dict[bool | None, Kind | None] = {True: "harmful", False: "benign", None: None}
    return [names[answer.value] for answer in answers]


def write_responses(
    session: ChatSession,
    templates: PromptTemplates,
    drafts: Sequence[Draft],
    kinds: Sequence[Kind | None],
    settings: SynthesisSettings,
) -> list[Response | NoResponse]:
    """y ~ G_resp(x, z) of each prompt. Only an answer that the model ended by itself is one: see `Completion.whole`."""
    sampling = Sampling(temperature=settings.temperature, max_tokens=settings.max_tokens)
    known = [(place, kind) for place, kind in enumerate(kinds) if kind is not None]
    requests = [
        ChatRequest(
            templates.messages(
                "refuse" if kind == "harmful" else "answer", prompt=drafts[place].text, topic=settings.topic
            ),
            sampling,
        )
        for place, kind in known
    ]
    found: list[Response | NoResponse] = [NoResponse("no kind")] * len(drafts)
    for (place, kind), completion in zip(known, session.complete(requests, "responses"), strict=True):
        text = completion.text.strip()
        if not completion.whole:
            found[place] = NoResponse(completion.finish_reason)
        else:
            found[place] = Response(text, kind, completion.request_id) if text else NoResponse("empty")
    return found
