"""Tell that a text turns into another language of the same script, or into another register, by its words.

Scripts say nothing where English turns into French, or documentation into word problems. Here every word gets a
log-likelihood ratio of the target against the best other language, from a naive Bayes model of character n-grams, and
the contiguous run of words with the largest sum is the span most like the target. A text has switched if that sum
exceeds a threshold, set on clean texts of its source language so that few of them would be called switched.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray

from qscope_posttrain.intervals import Interval, wilson

_WORD = regex.compile(r"\S+")
_DIGIT = regex.compile(r"\d")
_LETTER = regex.compile(r"\p{L}")
_UNSPACED = regex.compile(
    r"[\p{L}&&[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]", regex.VERSION1
)
_MOST_UNSPACED = 0.1
"""Largest share of letters of scripts without word spaces in a language whose words are identified."""
_MOST_CHARACTERS = 5_000_000
"""Characters of a language that the model is fitted on, at most: more changes no ratio that is not clipped."""
_CACHED_WORDS = 500_000


@dataclass(frozen=True)
class SpanSettings:
    """How words are scored and joined to spans."""

    ngrams: tuple[int, int] = (1, 4)
    """Shortest and longest character n-gram; they stay within a word and see its edges as spaces."""

    smoothing: float = 0.1
    """Added to the count of every n-gram, counts being scaled to the same total in every language."""

    clip: float = 6.0
    """Largest absolute log-likelihood ratio of one word, in nats, so that one odd word cannot decide."""

    least_words: int = 3
    """Words in a span, at least."""

    def __post_init__(self) -> None:
        shortest, longest = self.ngrams
        if not 1 <= shortest <= longest:
            raise ValueError(f"ngrams must be (shortest, longest) with 1 <= shortest <= longest; got {self.ngrams}.")
        for name in ("smoothing", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        if self.least_words < 1:
            raise ValueError(f"least_words must be at least 1; got {self.least_words}.")


@dataclass(frozen=True)
class Calibration:
    """The threshold of one source language and the clean texts that it was set on."""

    threshold: float
    """A text in this language has switched if the sum of its best span exceeds this, in nats."""

    texts: int
    """Clean texts, kept out of the fit."""

    false_positives: int
    """How many of them exceed the threshold."""

    median_words: float
    """Their median length. Longer texts than these give more false positives than stated."""

    @property
    def rate(self) -> Interval:
        """False positive rate reached on the calibration texts, with its Wilson interval."""
        return wilson(self.false_positives, self.texts)


@dataclass(frozen=True, eq=False)
class SpanIdentifier:
    """Finds spans of the target language in text of other languages. Made by `fit_span_identifier`."""

    target: str
    """Language or register whose spans are found."""

    others: tuple[str, ...]
    """The languages that it is told from."""

    calibration: Mapping[str, Calibration]
    """By source language: those whose texts can be judged."""

    false_positive_rate: float
    """The rate that thresholds were set for."""

    settings: SpanSettings
    """How words are scored and joined."""

    vectorizer: Any = field(repr=False)
    """Fitted `CountVectorizer`: words to counts of n-grams."""

    ratios: NDArray[np.float64] = field(repr=False)
    """`[n-grams, others]`: log-probability in the target minus that in each other language, nats."""

    cache: dict[str, float] = field(default_factory=dict, repr=False)
    """Scores of words met so far."""

    def __call__(self, text: str, source: str) -> bool:
        """As `switched`: an identifier is a `SwitchDetector`."""
        return self.switched(text, source)

    def word_scores(self, text: str) -> NDArray[np.float64]:
        """`[words]`: log-likelihood ratio of every word (run without white space), in nats, clipped.

        score(w) = min over others o of sum over n-grams g of w of log p(g | target) - log p(g | o). Positive: more
        like the target than like any other language.
        """
        words = _words(text)
        new = sorted({word for word in words if word not in self.cache})
        if new:
            if len(self.cache) + len(new) > _CACHED_WORDS:
                self.cache.clear()
                new = sorted(set(words))
            scores = (self.vectorizer.transform(new) @ self.ratios).min(axis=1)
            self.cache.update(zip(new, np.clip(scores, -self.settings.clip, self.settings.clip).tolist(), strict=True))
        return np.array([self.cache[word] for word in words], dtype=np.float64)

    def score(self, text: str) -> float:
        """Largest sum of word scores over a run of at least `least_words` words, in nats; -inf in a shorter text."""
        return best_run(self.word_scores(text), self.settings.least_words)[0]

    def threshold(self, source: str | None = None) -> float:
        """The sum that a span must exceed in a text of `source`; the largest of all sources if that is not known.

        Raises:
            ValueError: no calibration texts were given for this language.
        """
        if source is None:
            return max(entry.threshold for entry in self.calibration.values())
        if source not in self.calibration:
            raise ValueError(
                f"Switches from {source!r} to {self.target!r} cannot be judged: the identifier was calibrated on "
                f"{', '.join(self.calibration)}. Leave this source language out, or give calibration texts in it."
            )
        return self.calibration[source].threshold

    def switched(self, text: str, source: str) -> bool:
        """Whether a text that should be in `source` has a span of the target. ValueError as for `threshold`."""
        return self.score(text) > self.threshold(source)

    def spans(self, text: str, source: str | None = None) -> list[tuple[int, int]]:
        """Spans of the target as (start, end) in characters, in order: none exactly where the text has not switched.

        The best run of words first, then the best ones left and right of it, as long as they exceed the threshold.
        ValueError as for `threshold`.
        """
        threshold = self.threshold(source)
        places = [match.span() for match in _WORD.finditer(text)]
        scores = self.word_scores(text)
        found = []
        open_parts = [(0, len(places))]
        while open_parts:
            start, end = open_parts.pop()
            total, first, last = best_run(scores[start:end], self.settings.least_words)
            if total > threshold:
                found.append((places[start + first][0], places[start + last - 1][1]))
                open_parts += [(start, start + first), (start + last, end)]
        return sorted(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings, thresholds and rates."""
        return {
            "target": self.target,
            "others": list(self.others),
            "false_positive_rate": self.false_positive_rate,
            "settings": asdict(self.settings),
            "calibration": {
                source: {**asdict(entry), "rate": entry.rate._asdict()} for source, entry in self.calibration.items()
            },
        }


