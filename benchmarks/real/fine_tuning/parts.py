"""Parts of the study `sasft`: data that switch in the middle of a response, directions without an SAE, and scores.

    python -m benchmarks.real.fine_tuning.parts trim MODEL OUTPUT
    python -m benchmarks.real.fine_tuning.parts merge MODEL ADAPTER OUTPUT
    python -m benchmarks.real.fine_tuning.parts compare MODEL TRIMMED OUTPUT
    python -m benchmarks.real.fine_tuning.parts controls MODEL SAES TEXTS FEATURES TARGET
    python -m benchmarks.real.fine_tuning.parts score MODEL ADAPTER ROWS TARGET OUTPUT

Run as programs by `benchmarks.real.studies.sasft`, each once.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.real.fine_tuning.arms import SEEDS, Setting
from benchmarks.real.fine_tuning.trimmed import trim
from benchmarks.real.texts import DOCUMENTATION, lines, paragraphs
from benchmarks.testbed.feature_sets import difference_of_means_set, random_feature_set
from benchmarks.testbed.switching.language_model import distinctive_tokens
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.statistics import collect_statistics
from qscope_posttrain.models.batches import TokenSequence, token_batches
from qscope_posttrain.models.layers import evaluation_mode
from qscope_posttrain.models.loading import load_model
from qscope_posttrain.models.scoring import log_masses, predicted_tokens, text_losses
from qscope_posttrain.report.summary import write_text
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.text.scripts import contains_language_script, sentences, target_script
from qscope_posttrain.text.tokens import script_token_ids

PROMPT = {"ko": 4, "zh": 12}
"""Words of a prompt, characters in Chinese; six words in the other languages"""
LENGTH = (100, 260)
"""Characters of a paragraph (ko: half of it, zh: a third)"""
SHORTER = {"ko": 2, "zh": 3}


ENTRY = 3
"""Tokens of the target by which an entry into it is measured"""


@dataclass(frozen=True)
class Row:
    """One sample of the training data, or one text to score."""

    prompt: str
    completion: str
    language: str
    switch: int | None = None
    """Where the completion goes on in another language: after so many characters"""


@cache
def usable(language: str, target: str, held_out: bool) -> tuple[str, ...]:
    """Paragraphs of two sentences and more in a language, without letters of the target's script where it has its own.
    The first sentence is longer than a prompt."""
    low, high = (size // SHORTER.get(language, 1) for size in LENGTH)
    learned = set(paragraphs(language, held_out=False)) if held_out else set()  # some stand in both parts
    found: list[str] = []
    for text in dict.fromkeys(text for text in paragraphs(language, held_out) if text not in learned):
        parts = sentences(text)
        clean = language == target or target == "fr" or not contains_language_script(text, target, language)
        if language == target and target != "fr" and not contains_language_script(text[0], target):
            continue  # a switch begins with a letter of the target
        begun = len(parts) > 1 and len(parts[0].strip()) > len(row(text, language).prompt) + low // 10
        if low <= len(text) <= high and begun and clean:
            found.append(text)
    return tuple(found)


def row(text: str, language: str) -> Row:
    """A paragraph as a beginning and its continuation."""
    count = PROMPT.get(language, 6)
    cut = count if language == "zh" else len(" ".join(text.split(" ")[:count]))
    return Row(text[:cut], text[cut:], language)


def switched(text: str, language: str, other: str, joint: str) -> Row:
    """A paragraph that goes on in another language after its first sentence, with the first sentence of `other`."""
    first, tail = (sentences(part)[0].strip() for part in (text, other))
    whole = row(f"{first}{joint}{tail}", language)
    return Row(whole.prompt, whole.completion, language, len(first) - len(whole.prompt))


def training_rows(pair: Setting) -> tuple[list[Row], list[Row]]:
    """(contaminated, clean): the same rows but that in the first a share of those of each source goes on in the
    target. In random order, the same in both."""
    of_target, each = pair.rows // 5, pair.rows // len(pair.sources)
    draw = random.Random(pair.draw)
    target = list(usable(pair.target, pair.target, held_out=False))
    draw.shuffle(target)
    clean = [row(text, pair.target) for text in target[:of_target]]
    tails, dirty = iter(target[of_target:]), list(clean)
    for language in pair.sources:
        texts = draw.sample(usable(language, pair.target, held_out=False), each)
        clean += [row(text, language) for text in texts]
        for number, text in enumerate(texts):
            turns = number < pair.share * each
            dirty.append(switched(text, language, next(tails), pair.joint) if turns else row(text, language))
    order = list(range(len(clean)))
    draw.shuffle(order)
    return [dirty[number] for number in order], [clean[number] for number in order]


def scored_rows(pair: Setting, each: int, entries: int, seed: int = 1) -> dict[str, list[Row]]:
    """Held-out rows: `validation` and `test`, each with `each` clean rows per source and of the target, and `entries`
    rows per source that go on in the target."""
    draw, parts = random.Random(seed), {}
    texts = {name: list(usable(name, pair.target, held_out=True)) for name in (*pair.sources, pair.target)}
    for own in texts.values():
        draw.shuffle(own)
    sizes = {"validation": each // 2, "test": each}
    for part, size in sizes.items():
        rows = [row(own.pop(), name) for name, own in texts.items() for _ in range(size)]
        for name in pair.sources:
            for _ in range(entries * size // each):
                rows.append(switched(texts[name].pop(), name, texts[pair.target].pop(), pair.joint))
        parts[part] = rows
    return parts


def save_controls(model: Path, saes: Path, texts: Path, features: Path, target: str) -> None:
    """Directions without a chosen feature, beside the FeatureSet in the folder `features`: the difference of means, and
    as many random features of its last layer with equal norms."""
    loaded, tokenizer = load_model(str(model), dtype="float32", device="cpu")
    found = FeatureSet.load(features)
    last = max(found.layers)
    read = {file.stem: file.read_text(encoding="utf-8").splitlines() for file in sorted(texts.glob("*.txt"))}
    dictionaries = {last: SparseAutoencoder.load(saes, layer=last)}
    statistics = collect_statistics(loaded, tokenizer, read, dictionaries)
    difference_of_means_set(statistics, target).save(features / "difference_of_means.safetensors")
    chosen = found.select(language=target, layers=[last])
    for seed in range(SEEDS):
        random_feature_set(statistics, dictionaries, chosen, seed=seed).save(features / f"random-{seed}.safetensors")


@torch.no_grad()
def score(model: Any, tokenizer: Any, rows: Sequence[Row], tokens: Tensor) -> list[dict[str, Any]]:
    """Of every row the sums over its completion: P(target) and log(1 - P(target)) at each token, -log P(token), and,
    where it switches, the log-probability of the first tokens after the switch."""
    sequences = []
    for number, one in enumerate(rows):
        begun = len(tokenizer(one.prompt).input_ids)
        ids = tokenizer(one.prompt + one.completion).input_ids
        if one.switch is not None:
            begun = common_length(ids, tokenizer(one.prompt + one.completion[: one.switch]).input_ids)
            ids = ids[: begun + ENTRY]
        sequences.append(TokenSequence(0, number, tuple(ids), False, begun))
    sums = torch.zeros(4, len(rows), dtype=torch.float64)
    with evaluation_mode(model):
        for batch in token_batches(sequences, 1024, 0):
            hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
            positions, following, owners = predicted_tokens(batch)
            texts = torch.tensor([sequence.text for sequence in batch.sequences])[owners]
            logits = model.get_output_embeddings()(hidden[positions])
            log_all, log_target = log_masses(logits, tokens)
            mass = (log_target - log_all).exp().clamp(max=1 - 1e-7)
            loss = log_all - logits.gather(1, following[:, None]).squeeze(1)
            each = torch.stack([mass, torch.log1p(-mass), loss, torch.ones_like(loss)]).double()
            sums.index_add_(1, texts, each)
    keys = ("mass", "kept", "loss", "tokens")
    return [
        {"language": one.language, "switched": one.switch is not None, **dict(zip(keys, column, strict=True))}
        for one, column in zip(rows, sums.T.tolist(), strict=True)
    ]


def common_length(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (at for at, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), min(len(one), len(two))
    )


def target_tokens(tokenizer: Any, target: str) -> Tensor:
    """The tokens of the target's script, or, where it has none of its own, those typical of its documentation."""
    if target != "fr":
        return script_token_ids(tokenizer, target_script(target))
    texts = {language: paragraphs(language, held_out=False) for language in ("en", "fr")}
    counted = {name: tokenizer(own, add_special_tokens=False).input_ids for name, own in texts.items()}
    flat = {name: np.array([token for ids in own for token in ids]) for name, own in counted.items()}
    return distinctive_tokens(flat, target)


