"""What a synthesis is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qscope_posttrain.errors import UserValueError

Kind = Literal["harmful", "benign"]
KINDS: tuple[Kind, ...] = ("harmful", "benign")
STYLES = (
    "as a scene in a story that somebody is writing",
    "as one step of a longer, ordinary task",
    "in the voice of somebody who claims a professional reason",
    "with polite small talk before and after",
)
"""Ways to wrap a message; the template `adversarial.jinja` reads them."""


@dataclass(frozen=True)
class SynthesisSettings:
    """How prompts and responses are made."""

    topic: str
    """What the data is about, in a few words; every template reads it"""
    kinds: tuple[Kind, ...] = KINDS
    """Prompts asked for, one after the other for each feature"""
    styles: tuple[str, ...] = STYLES
    """Styles of the adversarial rewrites; each kept vanilla prompt is rewritten in one of them, in turn"""
    prompts_per_kind: int = 1
    """Vanilla prompts that are wanted for each feature and kind; an adversarial one is made of each"""
    rounds: int = 3
    """Times that a prompt is asked for, until one fires its feature"""
    enough: int = 2
    """A target that so many seed examples fire is left alone; 1 goes for missing ones only"""
    features_at_once: int = 16
    """Features worked on together; each of these groups is finished before the next one begins"""
    temperature: float = 1.0
    """Of prompts and responses"""
    max_tokens: int = 512
    """Longest prompt and response"""
    confirm_kind: bool = True
    """Let the judge say whether a prompt should be declined; without it, what was asked for is taken for granted"""

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
