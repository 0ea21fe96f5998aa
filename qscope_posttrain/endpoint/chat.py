"""What is asked of a chat model and what it answers, whoever serves it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from qscope_posttrain.errors import UserTypeError, UserValueError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UserValueError(f"a message's role is one of {', '.join(ROLES)}, got {self.role!r}.")
        if not isinstance(self.content, str):
            raise UserTypeError(f"a message's content is a string, got {type(self.content).__name__}.")


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy"""
    top_p: float = 1.0
    """Nucleus; 1 keeps all tokens"""
    max_tokens: int = 512
    """Longest answer"""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserValueError(f"temperature must be at least 0; got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise UserValueError(f"top_p must lie in (0, 1]; got {self.top_p}.")
        if self.max_tokens < 1:
            raise UserValueError(f"max_tokens must be at least 1; got {self.max_tokens}.")


@dataclass(frozen=True)
class ChatRequest:
    """One answer wanted: the messages, how to draw it, and which of several draws of the same it is."""

    messages: tuple[Message, ...]
    sampling: Sampling = Sampling()
    sample: int = 0
    """Number of the draw, from 0: without it, two draws of one request would be one entry of the cache"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        if not self.messages:
            raise UserValueError("a request needs at least one message.")
        if self.sample < 0:
            raise UserValueError(f"sample counts from 0; got {self.sample}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def key(self, identity: Mapping[str, Any]) -> str:
        """SHA-256 of the model's identity and everything in the request: what the cache knows an answer by."""
        return _sha256({"model": dict(identity), **self.to_dict()})

    def refusal_key(self, identity: Mapping[str, Any], route: Mapping[str, Any]) -> str:
        """What the cache knows a refusal by: another server, or another way to write the request, may answer it."""
        return _sha256({"model": dict(identity), "route": dict(route), **self.to_dict()})

    def way(self, identity: Mapping[str, Any], route: Mapping[str, Any]) -> str:
        """SHA-256 of all but the words and the draw: what an endpoint understands in every such request, or in none."""
        return _sha256({"model": dict(identity), "route": dict(route), "sampling": asdict(self.sampling)})


@dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str
    finish_reason: str
    """"stop", "length", or what else the server says; "None" where it says nothing"""
    prompt_tokens: int
    """As the server counts them; 0 where it does not"""
    completion_tokens: int
    request_id: str
    """The server's name for this answer"""
    refusal: str = ""
    """Why the endpoint will never answer this request, in its own words; empty where it did answer"""

    @property
    def whole(self) -> bool:
        """Whether the model ended the answer by itself: not cut off, not filtered, not refused."""
        return self.finish_reason in ("stop", "None")

    @property
    def tokens(self) -> int:
        """What a bill would count."""
        return self.prompt_tokens + self.completion_tokens


class ChatModel(Protocol):
    """A model that answers chats: `openai_model.OpenAIChatModel`, `local_model.LocalChatModel`, or one's own."""

    batch_size: int
    """Requests that one call of `complete` takes at most"""
    concurrency: int
    """Calls of `complete` that may run at a time, in threads"""

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON values that an answer depends on beside the request. Never a key, never an address."""
        ...

    @property
    def route(self) -> Mapping[str, Any]:
        """JSON values that a refusal depends on beside that, such as the address. They are hashed, and not kept."""
        ...

    def complete(self, requests: Sequence[ChatRequest]) -> list[Completion]:
        """One answer to each request, in order.

        Raises:
            failures.RequestRefused: one of them will never be answered; where there are several, each is asked alone.
            failures.RequestFailed: with what a caller needs to decide whether to try again.
        """
        ...


def _sha256(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
