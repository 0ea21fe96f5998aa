"""Requests to a chat model, its answers and its failures, whoever serves it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from qscope_posttrain.errors import UserOSError, UserTypeError, UserValueError

ROLES = ("system", "user", "assistant")


class RequestFailed(UserOSError):
    """A request that brought no answer. An OSError: the outside world failed, not the program."""

    def __init__(self, message: str, *, retry: bool, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry = retry  # Whether the same request may succeed later
        self.retry_after = retry_after  # Seconds that the server asked to wait, if it did


class RequestRefused(RequestFailed):
    """Permanent failure of one request: the endpoint rejected its content, or the way in which it was sent."""

    def __init__(self, message: str, *, content: bool) -> None:
        super().__init__(message, retry=False)
        self.content = content
        """Whether its content is known to be the reason, rather than the way in which it was sent"""


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

    temperature: float = 1.0  # Divides the logits; 0 is greedy
    top_p: float = 1.0  # Nucleus; 1 keeps all tokens
    max_tokens: int = 512  # Maximum length of the answer

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserValueError(f"temperature must be at least 0; got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise UserValueError(f"top_p must lie in (0, 1]; got {self.top_p}.")
        if self.max_tokens < 1:
            raise UserValueError(f"max_tokens must be at least 1; got {self.max_tokens}.")


@dataclass(frozen=True)
class ChatRequest:
    """Request for one answer: the messages, how to draw it, and which of several draws of the same it is."""

    messages: tuple[Message, ...]
    sampling: Sampling = Sampling()
    sample: int = 0  # Number of the draw, from 0: without it, two draws of one request would be one entry of the cache

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        if not self.messages:
            raise UserValueError("a request needs at least one message.")
        if self.sample < 0:
            raise UserValueError(f"sample counts from 0; got {self.sample}.")

    def key(self, identity: Mapping[str, Any]) -> str:
        """Key of the answer in the cache: SHA-256 of the model's identity and everything in the request."""
        return _sha256({"model": dict(identity), **asdict(self)})

    def refusal_key(self, identity: Mapping[str, Any], route: Mapping[str, Any]) -> str:
        """Key of a refusal in the cache: another server, or another way to write the request, may answer it."""
        return _sha256({"model": dict(identity), "route": dict(route), **asdict(self)})

    def way(self, identity: Mapping[str, Any], route: Mapping[str, Any]) -> str:
        """SHA-256 of all but the content and the draw: an endpoint accepts it in every such request, or in none."""
        return _sha256({"model": dict(identity), "route": dict(route), "sampling": asdict(self.sampling)})


@dataclass(frozen=True)
class ChatCompletion:
    """One answer."""

    text: str
    finish_reason: str  # "stop", "length", or another reason of the server; "None" where it gives none
    prompt_tokens: int  # As the server counts them; 0 where it does not
    completion_tokens: int
    request_id: str  # The server's name for this answer
    refusal: str = ""  # Why the endpoint will never answer this request, in its own words; empty where it did answer

    @property
    def whole(self) -> bool:
        """Whether the model ended the answer by itself: not cut off, not filtered, not refused."""
        return self.finish_reason in ("stop", "None")

    @property
    def tokens(self) -> int:
        """Number of tokens on a bill."""
        return self.prompt_tokens + self.completion_tokens


class ChatModel(Protocol):
    """A model that answers chats: `models.OpenAIChatModel`, `models.LocalChatModel`, or one's own."""

    batch_size: int  # Maximum number of requests in one call of `complete`
    concurrency: int  # Maximum number of calls of `complete` at a time, in threads

    identity: Mapping[str, Any]
    """JSON values that an answer depends on beside the request. Never a key, never an address."""
    route: Mapping[str, Any]
    """JSON values that a refusal depends on beside that, such as the address. They are hashed, and not kept."""

    def complete(self, requests: Sequence[ChatRequest]) -> list[ChatCompletion]:
        """One answer to each request, in order. RequestRefused if one of them will never be answered (where there are
        several, each is then sent alone); RequestFailed for no answer, which says whether a retry makes sense."""
        ...


def _sha256(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
