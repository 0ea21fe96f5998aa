"""Pages that show what models wrote: for each cell and arm, prompts drawn at random, beside plain SFT or plain DAPO."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiments import repetition_rows as repetition
from benchmarks.experiments import switching_rows as switching
from benchmarks.experiments.choice import choose_weights
from benchmarks.experiments.grouping import by_cell
from benchmarks.testbed.repetition.config import PLAIN
from benchmarks.testbed.report import Example
from benchmarks.testbed.switching.config import SFT
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.files import read_json, read_jsonl
from qscope_posttrain.report.html import Section, write_html
from qscope_posttrain.report.summary import writable_folder
from qscope_posttrain.text.scripts import target_script

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
Prompt = tuple[Any, ...]
"""Identifies a prompt within a run."""


@dataclass(frozen=True)
class Completion:
    """One completion and what is said of it beside the arm's title."""

    prompt: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class RunFile:
    """The file that holds a run's completions."""

    base: int
    seed: int
    path: Path

    @property
    def place(self) -> tuple[int, int]:
        """(base, seed): runs of two arms with the same place are a pair."""
        return self.base, self.seed

    def read(self) -> dict[Prompt, Completion] | None:
        """Its completions by prompt; None where the file is gone.

        Raises:
            ValueError: the file is there, but is not what a run writes.
        """
        if not self.path.is_file():
            return None
        try:
            if self.path.suffix == ".json":
                return _of_switching(read_json(self.path))
            return _of_repetition([sample for _, sample in read_jsonl(self.path)])
        except (ValueError, KeyError, TypeError) as error:
            raise UserValueError(f"'{self.path}' does not hold the completions of a run: {error!r}.") from error


@dataclass(frozen=True)
class _Group:
    """An arm of one cell at one weight, and the reference."""

    cell: str
    arm: str
    title: str
    weight: float | None
    highlight: str
    """Script that is marked; empty for none."""
    reference_title: str
    references: Mapping[tuple[int, int], RunFile]
    runs: Sequence[RunFile]


def write_completions_pages(
    rows: Iterable[Mapping[str, Any]], folder: str | os.PathLike[str], per_page: int = 40, seed: int = 0
) -> list[Path]:
    """Write one HTML page for each cell and arm, and return their paths.

    A page shows `per_page` prompts drawn at random from all those that the runs of the arm and of its reference have
    in common, with both completions of the same prompt, base model and seed side by side. The draw knows the cell and
    `seed`, not the arm or any text: arms with the same runs show the same prompts. Arms of a switching experiment are
    shown at the weight chosen on validation prompts. Runs whose folders are gone are counted on the page.

    Args:
        rows: rows of both kinds.
        folder: made if it does not exist.
        per_page: prompts on a page.
        seed: of the draw; it is stated on the page.

    Raises:
        ValueError: the folder cannot be written, a folder of a run holds something else, runs and reference were given
            different prompts, or two arms need a file of the same name.
    """
    if per_page < 1:
        raise UserValueError(f"per_page must be at least 1, got {per_page}.")
    place = writable_folder(folder)
    listed = list(rows)
    paths: list[Path] = []
    cached: dict[RunFile, dict[Prompt, Completion] | None] = {}
    for group in [*_switching_groups(listed), *_repetition_groups(listed)]:
        path = place / f"{_slug(group.cell)}-{_slug(group.arm)}.html"
        if path in paths:
            raise UserValueError(
                f"two arms would be written to '{path}'; give them names that differ in more than signs."
            )
        paths.append(_write_page(path, group, per_page, seed, cached))
    return paths


def _write_page(
    path: Path, group: _Group, per_page: int, seed: int, cached: dict[RunFile, dict[Prompt, Completion] | None]
) -> Path:
    """Read what is there of both arms, draw, and write."""

    def completions(run: RunFile) -> dict[Prompt, Completion] | None:
        if run not in cached:
            cached[run] = run.read()
        return cached[run]

    pairs: dict[Prompt, tuple[Completion, Completion]] = {}
    gone = 0
    for run in group.runs:
        reference = group.references.get(run.place)
        own, other = completions(run), None if reference is None else completions(reference)
        if own is None or other is None:
            gone += 1
            continue
        for prompt in own.keys() & other.keys():
            if own[prompt].prompt != other[prompt].prompt:
                raise UserValueError(
                    f"cell '{group.cell}', arm '{group.arm}', base {run.base}, seed {run.seed}: prompt {prompt} is not "
                    f"the prompt of '{group.reference_title}'; the two runs cannot be shown side by side."
                )
            pairs[(run.base, run.seed, *prompt)] = other[prompt], own[prompt]
    ordered = sorted(pairs)
    chosen = sorted(random.Random(f"{seed} {group.cell}").sample(ordered, min(per_page, len(ordered))))
    examples = [_example(key, *pairs[key], group) for key in chosen]
    title = f"{group.title}, {group.cell}"
    body = _body(group, len(examples), len(ordered), gone, seed)
    return write_html(path, title, [Section("Completions side by side", body, examples=examples)])


