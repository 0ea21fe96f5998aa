"""Score how much more likely a word is in one language or register than in others, by words and their n-grams.

Words seen often decide by their counts; rare and unseen ones (names, inflected forms, pieces of a word) decide by the
character n-grams that they are made of, with less weight.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray

from qscope_posttrain.errors import UserTypeError, UserValueError, require_extra

WORD = regex.compile(r"\S+")
"""A word is a run of characters without white space."""

_DIGIT = regex.compile(r"\d")
_LETTER = regex.compile(r"\p{L}")
_UNSPACED = regex.compile(
    r"[\p{L}&&[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]", regex.VERSION1
)
_MOST_UNSPACED = 0.1
"""Maximum share of letters from scripts without word spaces in a language whose words are identified."""
_MOST_CHARACTERS = 5_000_000
"""Maximum number of characters per language to fit on: by then its frequent words are known."""
_CACHED_WORDS = 500_000


@dataclass(frozen=True)
class WordSettings:
    """How words are scored. The defaults were chosen on documentation in English and French and on word problems."""

    ngrams: tuple[int, int] = (1, 4)
    """Shortest and longest character n-gram; they stay within a word and see its edges as spaces"""
    smoothing: float = 0.1
    """Added to the count of every n-gram; counts are scaled to the same total in every language"""
    prior: float = 0.5
    """Weight of the evidence of a word's n-grams, in occurrences of the word"""
    unseen_clip: float = 3.0
    """Largest absolute log-likelihood ratio that n-grams alone give a word, in nats"""
    clip: float = 5.0
    """Largest absolute log-likelihood ratio of any word, in nats, so that one odd word cannot decide."""

    def __post_init__(self) -> None:
        shortest, longest = self.ngrams
        if not 1 <= shortest <= longest:
            raise UserValueError(
                f"ngrams must be (shortest, longest) with 1 <= shortest <= longest; got {self.ngrams}."
            )
        for name in ("smoothing", "prior", "unseen_clip", "clip"):
            if not getattr(self, name) > 0:
                raise UserValueError(f"{name} must be positive; got {getattr(self, name)}.")


@dataclass(frozen=True, eq=False)
class WordModel:
    """Log-likelihood ratios of words in the target against the best other language. Made by `fit_word_model`."""

    settings: WordSettings
    """How words are scored"""
    vectorizer: Any = field(repr=False)
    """Fitted `CountVectorizer`: words to counts of n-grams"""
    ratios: NDArray[np.float64] = field(repr=False)
    """`[n-grams, others]`: log-probability in the target minus that in each other language, nats"""
    counts: Mapping[str, NDArray[np.float64]] = field(repr=False)
    """Word -> `[1 + others]` occurrences in the target and in each other language, scaled to the same total"""
    cache: dict[str, float] = field(default_factory=dict, repr=False)
    """Scores of words met so far."""

    def scores(self, words: Sequence[str]) -> NDArray[np.float64]:
        """`[words]`: the score of each word, as `words_of` gives them, in nats.

        With t and o the counts of a word w in the target and in another language,

            L(w)     = clip(sum over n-grams g of w of log p(g | target) / p(g | other), divided by n, unseen_clip)
            score(w) = min over others of clip(log (t + prior exp(L / 2)) / (o + prior exp(-L / 2)), clip)

        where p(g | .) is multinomial naive Bayes and n = 1 + 2 + 3 + 4 for n-grams up to length 4, the number of
        n-grams in which one character stands: each is counted once. A word that was never seen scores L.
        """
        new = sorted({word for word in words if word not in self.cache})
        if new:
            if len(self.cache) + len(new) > _CACHED_WORDS:
                self.cache.clear()
                new = sorted(set(words))
            self.cache.update(zip(new, self._score(new).tolist(), strict=True))
        return np.array([self.cache[word] for word in words], dtype=np.float64)

    def _score(self, words: Sequence[str]) -> NDArray[np.float64]:
        settings = self.settings
        shortest, longest = settings.ngrams
        overlap = sum(range(shortest, longest + 1))
        spelling = (self.vectorizer.transform(words) @ self.ratios) / overlap
        half = np.clip(spelling, -settings.unseen_clip, settings.unseen_clip) / 2
        none = np.zeros(1 + self.ratios.shape[1])
        counts = np.stack([self.counts.get(word, none) for word in words])
        target = counts[:, :1] + settings.prior * np.exp(half)
        others = counts[:, 1:] + settings.prior * np.exp(-half)
        return np.clip(np.log(target / others).min(axis=1), -settings.clip, settings.clip)


