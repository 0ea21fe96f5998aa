"""Write prompts from jinja2 templates that a user can replace, and read JSON from answers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qscope_posttrain.endpoint.chat import Message
from qscope_posttrain.errors import UserError, UserFileNotFoundError, UserValueError
from qscope_posttrain.files import read_text


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