def fit_span_identifier(
    texts: Mapping[str, Sequence[str]],
    target: str,
    calibration: Mapping[str, Sequence[str]],
    false_positive_rate: float = 0.005,
    seed: int = 0,
    settings: SpanSettings | None = None,
) -> SpanIdentifier:
    """Learn the words of the target against those of other languages, and set a threshold for each source.

    The threshold of a source is the k-th largest score of its n calibration texts, k = floor((n + 1) rate). A new
    clean text of the same kind exceeds it with probability k / (n + 1) at most, the stated rate (split conformal
    prediction; Vovk, Gammerman and Shafer 2005).

    Args:
        texts: by language or register, of any names; the target's and at least one other.
        target: whose spans are to be found.
        calibration: clean texts by source language, of the length and kind of the responses that will be judged, none
            of which is in `texts`.
        false_positive_rate: share of clean texts that may be called switched.
        seed: of the draw where a language has more text than the model is fitted on (5 million characters).
        settings: how words are scored and joined.

    Raises:
        ValueError: no target or no other language, too few calibration texts for the rate, a rate outside (0, 0.5],
            or a language written without spaces between words.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    settings = settings or SpanSettings()
    _check(texts, target, calibration, false_positive_rate)
    languages = [target, *(language for language in texts if language != target)]
    counts = [Counter(word for text in _sample(texts[name], seed) for word in _words(text)) for name in languages]
    for language, words in zip(languages, counts, strict=True):
        if not words:
            raise ValueError(f"No words in the texts of {language!r}.")
    vectorizer = CountVectorizer(analyzer="char_wb", ngram_range=settings.ngrams, lowercase=False)
    grams = vectorizer.fit_transform([word for words in counts for word in words])
    classes = np.repeat(np.arange(len(languages)), [len(words) for words in counts])
    # Scaled to the same total, so that an n-gram that no language knows favours none of them.
    totals = [words.total() for words in counts]
    weights = [
        count * max(totals) / total for words, total in zip(counts, totals, strict=True) for count in words.values()
    ]
    model = MultinomialNB(alpha=settings.smoothing).fit(grams, classes, sample_weight=weights)
    log_probabilities = model.feature_log_prob_
    ratios = np.ascontiguousarray((log_probabilities[0] - log_probabilities[1:]).T)
    fitted = SpanIdentifier(target, tuple(languages[1:]), {}, false_positive_rate, settings, vectorizer, ratios)
    thresholds = {source: _calibrate(fitted, source, clean) for source, clean in calibration.items()}
    return SpanIdentifier(
        target, fitted.others, thresholds, false_positive_rate, settings, vectorizer, ratios, fitted.cache
    )


@dataclass(frozen=True)
class DetectionRates:
    """How well planted switches are found, by source language, with 95 % Wilson intervals."""

    recall: Mapping[str, Interval]
    """Share of texts with a planted switch that are called switched."""

    false_positives: Mapping[str, Interval]
    """Share of clean texts that are called switched."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            name: {source: interval._asdict() for source, interval in rates.items()}
            for name, rates in (("recall", self.recall), ("false_positives", self.false_positives))
        }


