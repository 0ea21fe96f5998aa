"""Requests to a chat model, whoever serves it: prompts from templates that a user can replace, answers and failures."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from qscope_posttrain.errors import UserError, UserFileNotFoundError, UserOSError, UserValueError
from qscope_posttrain.files import read_text


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

    role: str  # "system" or "user"
    content: str


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


class PromptTemplates:
    """Templates by name. `NAME.jinja` in a user's folder replaces the package's own. A template has a block `user`, and
    may have one before it called `system`; each is one message. The filter `quoted` puts a text into quotation marks on
    one line."""

    def __init__(self, package_folder: Path, user_folder: str | os.PathLike[str] | None = None) -> None:
        """Raise a FileNotFoundError for a user's folder that does not exist, or holds no known template."""
        from jinja2 import FunctionLoader, StrictUndefined
        from jinja2.loaders import split_template_path
        from jinja2.sandbox import SandboxedEnvironment

        folders = [package_folder]
        if user_folder is not None:
            folders.insert(0, Path(user_folder))
            known = {path.name for path in package_folder.glob("*.jinja")}
            if not folders[0].is_dir() or not known & {path.name for path in folders[0].glob("*.jinja")}:
                raise UserFileNotFoundError(f"no templates in '{user_folder}'; expected {', '.join(sorted(known))}.")

        def load(name: str) -> str | None:
            places = [folder.joinpath(*split_template_path(name)) for folder in folders]
            return next((read_text(place) for place in places if place.exists()), None)

        # A recipe's templates come from anywhere: they may only write text.
        self._environment = SandboxedEnvironment(
            loader=FunctionLoader(load), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        # jinja2's own `tojson` writes < and > as escapes, for HTML, and would hide the marks around tokens.
        self._environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)

    def messages(self, name: str, **values: Any) -> tuple[Message, ...]:
        """Make a chat from template `name` and the values.

        Raises:
            ValueError: the template is malformed, has no block `user`, or needs a value that is missing.
        """
        from jinja2 import TemplateError

        try:
            template = self._environment.get_template(f"{name}.jinja")
            context = template.new_context(values)
            found = [
                Message(role, "".join(template.blocks[role](context)).strip())
                for role in ("system", "user")
                if role in template.blocks
            ]
        except UserError:
            raise
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise UserValueError(f"template '{name}.jinja': {type(error).__name__}: {error}") from error
        if not found or found[-1].role != "user":
            raise UserValueError(f"template '{name}.jinja' needs a block 'user'.")
        return tuple(found)


def read_json(text: str) -> Any:
    """The first JSON object or list in an answer, which may stand in a code fence or among words; or ValueError."""
    decoder = json.JSONDecoder()
    for position, character in enumerate(text):
        if character in "{[":
            try:
                return decoder.raw_decode(text, position)[0]
            except (json.JSONDecodeError, RecursionError):
                continue
    raise UserValueError(f"the answer holds no JSON: {text[:200]!r}")


def number_field(name: str, low: float, high: float) -> Callable[[str], float]:
    """A reader of answers such as `{"score": 0.7}`: the number in [low, high] under `name`; ValueError otherwise."""

    def fits(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    return lambda text: float(_field(text, name, fits, f"a number from {low:g} to {high:g}"))


def truth_field(name: str) -> Callable[[str], bool]:
    """A reader of answers such as `{"refused": true}`; ValueError otherwise."""
    return lambda text: bool(_field(text, name, lambda value: isinstance(value, bool), "true or false"))


def text_field(name: str) -> Callable[[str], str]:
    """A reader of answers such as `{"explanation": "..."}` with a text that is not empty; ValueError otherwise."""
    return lambda text: str(
        _field(text, name, lambda value: isinstance(value, str) and bool(value.strip()), "a text")
    ).strip()


def _field(text: str, name: str, fits: Callable[[Any], bool], expected: str) -> Any:
    found = read_json(text)
    if not isinstance(found, dict) or name not in found:
        raise UserValueError(f"expected an object with '{name}', got {str(found)[:200]!r}.")
    if not fits(found[name]):
        raise UserValueError(f"'{name}' must be {expected}, got {found[name]!r}.")
    return found[name]
