"""Rate features by their relevance to a topic, choose targets, and measure which of them texts reach (Qwen-Scope,
equations 13, 18 to 20 and 23)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qscope_posttrain.analysis.classifier.featurizer import TextFeaturizer
from qscope_posttrain.endpoint.chat import ChatRequest, PromptTemplates, Sampling, number_field
from qscope_posttrain.endpoint.session import ChatSession, require_one_read
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.explain.explanation import Explanation, FeatureId
from qscope_posttrain.features.text_features import TextFeatures
from qscope_posttrain.files import read_csv
from qscope_posttrain.intervals import Interval, wilson
from qscope_posttrain.report.summary import write_text

Hits = NDArray[np.bool_]
COLUMNS = ("layer", "feature", "relevance")


class FeatureReader(TextFeaturizer):
    """A model with the SAEs of some layers; h of equation 13 is taken over all tokens of a text but the first."""

    def verify(self, texts: Sequence[str], features: Sequence[FeatureId]) -> list[float]:
        """The largest activation of one feature on each text; 0 where it does not fire (see `pipeline.Verify`)."""
        found = [0.0] * len(texts)
        # A text of one token has none that counts, and a list of such texts cannot be read.
        places = [place for place, text in enumerate(texts) if len(self.tokenizer(text)["input_ids"]) > 1]
        if not places:
            return found
        distinct = sorted({features[place] for place in places})
        layers, quiet = sorted({feature.layer for feature in distinct}), self.with_settings({"show_progress": False})
        values = activations(quiet.features([texts[place] for place in places], layers=layers), distinct)
        for row, place in enumerate(places):
            found[place] = float(values[row, distinct.index(features[place])])
        return found


def firing(features: Mapping[int, TextFeatures], targets: Sequence[FeatureId]) -> Hits:
    """[texts, targets]: h of equation 13, whether a feature fires on any token of a text that counts (eps = 0).

    Args:
        features: `FeatureReader.read(texts)`; ValueError where the layer of a target was not read.
    """
    return activations(features, targets) > 0


def activations(features: Mapping[int, TextFeatures], targets: Sequence[FeatureId]) -> NDArray[np.float32]:
    """[texts, targets]: the largest activation of each feature on each text, 0 where it does not fire."""
    missing = sorted({target.layer for target in targets} - set(features))
    if missing:
        raise UserValueError(f"targets lie in layers {missing}, which were not read; read were {sorted(features)}.")
    count = len(next(iter(features.values()))) if features else 0
    found = np.zeros((count, len(targets)), dtype=np.float32)
    for layer, read in features.items():
        places = [place for place, target in enumerate(targets) if target.layer == layer]
        if places:
            columns = [targets[place].feature_id for place in places]
            if max(columns) >= read.matrix.shape[1]:
                raise UserValueError(
                    f"layer {layer} has the features 0 to {read.matrix.shape[1] - 1}; a target is #{max(columns)}."
                )
            found[:, places] = read.matrix[:, columns].toarray()
    return found


def judge_relevance(
    session: ChatSession, templates: PromptTemplates, explanations: Sequence[Explanation], topic: str
) -> tuple[dict[FeatureId, float], tuple[FeatureId, ...]]:
    """s_f in [0, 1] of every explained feature (equation 19), from one greedy request to a judge each; and the features
    whose rating could not be read, also after further requests, or was refused."""
    sampling = Sampling(temperature=0.0, max_tokens=64)
    requests = [
        ChatRequest(templates.messages("relevance", explanation=entry.text, topic=topic), sampling)
        for entry in explanations
    ]
    answers = session.complete_parsed(requests, number_field("relevance", 0.0, 1.0), "relevance of features")
    pairs = list(zip([entry.feature for entry in explanations], answers, strict=True))
    require_one_read(
        answers,
        f"the judge rated none of {len(pairs)} features",
        '{"relevance": 0.7}',
        "Ask another judge, change relevance.jinja (--templates), or give a table (--relevance).",
    )
    relevance = {feature: answer.value for feature, answer in pairs if answer.value is not None}
    return relevance, tuple(feature for feature, answer in pairs if answer.value is None)


def read_relevance(path: str | os.PathLike[str]) -> dict[FeatureId, float]:
    """Read a CSV table with the columns layer, feature and relevance; others are ignored."""
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


def target_features(relevance: Mapping[FeatureId, float], tau: float) -> tuple[FeatureId, ...]:
    """T = {(l, f): s_f >= tau} (equation 19), in order of layer and id. ValueError where no feature reaches tau."""
    wrong = [f"{feature}: {score}" for feature, score in relevance.items() if not 0 <= score <= 1]
    if wrong:
        raise UserValueError(f"relevance lies in [0, 1]; got {', '.join(wrong[:5])}.")
    found = tuple(sorted(feature for feature, score in relevance.items() if score >= tau))
    if not found:
        highest = max(relevance.values(), default=float("nan"))
        raise UserValueError(f"no feature has a relevance of at least {tau:g}; the highest is {highest:.3g}.")
    return found


def missing_first(targets: Sequence[FeatureId], counts: Sequence[int], enough: int) -> list[FeatureId]:
    """The targets to generate for: those that no seed example fires (T_miss, equation 20), then those that fewer than
    `enough` fire. `counts`: seed examples that fire each target; c_f of equation 18 is count > 0."""
    return [target for count, target in sorted(zip(counts, targets, strict=True)) if count < enough]


def split_targets(
    targets: Sequence[FeatureId], share: float, seed: int = 0
) -> tuple[tuple[FeatureId, ...], tuple[FeatureId, ...]]:
    """Draw (targets that data are made for, targets held out to measure it), both in the order of `targets`.
    ValueError: a share outside [0, 1), or too few targets to leave one to make data for."""
    if not 0 <= share < 1:
        raise UserValueError(f"the share held out must lie in [0, 1); got {share}.")
    held = round(share * len(targets))
    if held >= len(targets):
        raise UserValueError(f"holding out {held} of {len(targets)} targets leaves none to make data for.")
    apart = set(np.random.default_rng(seed).permutation(len(targets))[:held].tolist())
    kept = tuple(target for place, target in enumerate(targets) if place not in apart)
    return kept, tuple(targets[place] for place in sorted(apart))


def reached_features(features: TextFeatures, layer: int, min_texts: int) -> tuple[FeatureId, ...]:
    """The features of one layer that fire on at least `min_texts` of the texts: targets that nobody chose."""
    counts = np.diff(features.matrix.tocsc().indptr)
    return tuple(FeatureId(layer, int(feature)) for feature in np.flatnonzero(counts >= min_texts))


def coverage(hits: Hits) -> float:
    """Cov(D), the share of targets that at least one example of D fires (equation 23). `hits` [texts, targets]."""
    if hits.shape[1] == 0:
        raise UserValueError("coverage of no targets is not defined.")
    return float(hits.any(axis=0).mean()) if len(hits) else 0.0


def coverage_interval(hits: Hits) -> Interval:
    """Coverage with Wilson limits for other features of the same kind. The features count as a random draw, the
    examples as given."""
    return wilson(int(hits.any(axis=0).sum()) if len(hits) else 0, hits.shape[1])


def coverage_of_subsets(hits: Hits, size: int, draws: int = 200, seed: int = 0) -> Interval:
    """Mean coverage of random subsets of `size` examples, and the range that holds 95 % of them."""
    if not 0 < size <= len(hits) or draws < 1:
        raise UserValueError(f"expected 1 to {len(hits)} examples and at least one draw; got {size} and {draws}.")
    generator = np.random.default_rng(seed)
    found = [coverage(hits[generator.choice(len(hits), size, replace=False)]) for _ in range(draws)]
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(np.mean(found)), float(low), float(high))


def growth(hits: Hits) -> list[float]:
    """Coverage after the first, the first two, ... examples."""
    if hits.shape[1] == 0:
        raise UserValueError("coverage of no targets is not defined.")
    return [float(share) for share in np.logical_or.accumulate(hits, axis=0).mean(axis=1)]
