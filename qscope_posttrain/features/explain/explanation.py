"""Explanations of features in words, and test results: how well they predict where a feature fires."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.intervals import Interval, bootstrap_difference, bootstrap_over_prompts, rate_difference
from qscope_posttrain.report.tables import Cell, Table

if TYPE_CHECKING:
    from qscope_posttrain.features.explain.contexts import FeatureContexts

Method = Literal["detection", "fuzzing"]
METHODS: tuple[Method, ...] = ("detection", "fuzzing")


class FeatureId(NamedTuple):
    """One feature of the SAE of one layer."""

    layer: int
    feature_id: int

    def __str__(self) -> str:
        return f"layer {self.layer} #{self.feature_id}"


@dataclass(frozen=True)
class Prediction:
    """Counts of a judge's decisions whether contexts fit an explanation."""

    hits: int  # Positive contexts that the judge accepted
    positives: int
    rejections: int  # Negative contexts that the judge rejected
    negatives: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 0:
                raise UserValueError(f"{name} of a prediction must be a whole number from 0, got {value!r}.")
        if self.hits > self.positives or self.rejections > self.negatives:
            raise UserValueError(f"a judge cannot be right more often than it decides: {self}.")

    @property
    def balanced_accuracy(self) -> float | None:
        """(hits / positives + rejections / negatives) / 2; None without both kinds. Chance is 0.5."""
        if not self.positives or not self.negatives:
            return None
        return (self.hits / self.positives + self.rejections / self.negatives) / 2

    def interval(self, level: float = 0.95) -> Interval | None:
        """Interval of the balanced accuracy (d + 1) / 2, from Newcombe's interval of d, the difference of hit rate and
        false alarm rate (see `intervals.rate_difference`)."""
        if not self.positives or not self.negatives:
            return None
        alarms = self.negatives - self.rejections
        difference = rate_difference((self.hits, self.positives), (alarms, self.negatives), level)
        return Interval(*((value + 1) / 2 for value in difference))


@dataclass(frozen=True)
class Explanation:
    """Explanation of one feature by a model, with its scores on held-out contexts."""

    layer: int
    feature_id: int
    text: str
    model: str  # Name of the model that wrote it
    detection: Prediction | None = None  # Distinguishing contexts in which it fires from random ones
    fuzzing: Prediction | None = None  # Distinguishing the firing tokens, marked, from others

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
        """Read the result of `to_dict`, strictly."""
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


@dataclass(frozen=True)
class Explained:
    """Explanations and their test results."""

    explanations: tuple[Explanation, ...]
    controls: Mapping[Method, Mapping[FeatureId, Prediction]]  # Scores with another feature's explanation
    contexts: tuple[FeatureContexts, ...]
    skipped: Mapping[FeatureId, str]  # Features without an explanation, and why
    unread: Mapping[Method, tuple[int, int]] = field(default_factory=dict)
    """(answers of the judge that could not be read, all), the control's among them"""

    def mean(self, method: Method, control: bool = False) -> Interval | None:
        """Mean balanced accuracy over features, with a bootstrap interval over them."""
        values = [pair[control] for pair in self._pairs(method, need_control=control)]
        return bootstrap_over_prompts([[value] for value in values]) if values else None

    def gain(self, method: Method) -> Interval | None:
        """Mean difference between own and another's explanation, paired by feature."""
        pairs = self._pairs(method, need_control=True)
        return bootstrap_difference([[own] for own, _ in pairs], [[other] for _, other in pairs]) if pairs else None

    def _pairs(self, method: Method, need_control: bool) -> list[tuple[float, float]]:
        pairs = []
        for entry in self.explanations:
            own = _accuracy(getattr(entry, method))
            other = _accuracy(self.controls.get(method, {}).get(entry.feature))
            if own is not None and (other is not None or not need_control):
                pairs.append((own, float("nan") if other is None else other))
        return pairs

    def to_table(self) -> Table:
        """One line per feature: explanation, scores with intervals, and the score of another feature's explanation."""
        firing = {FeatureId(entry.layer, entry.feature_id): entry.firing_texts for entry in self.contexts}
        used = [method for method in METHODS if any(getattr(entry, method) for entry in self.explanations)]
        rows: list[list[Cell]] = []
        for entry in self.explanations:
            row: list[Cell] = [*entry.feature, firing[entry.feature], entry.text]
            for method in used:
                own = getattr(entry, method)
                other = self.controls.get(method, {}).get(entry.feature)
                row += [_shown(own.interval() if own else None), _accuracy(other)]
            rows.append(row)
        columns = ["layer", "feature", "texts", "explanation"]
        columns += [name for method in used for name in (method, "shuffled")]
        return Table("Explanations", columns, rows, _CAPTION)

    def summary_table(self) -> Table:
        """One line per method: means over features."""
        rows: list[list[Cell]] = []
        for method in METHODS:
            if count := len(self._pairs(method, False)):
                intervals = (self.mean(method), self.mean(method, True), self.gain(method))
                rows.append([method, count, *map(_shown, intervals), self._unread(method)])
            elif method in self.unread:
                rows.append([method, 0, None, None, None, self._unread(method)])
        return Table(
            "Explanations tested",
            ["method", "features", "balanced accuracy", "another feature's words", "difference", "unreadable"],
            rows,
            "Means over features, 95 % bootstrap intervals over features; the difference is paired. Chance is 0.5. "
            "unreadable: answers of the judge; their contexts count nowhere.",
        )

    def _unread(self, method: Method) -> str | None:
        return "{} of {}".format(*self.unread[method]) if method in self.unread else None


_CAPTION = (
    "texts: distinct texts on which the feature fires. detection, fuzzing: balanced accuracy on held-out contexts, and "
    "its 95 % interval (Newcombe). shuffled: the same contexts judged by the words for another feature. Chance is 0.5."
)


def _accuracy(prediction: Prediction | None) -> float | None:
    return None if prediction is None else prediction.balanced_accuracy


def _shown(interval: Interval | None) -> str | None:
    return None if interval is None else interval.text(".2f")
