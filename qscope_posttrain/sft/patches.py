"""Change methods of one object, and put everything back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from transformers import Trainer

_ABSENT = object()


class InstancePatches:
    """Wraps methods on one instance; `restore()` undoes it in any order relative to other wrappers.

    A wrapper gets the method that was there before as its first argument. When someone else has wrapped the method
    again meanwhile, ours cannot be taken out of the chain: it then passes every call through unchanged.
    """

    def __init__(self, target: object) -> None:
        self._target = target
        self._entries: list[tuple[str, Any, _Wrapper]] = []

    def wrap(self, name: str, function: Callable[..., Any]) -> None:
        """Replace `target.name(*args)` by `function(original, *args)`."""
        before = vars(self._target).get(name, _ABSENT)
        wrapper = _Wrapper(getattr(self._target, name), function, before)
        setattr(self._target, name, wrapper)
        self._entries.append((name, before, wrapper))

    def restore(self) -> None:
        """Undo all wraps of this object."""
        for name, before, wrapper in reversed(self._entries):
            wrapper.alive = False
            if vars(self._target).get(name) is not wrapper:
                continue
            # A wrapper below ours may have been switched off before us: do not bring it back.
            while isinstance(before, _Wrapper) and not before.alive:
                before = before.before
            if before is _ABSENT:
                delattr(self._target, name)
            else:
                setattr(self._target, name, before)
        self._entries.clear()


class _Wrapper:
    """A callable in place of a method."""

    def __init__(self, original: Callable[..., Any], function: Callable[..., Any], before: Any) -> None:
        functools.update_wrapper(self, original, updated=())
        self.original = original
        self.function = function
        self.before = before
        self.alive = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.alive:
            return self.original(*args, **kwargs)
        return self.function(self.original, *args, **kwargs)


def calling_trainer(callback: object) -> Trainer:
    """The trainer whose constructor is now calling `callback.on_init_end`.

    transformers tells callbacks nothing about their trainer, but its `__init__` is on the stack at this moment.

    Raises:
        RuntimeError: no such frame; says how to attach instead.
    """
    frame = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer):
            return candidate
        frame = frame.f_back  # type: ignore[assignment]
    name = type(callback).__name__
    raise RuntimeError(
        f"{name} could not find the trainer that it was given to. Attach it by hand after construction: "
        f"trainer = SFTTrainer(...); callback.attach(trainer)."
    )
