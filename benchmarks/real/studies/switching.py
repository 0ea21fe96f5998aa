"""Study 1, first half: how often a model switches language by itself.

A switch is counted in two ways: by script (a letter that is neither Latin nor of the source's scripts), and by words (a
sentence that fastText's language identifier calls another language). The second rule is set on real paragraphs of the
same length, held out, so that it calls few of them switched.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from benchmarks.real.studies.loops import percent
from benchmarks.real.texts import hate_cases, identified, paragraphs
from qscope_posttrain.evaluation.code_switching import switching_ratio
from qscope_posttrain.models.generation import SamplingSettings, generate_samples
from qscope_posttrain.models.loading import load_model
from qscope_posttrain.report.tables import Table
from qscope_posttrain.text.scripts import language_scripts, prose, script_counts, sentences

SOURCES = ("en", "fr", "ko", "ru", "zh", "ar", "de", "es", "it", "pl")
DOCUMENTED = ("en", "fr", "ko", "ru", "zh")
SHORTEST = {"ko": 12, "zh": 10}
"""Letters of a sentence that can be identified; 25 in the other languages"""
CERTAIN = 0.8
"""Score from which a sentence counts as being of another language"""
WORDS = 12
"""Words of a paragraph that make a prompt to go on from; in Chinese, 3 characters each"""


def run(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_model(str(options.model), dtype="float32", device="cpu")
    settings = SamplingSettings(2, 1.0, top_p=1.0, max_new_tokens=64, batch_size=40)
    found = switching(model, tokenizer, settings, 8 if options.quick else 24, SOURCES[: 2 if options.quick else None])
    return {"tables": {"rates": table(found).to_dict()}, **found}


def table(found: Mapping[str, Any]) -> Table:
    """Switched responses by language of the prompt and detector, beside what the detectors say of real text."""
    rows: list[list[Any]] = []
    for language, entry in found["script"]["languages"].items():
        by = [found[detector.name]["languages"][language]["wilson"] for detector in DETECTORS]
        controls = [
            found["controls"][detector.name].get(language, {}).get(kind)
            for kind in ("clean", "planted")
            for detector in DETECTORS
        ]
        alarms = [None if rate is None else 100 * rate for rate in controls]
        rows.append([language, entry["samples"], *map(percent, by), *alarms])
    all_of_them = [percent(found[detector.name]["micro"]) for detector in DETECTORS]
    rows.append(["all", sum(row[1] for row in rows), *all_of_them, None, None, None, None])
    columns = ["prompt in", "responses", "another script, %", "another language, %"]
    columns += [f"{kind}, by {name}, %" for kind in ("clean", "planted") for name in ("script", "fastText")]
    caption = (
        "95 % intervals: Wilson; over prompts in the last row. Clean: real paragraphs as long as the responses, "
        "that are called switched all the same. Planted: the same with a second half in another language."
    )
    return Table("Unexpected switching", columns, rows, caption)


class AnotherScript:
    """Whether a text has a letter that is neither Latin nor of the scripts of its language."""

    name = "script"

    def __call__(self, text: str, source: str) -> bool:
        allowed = {"Latin", *language_scripts(source)}
        return any(script not in allowed for script in script_counts(prose(text)))


class AnotherLanguage:
    """Whether a text has a sentence that is identified as another language."""

    name = "words"

    def __call__(self, text: str, source: str) -> bool:
        for sentence in sentences(prose(text)):
            if sum(map(str.isalpha, sentence)) >= SHORTEST.get(source, 25):
                language, score = identified(sentence)
                if language != source and score >= CERTAIN:
                    return True
        return False


DETECTORS = (AnotherScript(), AnotherLanguage())


def beginnings(language: str, count: int) -> list[str]:
    """Beginnings of real texts, from held-out documentation or, where there is none, from harmless test cases."""
    if language in DOCUMENTED:
        texts = paragraphs(language, held_out=True)
        texts = [text for text in texts if len(text) > 100 * (0.5 if language in ("ko", "zh") else 1)]
    else:
        texts = list(dict.fromkeys(case.text for case in hate_cases(language) if not case.hateful))
    step = max(1, len(texts) // count)
    cut = [text[: 3 * WORDS] if language == "zh" else " ".join(text.split()[:WORDS]) for text in texts[::step]]
    return cut[:count]


def control_rates(lengths: Mapping[str, int], count: int) -> dict[str, dict[str, dict[str, float]]]:
    """{detector: {language: {"clean": ..., "planted": ...}}}: the share of real held-out paragraphs that it calls
    switched, as they are and with a paragraph of another language as second half; as long as the responses are."""
    rates: dict[str, dict[str, dict[str, float]]] = {detector.name: {} for detector in DETECTORS}
    for language, length in lengths.items():
        if language not in DOCUMENTED:
            continue
        clean = [text[:length] for text in paragraphs(language, held_out=True)][:count]
        other = paragraphs("fr" if language == "en" else "en", held_out=True)
        planted = [f"{text[: length // 2]}\n{other[row][: length // 2]}" for row, text in enumerate(clean)]
        for detector in DETECTORS:
            rates[detector.name][language] = {
                kind: sum(detector(text, language) for text in texts) / len(texts)
                for kind, texts in (("clean", clean), ("planted", planted))
            }
    return rates


def switching(model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: SamplingSettings, prompts: int,
              languages: Sequence[str] = SOURCES) -> dict[str, Any]:  # fmt: skip
    """Let the model go on from real beginnings, and count switches by script and by words."""
    samples = generate_samples(model, tokenizer, {name: beginnings(name, prompts) for name in languages}, settings)
    found: dict[str, Any] = {
        detector.name: switching_ratio(samples, "another", settings.to_dict(), detector).to_dict()
        for detector in DETECTORS
    }
    lengths = {
        name: max(int(sorted(len(s.response) for s in samples if s.language == name)[prompts // 2]), 60)
        for name in languages
    }
    scripts: dict[str, dict[str, int]] = {}
    for sample in samples:
        for script in script_counts(prose(sample.response)):
            if script not in {"Latin", *language_scripts(sample.language)}:
                row = scripts.setdefault(sample.language, {})
                row[script] = row.get(script, 0) + 1
    return {**found, "scripts": scripts, "controls": control_rates(lengths, 200)}