def detection_rates(
    identifier: SpanIdentifier, texts_with_switch: Mapping[str, Sequence[str]], clean: Mapping[str, Sequence[str]]
) -> DetectionRates:
    """Recall on texts with a planted switch and false positive rate on clean ones.

    Args:
        identifier: the detector.
        texts_with_switch: by source language, texts that begin in it and turn into the target.
        clean: by source language, texts without a switch, neither fitted nor calibrated on.

    Raises:
        ValueError: a language without texts, or as for `SpanIdentifier.switched`.
    """

    def rates(texts: Mapping[str, Sequence[str]]) -> dict[str, Interval]:
        return {
            source: wilson(sum(identifier.switched(text, source) for text in group), len(group))
            for source, group in texts.items()
        }

    return DetectionRates(rates(texts_with_switch), rates(clean))


def best_run(scores: NDArray[np.float64], least: int) -> tuple[float, int, int]:
    """The run of at least `least` consecutive scores with the largest sum: (sum, first, last + 1).

    The shortest one that ends first, of several. (-inf, 0, 0) if there are fewer than `least` scores.
    """
    if len(scores) < least:
        return -math.inf, 0, 0
    sums = np.concatenate([[0.0], np.cumsum(scores)])
    # For every end, the lowest sum before a start that leaves room for the run.
    lowest = np.minimum.accumulate(sums[: len(sums) - least])
    totals = sums[least:] - lowest
    end = int(totals.argmax())
    start = end - int(sums[: end + 1][::-1].argmin())
    return float(totals[end]), start, end + least


def pieces(texts: Sequence[str], words: int) -> Iterator[str]:
    """Cut running text into consecutive pieces of `words` words, over the edges of texts; the rest is dropped."""
    every = [word for text in texts for word in _WORD.findall(text)]
    for start in range(0, len(every) - words + 1, words):
        yield " ".join(every[start : start + words])


def _words(text: str) -> list[str]:
    """The words of a text as the model reads them: lower case, any digit as 0, one form of apostrophe.

    A word that is nothing but the remains of a character that was cut becomes empty, and keeps its place.
    """
    return [_DIGIT.sub("0", word.lower().replace("’", "'").replace("\ufffd", "")) for word in _WORD.findall(text)]


def _sample(texts: Sequence[str], seed: int) -> Sequence[str]:
    """All texts, or a random choice of about `_MOST_CHARACTERS` characters."""
    characters = sum(map(len, texts))
    if characters <= _MOST_CHARACTERS:
        return texts
    return random.Random(seed).sample(texts, max(1, len(texts) * _MOST_CHARACTERS // characters))


def _calibrate(identifier: SpanIdentifier, source: str, clean: Sequence[str]) -> Calibration:
    allowed = math.floor((len(clean) + 1) * identifier.false_positive_rate)
    if allowed < 1:
        least = math.ceil(1 / identifier.false_positive_rate) - 1
        raise ValueError(
            f"{len(clean)} calibration texts in {source!r} cannot show a false positive rate of "
            f"{identifier.false_positive_rate:g}: at least {least} are needed. Give more or shorter texts, or allow a "
            "higher rate."
        )
    scores = np.array([identifier.score(text) for text in clean])
    # A sum of 0 is no evidence, however few clean texts reach it.
    threshold = max(0.0, float(np.sort(scores)[-allowed]))
    lengths = [len(_WORD.findall(text)) for text in clean]
    return Calibration(threshold, len(clean), int((scores > threshold).sum()), float(np.median(lengths)))


def _check(
    texts: Mapping[str, Sequence[str]], target: str, calibration: Mapping[str, Sequence[str]], rate: float
) -> None:
    if target not in texts or len(texts) < 2:
        raise ValueError(
            f"Spans of {target!r} are told from other text: give its texts and those of at least one other language; "
            f"got {', '.join(texts) or 'none'}."
        )
    if not 0 < rate <= 0.5:
        raise ValueError(f"false_positive_rate must lie in (0, 0.5], e.g. 0.005; got {rate}.")
    sources = [name for name in texts if name != target]
    if not calibration or not set(calibration) <= set(sources):
        raise ValueError(
            f"calibration needs clean texts of source languages, among {', '.join(sources)}; "
            f"got {', '.join(calibration) or 'none'}."
        )
    for language, group in texts.items():
        sample = " ".join(_sample(group, 0))
        letters, unspaced = len(_LETTER.findall(sample)), len(_UNSPACED.findall(sample))
        if unspaced > _MOST_UNSPACED * letters:
            raise ValueError(
                f"Text in {language!r} has no spaces between words ({unspaced} of {letters} letters are of a script "
                "written without them), so words cannot be identified. Leave this language out, or, for a target with "
                "a script of its own such as zh or th, identify it by script (the default)."
            )
