"""A feature's explanation in words, and how well it predicts where the feature fires."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval, rate_difference


class FeatureId(NamedTuple):
    """One feature of the SAE of one layer."""

    layer: int
    feature_id: int

    def __str__(self) -> str:
        return f"layer {self.layer} #{self.feature_id}"


@dataclass(frozen=True)
class Prediction:
    """Outcomes of a judge that read an explanation and said of contexts whether it fits them."""

    hits: int
    """Positive contexts that it took"""
    positives: int
    rejections: int
    """Negative contexts that it refused"""
    negatives: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 0:
                raise UserValueError(f"{name} of a prediction must be a whole number from 0, got {value!r}.")
        if self.hits > self.positives or self.rejections > self.negatives:
            raise UserValueError(f"a prediction cannot be right more often than it was asked: {self}.")

    @property
    def balanced_accuracy(self) -> float | None:
        """(hits / positives + rejections / negatives) / 2; None without both kinds. Chance is 0.5."""
        if not self.positives or not self.negatives:
            return None
        return (self.hits / self.positives + self.rejections / self.negatives) / 2

    def interval(self, level: float = 0.95) -> Interval | None:
        """Of the balanced accuracy: (d + 1) / 2 with d the difference of hit rate and false alarm rate, for which
        Newcombe's interval holds (see `intervals.rate_difference`)."""
        if not self.positives or not self.negatives:
            return None
        alarms = self.negatives - self.rejections
        difference = rate_difference((self.hits, self.positives), (alarms, self.negatives), level)
        return Interval(*((value + 1) / 2 for value in difference))


@dataclass(frozen=True)
class Explanation:
    """What one feature stands for, in the words of a model, and the scores of these words on held-out contexts."""

    layer: int
    feature_id: int
    text: str
    model: str
    """Who wrote it"""
    detection: Prediction | None = None
    """Contexts in which it fires, told from random ones"""
    fuzzing: Prediction | None = None
    """Contexts with the firing tokens marked, told from contexts with other tokens marked"""

    def __post_init__(self) -> None:
        for name in ("layer", "feature_id"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise UserValueError(f"{name} of an explanation must be a whole number from 0, got {value!r}.")
        if not isinstance(self.text, str) or not self.text.strip():
            raise UserValueError(f"the explanation of {self.feature} must be a text, got {self.text!r}.")
        if not isinstance(self.model, str):
            raise UserValueError(f"the model of the explanation of {self.feature} must be a name, got {self.model!r}.")

    @property
    def feature(self) -> FeatureId:
        return FeatureId(self.layer, self.feature_id)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; scores that were not taken are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Explanation:
        """Reads `to_dict`, strictly.

        Raises:
            ValueError: keys that are unknown or missing, or a value of another kind.
        """
        if not isinstance(values, Mapping):
            raise UserValueError(f"an explanation must be an object, got {type(values).__name__}.")
        needed, scores = {"layer", "feature_id", "text", "model"}, {"detection", "fuzzing"}
        if not needed <= set(values) <= needed | scores:
            raise UserValueError(
                f"an explanation has the keys {sorted(needed)} and may have {sorted(scores)}, got {sorted(values)}."
            )
        read: dict[str, Any] = {name: _prediction(name, values[name]) for name in scores & set(values)}
        return cls(**{name: values[name] for name in needed}, **read)


def _prediction(name: str, value: Any) -> Prediction:
    keys = {"hits", "positives", "rejections", "negatives"}
    if not isinstance(value, Mapping) or set(value) != keys:
        raise UserValueError(f"{name} of an explanation must have the keys {sorted(keys)}, got {value!r:.200}.")
    return Prediction(**value)


def check_distinct(explanations: Sequence[Explanation]) -> None:
    """Raise a ValueError when a feature is explained twice."""
    seen: set[FeatureId] = set()
    for entry in explanations:
        if entry.feature in seen:
            raise UserValueError(f"{entry.feature} is explained twice.")
        seen.add(entry.feature)
