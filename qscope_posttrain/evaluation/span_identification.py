"""Detect by its words that a text turns into another language of the same script, or into another register.

Scripts cannot show that English turns into French, or documentation into word problems. Here every word gets a
log-likelihood ratio of the target against the best other language: words seen often decide by their counts, rare and
unseen ones (names, inflected forms, pieces of a word) by the character n-grams that they are made of, with less weight.
The contiguous run of words with the largest sum is the span most like the target. A text has switched if that sum
exceeds a threshold, set on clean texts of its source language so that few of them would be called switched.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray

from qscope_posttrain.errors import UserTypeError, UserValueError, require_extra
from qscope_posttrain.intervals import Interval, wilson
from qscope_posttrain.report.progress import status
from qscope_posttrain.text.scripts import language_hint

FITTED = 0.65
"""Share of the lines of each language that words are learned from, the first ones; the others set the thresholds"""
WORD = regex.compile(r"\S+")  # A word is a run of characters without white space

# How words are scored; chosen on documentation in English and French and on word problems.
NGRAMS = (1, 4)  # Shortest and longest character n-gram; they stay within a word and see its edges as spaces
SMOOTHING = 0.1  # Added to the count of every n-gram; counts are scaled to the same total in every language
PRIOR = 0.5  # Weight of the evidence of a word's n-grams, in occurrences of the word
UNSEEN_CLIP = 3.0  # Largest absolute log-likelihood ratio that n-grams alone give a word, in nats
CLIP = 5.0  # Largest absolute log-likelihood ratio of any word, in nats, so that one odd word cannot decide
SETTINGS = {"ngrams": NGRAMS, "smoothing": SMOOTHING, "prior": PRIOR, "unseen_clip": UNSEEN_CLIP, "clip": CLIP}

_DIGIT = regex.compile(r"\d")
_LETTER = regex.compile(r"\p{L}")
_UNSPACED = regex.compile(
    r"[\p{L}&&[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]", regex.VERSION1
)
_MOST_UNSPACED = 0.1
"""Maximum share of letters from scripts without word spaces in a language whose words are identified."""
_MOST_CHARACTERS = 5_000_000
"""Maximum number of characters per language to fit on: by then its frequent words are known."""


@dataclass(frozen=True, eq=False)
class WordModel:
    """Log-likelihood ratios of words in the target against the best other language. Made by `fit_word_model`."""

    vectorizer: Any = field(repr=False)  # Fitted `CountVectorizer`: words to counts of n-grams
    ratios: NDArray[np.float64] = field(repr=False)
    """`[n-grams, others]`: log-probability in the target minus that in each other language, nats"""
    counts: Mapping[str, NDArray[np.float64]] = field(repr=False)
    """Word -> `[1 + others]` occurrences in the target and in each other language, scaled to the same total"""

    def scores(self, words: Sequence[str]) -> NDArray[np.float64]:
        """`[words]`: the score of each word, as `words_of` gives them, in nats.

        With t and o the counts of a word w in the target and in another language,

            L(w)     = clip(sum over n-grams g of w of log p(g | target) / p(g | other), divided by n, UNSEEN_CLIP)
            score(w) = min over others of clip(log (t + PRIOR exp(L / 2)) / (o + PRIOR exp(-L / 2)), CLIP)

        where p(g | .) is multinomial naive Bayes and n = 1 + 2 + 3 + 4 for n-grams up to length 4, the number of
        n-grams in which one character stands: each is counted once. A word that was never seen scores L.
        """
        if not words:
            return np.zeros(0)
        overlap = sum(range(NGRAMS[0], NGRAMS[1] + 1))
        spelling = (self.vectorizer.transform(words) @ self.ratios) / overlap
        half = np.clip(spelling, -UNSEEN_CLIP, UNSEEN_CLIP) / 2
        none = np.zeros(1 + self.ratios.shape[1])
        counts = np.stack([self.counts.get(word, none) for word in words])
        target = counts[:, :1] + PRIOR * np.exp(half)
        others = counts[:, 1:] + PRIOR * np.exp(-half)
        return np.clip(np.log(target / others).min(axis=1), -CLIP, CLIP)


def fit_word_model(texts: Mapping[str, Sequence[str]], target: str) -> WordModel:
    """Count the words and n-grams of the target and of the other languages in `texts`, which may have any names.
    ValueError for no target or no other language, one without words, or one written without spaces between words."""
    require_extra("analysis")  # imported here, because it takes a second
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    if target not in texts or len(texts) < 2:
        raise UserValueError(
            f"Words of {target!r} are learned against other text: give texts in it and in another language; "
            f"got {', '.join(texts) or 'none'}."
        )
    languages = [target, *(language for language in texts if language != target)]
    known: dict[str, NDArray[np.float64]] = {}
    for column, language in enumerate(languages):
        sample = _sample(texts[language])
        _check_spaces(language, sample)
        for word, count in Counter(word for text in sample for word in words_of(text)).items():
            known.setdefault(word, np.zeros(len(languages)))[column] = count
    counts = np.stack(list(known.values())) if known else np.zeros((1, len(languages)))
    totals = counts.sum(axis=0)
    if not totals.all():
        raise UserValueError(f"No words in the texts of {languages[int(totals.argmin())]!r}.")
    # Scaled to the same total, so that a word or n-gram that no language knows favors none of them.
    counts *= totals.max() / totals
    vectorizer = CountVectorizer(analyzer="char_wb", ngram_range=NGRAMS, lowercase=False)
    grams = vectorizer.fit_transform(list(known))
    rows, columns = counts.nonzero()
    model = MultinomialNB(alpha=SMOOTHING).fit(grams[rows], columns, sample_weight=counts[rows, columns])
    log_probabilities = model.feature_log_prob_
    ratios = np.ascontiguousarray((log_probabilities[:1] - log_probabilities[1:]).T)
    return WordModel(vectorizer, ratios, dict(zip(known, counts, strict=True)))


def words_of(text: str) -> list[str]:
    """The words of a text as the model reads them: lower case, any digit as 0, one form of apostrophe. A word that
    consists of the rest of a cut character becomes empty, and keeps its place."""
    return [_DIGIT.sub("0", word.lower().replace("’", "'").replace("\ufffd", "")) for word in WORD.findall(text)]


def _sample(texts: Sequence[str]) -> Sequence[str]:
    """All texts, or a random choice of about `_MOST_CHARACTERS` characters."""
    if isinstance(texts, str):
        raise UserTypeError("Expected a list of texts for each language; got one string.")
    characters = sum(map(len, texts))
    if characters <= _MOST_CHARACTERS:
        return texts
    return random.Random(0).sample(texts, max(1, len(texts) * _MOST_CHARACTERS // characters))


def _check_spaces(language: str, texts: Sequence[str]) -> None:
    letters, unspaced = (sum(len(pattern.findall(text)) for text in texts) for pattern in (_LETTER, _UNSPACED))
    if unspaced > _MOST_UNSPACED * letters:
        raise UserValueError(
            f"Text in {language!r} has no spaces between words ({unspaced} of {letters} letters are of a script "
            "written without them), so words cannot be identified. Leave this language out; a target with a script of "
            "its own, such as zh or th, is identified by script."
        )


@dataclass(frozen=True)
class SourceThreshold:
    """The threshold of one source language and the clean texts that it was set on."""

    threshold: float  # A text in this language has switched if the sum of its best span exceeds this, in nats
    texts: int  # Number of clean texts, kept out of the fit
    false_positives: int  # Number of them that exceed the threshold
    median_words: float  # Their median length. Texts much longer than these give more false positives than stated.

    @property
    def rate(self) -> Interval:
        """False positive rate reached on the calibration texts, with its Wilson interval."""
        return wilson(self.false_positives, self.texts)


@dataclass(frozen=True, eq=False)
class SpanIdentifier:
    """Finds spans of the target language in text of other languages. Made by `fit_span_identifier`. It is a
    `SwitchDetector`: called with a text and its source language, as `switched`."""

    target: str  # Language or register whose spans are found
    others: tuple[str, ...]  # The languages that it is distinguished from
    model: WordModel
    calibration: Mapping[str, SourceThreshold]  # By source language: those whose texts can be judged
    false_positive_rate: float  # The rate that thresholds were set for
    least_words: int  # Minimum number of words in a span
    name = "words"

    def evidence(self, text: str) -> NDArray[np.float64]:
        """`[words]`: the contribution of each word to a span. It is the word's score, a positive one divided by k at
        the k-th occurrence of the word, so that neither one odd word nor a list or loop that repeats it can decide."""
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
        return best_sum(self.evidence(text), self.least_words)

    def threshold(self, source: str) -> float:
        """The sum that a span must exceed in a text of `source`; ValueError for one without calibration texts."""
        if source not in self.calibration:
            raise UserValueError(
                f"Switches from {source!r} to {self.target!r} cannot be judged: the identifier was calibrated on "
                f"{', '.join(self.calibration)}. Leave this source language out, or give calibration texts in it."
            )
        return self.calibration[source].threshold

    def switched(self, text: str, source: str) -> bool:
        """Whether a text that should be in `source` has a span of the target. ValueError as for `threshold`."""
        return self.score(text) > self.threshold(source)

    __call__ = switched

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings, thresholds and rates."""
        return {
            "target": self.target,
            "others": list(self.others),
            "false_positive_rate": self.false_positive_rate,
            "settings": {**SETTINGS, "least_words": self.least_words},
            "calibration": {
                source: {**asdict(entry), "rate": entry.rate._asdict()} for source, entry in self.calibration.items()
            },
        }


