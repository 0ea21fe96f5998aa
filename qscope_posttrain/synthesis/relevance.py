"""Rate how relevant features are to the topic: by a judge that reads their explanations, or from a table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qscope_posttrain.endpoint.chat import ChatRequest, Sampling
from qscope_posttrain.endpoint.session import ChatSession
from qscope_posttrain.endpoint.templates import PromptTemplates, number_field
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.explain.explanation import Explanation, FeatureId
from qscope_posttrain.files import read_csv
from qscope_posttrain.report.summary import write_text

COLUMNS = ("layer", "feature", "relevance")


@dataclass(frozen=True)
class Judgment:
    """A judge's ratings of explained features."""

    relevance: Mapping[FeatureId, float]
    unreadable: tuple[FeatureId, ...]
    """Features whose rating could not be read, also after further requests, or was refused"""


def judge_relevance(
    session: ChatSession, templates: PromptTemplates, explanations: Sequence[Explanation], topic: str
) -> Judgment:
    """s_f in [0, 1] of every explained feature (equation 19), from one greedy request each.

    Raises:
        ValueError: no rating at all can be read.
    """
    sampling = Sampling(temperature=0.0, max_tokens=64)
    requests = [
        ChatRequest(templates.messages("relevance", explanation=entry.text, topic=topic), sampling)
        for entry in explanations
    ]
    answers = session.complete_parsed(requests, number_field("relevance", 0.0, 1.0), "relevance of features")
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
    return Judgment(relevance, tuple(feature for feature, answer in pairs if answer.value is None))


def read_relevance(path: str | os.PathLike[str]) -> dict[FeatureId, float]:
    """Read a CSV table with the columns layer, feature and relevance; others are ignored.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a missing column, a cell that is no number, or a feature listed twice.
    """
    rows = read_csv(path, "table of relevance")
    header = next(rows, (0, []))[1]
    if not set(COLUMNS) <= set(header):
        raise UserValueError(f"'{path}' needs the columns {', '.join(COLUMNS)}; it has {', '.join(header) or 'none'}.")
    found: dict[FeatureId, float] = {}
    for number, cells in rows:
        row = dict(zip(header, cells, strict=False))
        try:
            feature, score = FeatureId(int(row["layer"]), int(row["feature"])), float(row["relevance"])
        except (KeyError, ValueError) as error:
            raise UserValueError(
                f"{path}, line {number}: expected numbers for {', '.join(COLUMNS)}, got {cells} ({error})."
            ) from error
        if feature in found or not 0 <= score <= 1:
            raise UserValueError(f"{path}, line {number}: {feature} comes twice, or its relevance is not in [0, 1].")
        found[feature] = score
    return found


def write_relevance(path: str | os.PathLike[str], relevance: Mapping[FeatureId, float]) -> Path:
    """Write the table that `read_relevance` reads, for editing by hand."""
    lines = [",".join(COLUMNS)]
    lines += [f"{feature.layer},{feature.feature_id},{score!r}" for feature, score in sorted(relevance.items())]
    write_text(path, "\n".join(lines) + "\n")
    return Path(path)
