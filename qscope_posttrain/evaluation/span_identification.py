"""Detect by its words that a text turns into another language of the same script, or into another register.

Scripts cannot show that English turns into French, or documentation into word problems. Here every word gets a
log-likelihood ratio of the target against the best other language, and the contiguous run of words with the largest
sum is the span most like the target. A text has switched if that sum exceeds a threshold, set on clean texts of its
source language so that few of them would be called switched.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.evaluation.word_model import WORD, WordModel, WordSettings, fit_word_model, words_of
from qscope_posttrain.intervals import Interval, wilson
from qscope_posttrain.report.progress import status
from qscope_posttrain.text.language_labels import language_hint

FITTED = 0.65
"""Share of the lines of each language that words are learned from, the first ones; the others set the thresholds"""


@dataclass(frozen=True)
class SourceThreshold:
    """The threshold of one source language and the clean texts that it was set on."""

    threshold: float
    """A text in this language has switched if the sum of its best span exceeds this, in nats"""
    texts: int
    """Number of clean texts, kept out of the fit"""
    false_positives: int
    """Number of them that exceed the threshold"""
    median_words: float
    """Their median length. Texts much longer than these give more false positives than stated."""

    @property
    def rate(self) -> Interval:
        """False positive rate reached on the calibration texts, with its Wilson interval."""
        return wilson(self.false_positives, self.texts)


@dataclass(frozen=True, eq=False)
class SpanIdentifier:
    """Finds spans of the target language in text of other languages. Made by `fit_span_identifier`.

    It is a `SwitchDetector`: `identifier(text, source)` is `identifier.switched(text, source)`.
    """

    target: str
    """Language or register whose spans are found"""
    others: tuple[str, ...]
    """The languages that it is distinguished from"""
    model: WordModel
    """Scores of words"""
    calibration: Mapping[str, SourceThreshold]
    """By source language: those whose texts can be judged"""
    false_positive_rate: float
    """The rate that thresholds were set for"""
    least_words: int
    """Minimum number of words in a span"""
    name = "words"
    """Name of this way of detecting in reports"""

    def __call__(self, text: str, source: str) -> bool:
        return self.switched(text, source)

    def evidence(self, text: str) -> NDArray[np.float64]:
        """`[words]`: the contribution of each word to a span.

        It is the word's score (see `WordModel.scores`), a positive one divided by k at the k-th occurrence of the word,
        so that neither one odd word nor a list or loop that repeats it can decide.
        """
        words = words_of(text)
        scores = self.model.scores(words)
        met: Counter[str] = Counter()
        for place, word in enumerate(words):
            met[word] += 1
            if scores[place] > 0:
                scores[place] /= met[word]
        return scores

    def score(self, text: str) -> float:
        """Largest sum of evidence over a run of at least `least_words` words, in nats; -inf in a shorter text."""
        return best_run(self.evidence(text), self.least_words)[0]

    def threshold(self, source: str | None = None) -> float:
        """The sum that a span must exceed in a text of `source`; the largest of all sources if that is not known.

        Raises:
            ValueError: no calibration texts were given for this language.
        """
        if source is None:
            return max(entry.threshold for entry in self.calibration.values())
        if source not in self.calibration:
            raise UserValueError(
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
        """
        threshold = self.threshold(source)
        places = [match.span() for match in WORD.finditer(text)]
        evidence = self.evidence(text)
        found, parts = [], [(0, len(places))]
        while parts:
            start, end = parts.pop()
            total, first, last = best_run(evidence[start:end], self.least_words)
            if total > threshold:
                found.append((places[start + first][0], places[start + last - 1][1]))
                parts += [(start, start + first), (start + last, end)]
        return sorted(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings, thresholds and rates."""
        return {
            "target": self.target,
            "others": list(self.others),
            "false_positive_rate": self.false_positive_rate,
            "settings": {**asdict(self.model.settings), "least_words": self.least_words},
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
    *,
    settings: WordSettings | None = None,
    least_words: int = 3,
) -> SpanIdentifier:
    """Learn the words of the target against those of other languages, and set a threshold for each source.

    The threshold of a source is the k-th largest score of its n calibration texts, k = floor((n + 1) rate). A new
    clean text of the same kind exceeds it with a probability of at most k / (n + 1), the stated rate (split conformal
    prediction; Vovk, Gammerman and Shafer 2005). It is never less than `least_words` - 1 words can reach.

    Args:
        texts: Texts by language or register, of any names; the target's and at least one other.
        target: Language whose spans are to be found.
        calibration: Clean texts by source language, of the length and kind of the responses that will be judged, none
            of which is in `texts`. They may begin and end inside a word, if responses do.
        false_positive_rate: Share of clean texts that may be called switched.
        seed: Seed of the draw of texts where a language has more than 5 million characters.
        settings: How words are scored.
        least_words: Minimum number of words in a span.

    Raises:
        ValueError: no target or no other language, too few calibration texts for the rate, a rate outside (0, 0.5],
            or a language written without spaces between words.
    """
    if not 0 < false_positive_rate <= 0.5:
        raise UserValueError(f"false_positive_rate must lie in (0, 0.5], e.g. 0.005; got {false_positive_rate}.")
    if least_words < 1:
        raise UserValueError(f"least_words must be at least 1; got {least_words}.")
    sources = [name for name in texts if name != target]
    if not calibration or not set(calibration) <= set(sources):
        raise UserValueError(
            f"calibration needs clean texts of source languages, among {', '.join(sources) or 'none'}; "
            f"got {', '.join(calibration) or 'none'}."
        )
    least = math.ceil(1 / false_positive_rate) - 1
    for source, clean in calibration.items():
        if len(clean) < least:
            raise UserValueError(
                f"{len(clean)} calibration texts in {source!r} cannot show a false positive rate of "
                f"{false_positive_rate:g}: at least {least} are needed. Give more texts, or allow a higher rate."
            )
    model = fit_word_model(texts, target, seed, settings)
    fitted = SpanIdentifier(target, tuple(sources), model, {}, false_positive_rate, least_words)
    return replace(fitted, calibration={source: _calibrate(fitted, clean) for source, clean in calibration.items()})


def best_run(scores: NDArray[np.float64], least: int) -> tuple[float, int, int]:
    """The run of at least `least` consecutive scores with the largest sum: (sum, first, last + 1).

    Of several, the one that ends first, and of these the shortest. (-inf, 0, 0) if there are fewer than `least` scores.
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


def _calibrate(identifier: SpanIdentifier, clean: Sequence[str]) -> SourceThreshold:
    # The 1e-9 keeps (199 + 1) * 0.005 at 1, where rounding could leave it below.
    allowed = math.floor((len(clean) + 1) * identifier.false_positive_rate + 1e-9)
    scores = np.array([identifier.score(text) for text in clean])
    # Clean texts of another topic than those at hand hold other odd words: fewer words than a span has never decide.
    floor = (identifier.least_words - 1) * identifier.model.settings.clip
    threshold = max(floor, float(np.sort(scores)[-allowed]))
    words = float(np.median([len(WORD.findall(text)) for text in clean]))
    return SourceThreshold(threshold, len(clean), int((scores > threshold).sum()), words)


def word_detector(
    texts: Mapping[str, Sequence[str]],
    target: str,
    sources: Sequence[str],
    tokenizer: Any,
    tokens: int,
    false_positive_rate: float,
) -> SpanIdentifier:
    """Fit and calibrate an identifier on texts by language, for responses of up to `tokens` tokens of this tokenizer.

    Words are learned from the first lines of each language; pieces of the others set the thresholds.

    Raises:
        ValueError: a source without text, too little of it for the rate, or a language without word spaces.
    """
    missing = sorted(set(sources) - set(texts))
    if missing:
        raise UserValueError(
            f"--identify-texts has no text in {', '.join(missing)}, a language of the prompts: it has "
            f"{', '.join(sorted(texts))}.{language_hint(missing[0], texts)} Add the text, or leave these prompts out."
        )
    languages = [*sources, target]
    status(f"learning the words of {', '.join(languages)}")
    cuts = {language: math.ceil(FITTED * len(texts[language])) for language in languages}
    calibration = {source: _pieces(texts[source][cuts[source] :], tokenizer, tokens) for source in sources}
    fitted = {language: texts[language][: cuts[language]] for language in languages}
    try:
        detector = fit_span_identifier(fitted, target, calibration, false_positive_rate)
    except ValueError as error:
        raise UserValueError(
            f"--identify words cannot work with these texts: {error} (Calibration texts are pieces of --max-new-tokens "
            f"{tokens} tokens from the last {100 * (1 - FITTED):.0f} % of the lines of --identify-texts.)"
        ) from error
    for source, entry in detector.calibration.items():
        status(f"{source}: {entry.false_positives} of {entry.texts} clean pieces are called switched to {target}")
    return detector


def _pieces(lines: Sequence[str], tokenizer: Any, tokens: int) -> list[str]:
    """Consecutive pieces of `tokens` tokens, which may begin and end inside a word, as responses do."""
    ids = tokenizer("\n".join(lines), add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(0, len(ids) - tokens + 1, tokens)
    return tokenizer.batch_decode([ids[start : start + tokens] for start in starts]) if starts else []