def fit_word_model(
    texts: Mapping[str, Sequence[str]], target: str, seed: int = 0, settings: WordSettings | None = None
) -> WordModel:
    """Count the words of the target and of the other languages, and their n-grams.

    Args:
        texts: Texts by language or register, of any names; the target's and at least one other.
        target: The language that others are compared with.
        seed: Seed of the draw of texts where a language has more than 5 million characters.
        settings: How words are scored.

    Raises:
        ValueError: no target or no other language, one without words, or one written without spaces between words.
    """
    require_extra("analysis")  # imported here, because it takes a second
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    settings = settings or WordSettings()
    if target not in texts or len(texts) < 2:
        raise UserValueError(
            f"Words of {target!r} are learned against other text: give texts in it and in another language; "
            f"got {', '.join(texts) or 'none'}."
        )
    languages = [target, *(language for language in texts if language != target)]
    known: dict[str, NDArray[np.float64]] = {}
    for column, language in enumerate(languages):
        sample = _sample(texts[language], seed)
        _check_spaces(language, sample)
        for word, count in Counter(word for text in sample for word in words_of(text)).items():
            known.setdefault(word, np.zeros(len(languages)))[column] = count
    counts = np.stack(list(known.values())) if known else np.zeros((1, len(languages)))
    totals = counts.sum(axis=0)
    if not totals.all():
        raise UserValueError(f"No words in the texts of {languages[int(totals.argmin())]!r}.")
    # Scaled to the same total, so that a word or n-gram that no language knows favors none of them.
    counts *= totals.max() / totals
    vectorizer = CountVectorizer(analyzer="char_wb", ngram_range=settings.ngrams, lowercase=False)
    grams = vectorizer.fit_transform(list(known))
    rows, columns = counts.nonzero()
    model = MultinomialNB(alpha=settings.smoothing).fit(grams[rows], columns, sample_weight=counts[rows, columns])
    log_probabilities = model.feature_log_prob_
    ratios = np.ascontiguousarray((log_probabilities[:1] - log_probabilities[1:]).T)
    return WordModel(settings, vectorizer, ratios, dict(zip(known, counts, strict=True)))


def words_of(text: str) -> list[str]:
    """The words of a text as the model reads them: lower case, any digit as 0, one form of apostrophe.

    A word that consists of the rest of a cut character becomes empty, and keeps its place.
    """
    return [_DIGIT.sub("0", word.lower().replace("’", "'").replace("\ufffd", "")) for word in WORD.findall(text)]


def _sample(texts: Sequence[str], seed: int) -> Sequence[str]:
    """All texts, or a random choice of about `_MOST_CHARACTERS` characters."""
    if isinstance(texts, str):
        raise UserTypeError("Expected a list of texts for each language; got one string.")
    characters = sum(map(len, texts))
    if characters <= _MOST_CHARACTERS:
        return texts
    return random.Random(seed).sample(texts, max(1, len(texts) * _MOST_CHARACTERS // characters))


def _check_spaces(language: str, texts: Sequence[str]) -> None:
    letters, unspaced = (sum(len(pattern.findall(text)) for text in texts) for pattern in (_LETTER, _UNSPACED))
    if unspaced > _MOST_UNSPACED * letters:
        raise UserValueError(
            f"Text in {language!r} has no spaces between words ({unspaced} of {letters} letters are of a script "
            "written without them), so words cannot be identified. Leave this language out; a target with a script of "
            "its own, such as zh or th, is identified by script."
        )
