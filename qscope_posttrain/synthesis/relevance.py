"""How much a feature has to do with the topic: from a judge that reads its explanation, or from a table."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qscope_posttrain.endpoint.chat import ChatRequest, Sampling
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.endpoint.templates import PromptTemplates, number_field
from qscope_posttrain.errors import UserFileNotFoundError, UserValueError
from qscope_posttrain.features.explanation import Explanation, FeatureId
from qscope_posttrain.report.summary import write_text

COLUMNS = ("layer", "feature", "relevance")


@dataclass(frozen=True)
class Judgement:
    """What a judge makes of explained features."""

    relevance: Mapping[FeatureId, float]
    unreadable: tuple[FeatureId, ...]
    """Features whose judgement could not be read, also when asked for again, or was refused"""


def judge_relevance(
    session: ChatSession, templates: PromptTemplates, explanations: Sequence[Explanation], topic: str
) -> Judgement:
    """s_f in [0, 1] of every explained feature (equation 19), from one greedy request each.

    Raises:
        ValueError: no judgement at all can be read.
    """
    sampling = Sampling(temperature=0.0, max_tokens=64)
    requests = [
        ChatRequest(templates.messages("relevance", explanation=entry.text, topic=topic), sampling)
        for entry in explanations
    ]
    answers = session.complete_parsed(
        requests, number_field("relevance", 0.0, 1.0), description="relevance of features"
    )
    pairs = list(zip([entry.feature for entry in explanations], answers, strict=True))
    relevance = {feature: answer.value for feature, answer in pairs if answer.value is not None}
    if pairs and not relevance:
        last = answers[-1].completion
        said = f"was refused: {last.refusal}" if last.refusal else f"was {last.text[:300]!r}"
        raise UserValueError(
            f"the judge rated none of {len(pairs)} features readably; expected answers such as "
            f'{{"relevance": 0.7}}, the last {said}. Ask another judge, change relevance.jinja (--templates), or give '
            "a table (--relevance)."
        )
    return Judgement(relevance, tuple(feature for feature, answer in pairs if answer.value is None))


def read_relevance(path: str | os.PathLike[str]) -> dict[FeatureId, float]:
    """A CSV table with the columns layer, feature and relevance; others are ignored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, a cell is no number, or a feature comes twice.
    """
    location = Path(path)
    if not location.is_file():
        raise UserFileNotFoundError(f"no table of relevance at '{location}'.")
    found: dict[FeatureId, float] = {}
    with location.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise UserValueError(f"'{location}' needs the columns {', '.join(COLUMNS)}; it has {reader.fieldnames}.")
        for number, row in enumerate(reader, start=2):
            try:
                feature, score = FeatureId(int(row["layer"]), int(row["feature"])), float(row["relevance"])
            except (TypeError, ValueError) as error:
                raise UserValueError(f"{location}, line {number}: {error}.") from error
            if feature in found or not 0 <= score <= 1:
                raise UserValueError(
                    f"{location}, line {number}: {feature} comes twice, or its relevance is not in [0, 1]."
                )
            found[feature] = score
    return found


def write_relevance(path: str | os.PathLike[str], relevance: Mapping[FeatureId, float]) -> Path:
    """The table that `read_relevance` reads, for editing by hand."""
    lines = [",".join(COLUMNS)]
    lines += [f"{feature.layer},{feature.feature_id},{score!r}" for feature, score in sorted(relevance.items())]
    write_text(path, "\n".join(lines) + "\n")
    return Path(path)
