"""The record of a run in its checkpoints, compared with the run that resumes from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerState

from qscope_posttrain.errors import UserValueError


def check_resumed(state: TrainerState, key: str, identity: dict[str, Any]) -> None:
    """Compare with what a resumed checkpoint was trained with, and record it for the checkpoints to come.

    The record lies in `TrainerState.stateful_callbacks`, hence in each checkpoint's trainer_state.json, but not as an
    `ExportableState`: transformers would rebuild such a callback from JSON, unattached.

    Raises:
        ValueError: the checkpoint was trained with other settings or features, or without them.
    """
    records: Any = state.stateful_callbacks
    stored = records.get(key)
    if state.global_step > 0:
        if stored is None:
            raise UserValueError(
                f"The checkpoint at step {state.global_step} was trained without {key}, or before it recorded its "
                "settings. A resumed run must have the same losses: start a new run from the checkpoint's weights "
                "instead, or resume without it."
            )
        found = stored["attributes"]
        different = _differences(found, identity)
        if different:
            raise UserValueError(
                f"The checkpoint at step {state.global_step} was trained with other settings of {key}: "
                f"{'; '.join(different)}. Resume with the same settings and features, or start a new run."
            )
    records[key] = {"args": {}, "attributes": identity}


def _differences(stored: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for name in sorted({*stored} & {*current}):
        before, now = stored[name], current[name]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            lines.append(f"{prefix}{name} was {before!r}, is {now!r}")
    # Without negatives, for example, a run has none of their settings: their values would hide the one that matters.
    alone = [name for name, value in sorted({**stored, **current}.items()) if value is not None]
    alone = [f"{prefix}{name}" for name in alone if name not in stored or name not in current]
    if alone:
        lines.append(f"only one of the two has {', '.join(alone)}")
    return lines
