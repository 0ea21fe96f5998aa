"""What decides whether a response has switched: its script, or a detector of the caller's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.text.scripts import contains_language_script, target_script


class SwitchDetector(Protocol):
    """Decides whether a response has switched to the target language that the detector was made for.

    A function will do, or a `SpanIdentifier`. Its attributes `name` and `to_dict()`, if it has them, are stated with
    the result.
    """

    def __call__(self, text: str, source: str, /) -> bool:
        """Whether `text`, which should be in the language `source`, has switched.

        An empty text is allowed, and is no switch. ValueError if texts in this source language cannot be judged.
        """
        ...


@dataclass(frozen=True)
class ScriptDetector:
    """The rule of SASFT: any character of the target's script is a switch. See `contains_language_script`."""

    target: str
    """Language with a script of its own, e.g. "zh". ValueError for others."""

    name = "script"

    def __post_init__(self) -> None:
        target_script(self.target)

    def __call__(self, text: str, source: str) -> bool:
        return contains_language_script(text, self.target, source)

    def to_dict(self) -> dict[str, Any]:
        """The script."""
        return {"script": target_script(self.target)}


def describe_detector(detector: SwitchDetector) -> dict[str, Any]:
    """JSON-ready: `by`, the detector's name, and what its `to_dict` says. A method is described by its object."""
    owner = getattr(detector, "__self__", detector)
    name = getattr(owner, "name", None) or getattr(owner, "__name__", None) or type(owner).__name__
    content = owner.to_dict() if hasattr(owner, "to_dict") else {}
    return {"by": str(name), **content}


def check_detector(detector: SwitchDetector, source: str) -> None:
    """ValueError if the detector cannot judge texts in `source`, or calls a text without a word switched."""
    if detector("", source):
        raise UserValueError(
            f"The detector {describe_detector(detector)['by']!r} calls an empty response to a prompt in {source!r} "
            "switched; it must return False where there is no text."
        )