def _example(key: Prompt, reference: Completion, own: Completion, group: _Group) -> Example:
    base, seed, *prompt = key
    head = f"base {base}, seed {seed}, {' '.join(map(str, prompt[:2]))}:\n{reference.prompt}"
    answers = {f"{group.reference_title}{reference.note}": reference.text, f"{group.title}{own.note}": own.text}
    return Example(head, answers, group.highlight)


def _body(group: _Group, shown: int, available: int, gone: int, seed: int) -> str:
    weight = f" at weight {group.weight:g}, chosen on validation prompts" if group.weight else ""
    beside = f"beside **{group.reference_title}** with the same base model, seed and prompt"
    lines = [f"**{group.title}**{weight}, {beside}."]
    if shown:
        lines.append(
            f"{shown} of {available} prompts, drawn at random with seed {seed}; nothing was left out or picked by its "
            "content."
        )
    if group.highlight:
        lines.append(f"Letters of the script {group.highlight} are marked.")
    if gone:
        lines.append(
            f"The completions of {gone} of {len(group.runs)} runs are not there any more: their folders in the cache "
            "are gone. Running the experiment again makes them."
        )
    elif not shown:
        lines.append("No completions were kept.")
    return " ".join(lines)


def _switching_groups(rows: Iterable[Mapping[str, Any]]) -> list[_Group]:
    groups = []
    for cell, own in by_cell(switching.switching_rows(rows)).items():
        pairs = switching.compared_with_sft(own)
        weights = {arm: choice.weight for arm, choice in choose_weights(pairs).items()}
        highlight = target_script(own[0].target) if own[0].identify == "script" else ""
        references = {(row.base, row.seed): _run(row, "run.json") for row in own if row.arm == SFT}
        for arm in dict.fromkeys(pair.run.arm for pair in pairs):
            shown = [row for row in own if row.arm == arm and row.weight == weights.get(arm, 0.0)]
            runs = [_run(row, "run.json") for row in shown]
            title, weight = shown[0].title, weights.get(arm)
            groups.append(_Group(cell, arm, title, weight, highlight, "SFT", references, runs))
    return groups


def _repetition_groups(rows: Iterable[Mapping[str, Any]]) -> list[_Group]:
    groups = []
    for cell, own in by_cell(repetition.repetition_rows(rows)).items():
        arms = repetition.by_arm(own)
        plain = arms.pop(PLAIN, [])
        references = {row.key: _run(row, "samples.jsonl") for row in plain}
        title = plain[0].title if plain else PLAIN
        for arm, shown in arms.items():
            runs = [_run(row, "samples.jsonl") for row in shown]
            groups.append(_Group(cell, arm, shown[0].title, None, "", title, references, runs))
    return groups


def _run(row: switching.SwitchingRow | repetition.RepetitionRow, file: str) -> RunFile:
    return RunFile(row.base, row.seed, Path(row.folder) / file)


def _of_switching(content: Mapping[str, Any]) -> dict[Prompt, Completion]:
    return {
        (sample["language"], sample["prompt_index"], sample["sample_index"]): Completion(
            sample["prompt"], sample["response"]
        )
        for sample in content["samples"]
    }


def _of_repetition(samples: Sequence[Mapping[str, Any]]) -> dict[Prompt, Completion]:
    """Each line is a held-out problem; whether it loops and is right stands beside the arm's title."""
    return {
        ("problem", sample["problem"]): Completion(
            sample["prompt"],
            sample["completion"],
            (" · endless" if sample["loop"] else "") + (" · right" if sample["right"] else " · wrong"),
        )
        for sample in samples
    }


def _slug(name: str) -> str:
    return _UNSAFE.sub("-", name).strip("-") or "unnamed"