def fit_span_identifier(
    texts: Mapping[str, Sequence[str]],
    target: str,
    calibration: Mapping[str, Sequence[str]],
    false_positive_rate: float = 0.005,
    *,
    least_words: int = 3,
) -> SpanIdentifier:
    """Learn the words of the target against those of other languages, and set a threshold for each source.

    The threshold of a source is the k-th largest score of its n calibration texts, k = floor((n + 1) rate). A new clean
    text of the same kind exceeds it with a probability of at most k / (n + 1), the stated rate (split conformal
    prediction; Vovk, Gammerman and Shafer 2005). It is never less than `least_words` - 1 words can reach.

    Args:
        texts: Texts by language or register, of any names; the target's and at least one other.
        calibration: Clean texts by source language, of the length and kind of the responses that will be judged, none
            of which is in `texts`. They may begin and end inside a word, if responses do.
        false_positive_rate: Share of clean texts that may be called switched; ValueError outside (0, 0.5].
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
    model = fit_word_model(texts, target)
    fitted = SpanIdentifier(target, tuple(sources), model, {}, false_positive_rate, least_words)
    return replace(fitted, calibration={source: _calibrate(fitted, clean) for source, clean in calibration.items()})


def best_sum(scores: NDArray[np.float64], least: int) -> float:
    """Largest sum over a run of at least `least` consecutive scores; -inf if there are fewer."""
    if len(scores) < least:
        return -math.inf
    sums = np.concatenate([[0.0], np.cumsum(scores)])
    # For every end, the lowest sum before a start that leaves room for the run.
    return float((sums[least:] - np.minimum.accumulate(sums[: len(sums) - least])).max())


def _calibrate(identifier: SpanIdentifier, clean: Sequence[str]) -> SourceThreshold:
    # The 1e-9 keeps (199 + 1) * 0.005 at 1, where rounding could leave it below.
    allowed = math.floor((len(clean) + 1) * identifier.false_positive_rate + 1e-9)
    scores = np.array([identifier.score(text) for text in clean])
    # Clean texts of another topic than those at hand hold other odd words: fewer words than a span has never decide.
    floor = (identifier.least_words - 1) * CLIP
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
    Words are learned from the first lines of each language; pieces of the others set the thresholds. ValueError for a
    source without text, too little of it for the rate, or a language without word spaces."""
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