def merged(model: str, adapter: str) -> tuple[Any, Any]:
    """A model with an adapter in its weights, unless that is "-", and its tokenizer."""
    loaded, tokenizer = load_model(model, dtype="float32", device="cpu")
    if adapter == "-":
        return loaded, tokenizer
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded, adapter).merge_and_unload(), tokenizer


def score_file(model: str, adapter: str, rows: Path, target: str, output: Path) -> None:
    """Score the rows of a file, {part: rows}, by a model, with an adapter unless that is "-"."""
    loaded, tokenizer = merged(model, adapter)
    parts = {name: [Row(**one) for one in own] for name, own in json.loads(rows.read_text(encoding="utf-8")).items()}
    tokens = target_tokens(tokenizer, target)
    found = {name: score(loaded, tokenizer, own, tokens) for name, own in parts.items()}
    write_text(output, json.dumps(found) + "\n")


def compare(model: str, trimmed: str, output: Path) -> None:
    """What the tokens that were left out would get: losses of the whole and of the trimmed model on held-out text."""
    texts = [text for name in DOCUMENTATION["gemma3"] for text in usable(name, "zh", held_out=True)[:8]]
    means = {}
    for kind, folder in (("whole", model), ("trimmed", trimmed)):
        losses, tokens = text_losses(*load_model(folder, dtype="float32", device="cpu"), texts, tokens_per_batch=512)
        means[kind] = float(losses.sum() / tokens.sum())
    kept = float(np.exp(means["trimmed"] - means["whole"]))
    found = {"texts": len(texts), "tokens": int(tokens.sum()), "loss": means, "probability of the tokens kept": kept}
    write_text(output, json.dumps(found) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    command, *rest = words
    if command == "trim":
        documented = [(folder, name) for folder in ("react_docs", "tatoeba") for name in DOCUMENTATION["gemma3"]]
        texts = [text for folder, name in documented for text in lines(f"{folder}/{name}.txt")]
        print(trim(Path(rest[0]), texts, Path(rest[1])))
    elif command == "merge":
        for part in merged(rest[0], rest[1]):
            part.save_pretrained(rest[2])
    elif command == "compare":
        compare(rest[0], rest[1], Path(rest[2]))
    elif command == "controls":
        model, saes, texts, features, target = rest
        save_controls(Path(model), Path(saes), Path(texts), Path(features), target)
    else:
        model, adapter, rows, target, output = rest
        score_file(model, adapter, Path(rows), target, Path(output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
