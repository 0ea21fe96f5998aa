"""How `qscope evaluate code-switching` tells a switch: by the target's script, or by words learnt from texts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qscope_posttrain.cli.inputs import read_texts
from qscope_posttrain.errors import UserValueError, require_extra
from qscope_posttrain.report.progress import status
from qscope_posttrain.text.language_labels import language_hint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qscope_posttrain.evaluation.span_identification import SpanIdentifier

_FITTED = 0.65
"""Share of the lines of each language that words are learnt from, the first ones; thresholds are set on the others."""


def add_identification_options(new: argparse.ArgumentParser) -> None:
    """--identify, --identify-texts, --false-positive-rate."""
    new.add_argument(
        "--identify",
        choices=("script", "words"),
        default="script",
        help="how a switch is told: script counts any character of the target's script; words finds spans of the "
        "target's words, for a target without a script of its own (English to French) or a register",
    )
    new.add_argument(
        "--identify-texts",
        help="with --identify words: folder of <language>.txt, clean text of the target and of every language of the "
        f"prompts, a paragraph a line, in scripts with spaces between words. Words are learnt from the first "
        f"{100 * _FITTED:.0f} %% of the lines; the others, cut to --max-new-tokens tokens, set the thresholds",
    )
    new.add_argument(
        "--false-positive-rate",
        type=float,
        default=0.005,
        help="with --identify words: share of clean responses that may be called switched; 0.005 needs 199 pieces of "
        "text of --max-new-tokens tokens a language to set thresholds on, 0.02 needs 49",
    )


def identification_texts(identify: str, folder: str | None, target: str) -> dict[str, list[str]] | None:
    """The texts that words are learnt from, by language; None where switches are identified by script.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: words without texts, texts without words, or no text in the target.
    """
    if identify == "script":
        if folder is not None:
            raise UserValueError(
                "--identify-texts is read with --identify words alone; give that too, or leave it out."
            )
        return None
    if folder is None:
        raise UserValueError(
            "--identify words learns words from text: give --identify-texts, a folder of <language>.txt with text of "
            "the target and of every language of the prompts."
        )
    require_extra("analysis")
    texts = read_texts(folder)
    if target not in texts:
        raise UserValueError(
            f"'{folder}' has no {target}.txt, text of the target; it has {', '.join(sorted(texts))}."
            f"{language_hint(target, texts)}"
        )
    return texts


def word_detector(
    texts: Mapping[str, Sequence[str]],
    target: str,
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    false_positive_rate: float,
) -> SpanIdentifier:
    """Fit and calibrate an identifier on texts for responses of up to `tokens` tokens of this tokenizer.

    Texts in languages other than the target and `sources` are left out.

    Raises:
        ValueError: a source without text, too little of it for the rate, or a language without word spaces.
    """
    from qscope_posttrain.evaluation.span_identification import fit_span_identifier

    missing = sorted(set(sources) - set(texts))
    if missing:
        raise UserValueError(
            f"--identify-texts has no text in {', '.join(missing)}, a language of the prompts: it has "
            f"{', '.join(sorted(texts))}.{language_hint(missing[0], texts)} Add the text, or leave these prompts out."
        )
    languages = [*sources, target]
    status(f"learning the words of {', '.join(languages)}")
    cuts = {language: math.ceil(_FITTED * len(texts[language])) for language in languages}
    calibration = {source: _pieces(texts[source][cuts[source] :], tokenizer, tokens) for source in sources}
    fitted = {language: texts[language][: cuts[language]] for language in languages}
    try:
        detector = fit_span_identifier(fitted, target, calibration, false_positive_rate)
    except ValueError as error:
        raise UserValueError(
            f"--identify words cannot work with these texts: {error} (Calibration texts are pieces of --max-new-tokens "
            f"{tokens} tokens from the last {100 * (1 - _FITTED):.0f} % of the lines of --identify-texts.)"
        ) from error
    for source, entry in detector.calibration.items():
        status(f"{source}: {entry.false_positives} of {entry.texts} clean pieces are called switched to {target}")
    return detector


def _pieces(lines: Sequence[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[str]:
    """Consecutive pieces of `tokens` tokens, which may begin and end inside a word, as responses do."""
    ids = tokenizer("\n".join(lines), add_special_tokens=False, verbose=False)["input_ids"]
    starts = range(0, len(ids) - tokens + 1, tokens)
    return tokenizer.batch_decode([ids[start : start + tokens] for start in starts]) if starts else []
