"""One model of a panel, scored on the items of all benchmarks by the likelihood of their answers: a pretrained model,
pruned, noised, with layers left out, or trained for some steps.

    python -m benchmarks.real.panel.likelihoods --model MODEL --variant prune:0.4 --output likelihoods.json

The score of an answer is log P(answer | question) - log P(answer | no question): what the question says for it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from benchmarks.real.panel.items import ENDING, Item, benchmark_sets, own_option_sets
from benchmarks.real.texts import items, paragraphs
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.models.layers import decoder_layers
from qscope_posttrain.models.loading import load_model
from qscope_posttrain.report.progress import progress
from qscope_posttrain.report.summary import write_text

LONGEST = 128
"""Tokens of a question; of a longer one the end is read."""
LONGEST_ANSWER = 8
"""Tokens of an answer that are scored, the first ones"""
BATCH = 2048
"""Tokens read at once"""
STEPS, STEP_TOKENS, RATE = 8, 512, 1e-4
"""Of the short training of a panel's model"""


@dataclass(frozen=True)
class Choice:
    """Token ids of a question and of its possible answers."""

    question: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.question) + sum(len(answer) - 1 for answer in self.answers)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    model, tokenizer = load_model(str(options.model), dtype="float32", device="cpu")
    alter(model, tokenizer, options.variant)
    sets = {name: found for name, found in benchmark_sets(options.items).items() if found[0].options}
    found = {"variant": options.variant, "scores": score_sets(model, tokenizer, sets)}
    if options.variant == "base":
        found["own_options"] = score_sets(model, tokenizer, own_option_sets(options.items))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.output, json.dumps(found) + "\n")
    return 0


def score_sets(model: nn.Module, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Sequence[Item]]) -> Any:
    shown = progress(list(sets.items()), description="benchmarks")
    return {name: score(model, tokenizer, found) for name, found in shown}


def score(model: nn.Module, tokenizer: PreTrainedTokenizerBase, found: Sequence[Item]) -> dict[str, Any]:
    """`with` and `without` the question: log P of every answer of every item, [items][answers]."""
    answers = [tuple(answer_ids(tokenizer, option) for option in item.options) for item in found]
    read = [Choice(question_ids(tokenizer, item), ids) for item, ids in zip(found, answers, strict=True)]
    blind = [
        Choice(question_ids(tokenizer, Item(item.ending.strip() or "\n", "", ending="")), ids)
        for item, ids in zip(found, answers, strict=True)
    ]
    distinct = list(dict.fromkeys(blind))  # items of one group have the same answers
    known = dict(zip(distinct, answer_likelihoods(model, distinct), strict=True))
    likelihoods = {"with": answer_likelihoods(model, read), "without": [known[choice] for choice in blind]}
    return {name: [[round(v, 4) for v in row] for row in rows] for name, rows in likelihoods.items()}


def question_ids(tokenizer: PreTrainedTokenizerBase, item: Item) -> tuple[int, ...]:
    found = tuple(tokenizer(item.question + item.ending)["input_ids"])
    return found if len(found) <= LONGEST else found[:1] + found[1 - LONGEST :]


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> tuple[int, ...]:
    spaced = answer if answer[:1].isspace() else " " + answer
    return tuple(tokenizer(spaced, add_special_tokens=False)["input_ids"][:LONGEST_ANSWER])


@torch.no_grad()
def answer_likelihoods(model: Any, choices: Sequence[Choice]) -> list[list[float]]:
    """log P(answer | question) for every answer, by one pass in which all answers follow one copy of the question: each
    sees the question and itself. The LM head reads only the positions that predict an answer's token."""
    order = sorted(range(len(choices)), key=lambda row: -len(choices[row]))
    found: list[list[float]] = [[] for _ in choices]
    start = 0
    while start < len(order):
        rows = order[start : start + max(1, BATCH // len(choices[order[start]]))]
        start += len(rows)
        packed = [_packed(choices[row]) for row in rows]
        longest = max(len(ids) for ids, *_ in packed)
        ids, places = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
        seen = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)
        for number, (tokens, positions, sees, _) in enumerate(packed):
            ids[number, : len(tokens)], places[number, : len(tokens)] = torch.tensor(tokens), torch.tensor(positions)
            seen[number, : len(tokens), : len(tokens)] = sees
        mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]
        hidden = model.base_model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)[0]
        for number, row in enumerate(rows):
            at = packed[number][3]
            logits = model.get_output_embeddings()(hidden[number, at])
            losses = cross_entropy(logits, torch.tensor([t for a in choices[row].answers for t in a]), reduction="none")
            found[row] = [-float(part.sum()) for part in losses.split([len(a) for a in choices[row].answers])]
    return found


def _packed(choice: Choice) -> tuple[list[int], list[int], Tensor, list[int]]:
    """Token ids, their positions, what each sees [n, n], and the places that predict the answers' tokens, in order."""
    asked = len(choice.question)
    ids, positions, predicts = list(choice.question), list(range(asked)), []
    sees = torch.ones(len(choice), len(choice), dtype=torch.bool).tril_()
    for answer in choice.answers:
        start = len(ids)
        ids += answer[:-1]
        positions += range(asked, asked + len(answer) - 1)
        sees[start : len(ids), asked:start] = False
        predicts += [asked - 1, *range(start, len(ids))]
    return ids, positions, sees, predicts


def alter(model: Any, tokenizer: PreTrainedTokenizerBase, variant: str, seed: int = 0) -> None:
    """Change the weights in place: `base`, `prune:SHARE` (the smallest weights of each linear layer), `noise:SHARE` (of
    its root mean square), `skip:FIRST-LAST` (layers that add nothing), `train:TEXTS`."""
    kind, _, what = variant.partition(":")
    layers: list[Any] = list(decoder_layers(model))
    linear = [module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)]
    if kind == "train":
        train(model, tokenizer, training_texts(what, seed))
        return
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if kind == "prune":
            for module in linear:
                size = module.weight.abs()
                module.weight[size <= size.flatten().kthvalue(max(1, int(float(what) * size.numel()))).values] = 0
        elif kind == "noise":
            for module in linear:
                scale = float(what) * module.weight.square().mean().sqrt()
                module.weight += scale * torch.randn(module.weight.shape, generator=generator)
        elif kind == "skip":
            first, last = map(int, what.split("-"))
            for layer in layers[first : last + 1]:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        elif kind != "base":
            raise UserValueError(f"expected base, prune:, noise:, skip: or train:, got '{variant}'.")


def training_texts(what: str, seed: int) -> list[str]:
    """Texts of the short training, none of which is scored."""
    if what == "mathematics":
        rows = [row for name in ("gsm8k_test", "mawps", "college_math") for row in items(name)[MGSM_ROWS[name] :: 2]]
        texts = [f"{row['question']}{ENDING} {row['answer'].rpartition('####')[2].strip()}" for row in rows]
    else:
        texts = [text for language in what.split("+") for text in paragraphs(language, held_out=False)]
    random.Random(seed).shuffle(texts)
    return texts


MGSM_ROWS = {"gsm8k_test": 250, "mawps": 0, "college_math": 0}
"""First row to learn from: even ones, and none of which MGSM is a translation"""


def train(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Some steps of AdamW on the texts, packed into rows of 128 tokens."""
    length, end = 128, tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], end]
        if len(ids) > STEPS * STEP_TOKENS:
            break
    rows = torch.tensor(ids[: STEPS * STEP_TOKENS]).view(STEPS, -1, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for batch in progress(list(rows), description="training"):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def hits(scores: dict[str, Any], right: Sequence[int]) -> NDArray[np.float64]:
    """[items]: 1 where the right answer has the highest score, a share of it where several have."""
    found = []
    for gains, answer in zip(gain(scores), right, strict=True):
        best = gains >= gains.max()
        found.append(float(best[answer]) / float(best.sum()))
    return np.array(found)


def probabilities(scores: dict[str, Any], right: Sequence[int]) -> NDArray[np.float64]:
    """[items]: softmax of the scores at the right answer, a finer score with the same chance."""
    found = []
    for gains, answer in zip(gain(scores), right, strict=True):
        weights = np.exp(gains - gains.max())
        found.append(float(weights[answer] / weights.sum()))
    return np.array(found)


def gain(scores: dict[str, Any]) -> list[NDArray[np.float64]]:
    """Per item, [answers]: log P with the question - log P without."""
    return [np.array(read) - np.array(blind) for read, blind in zip(scores["with"], scores["without"], strict=True)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the pretrained model")
    parser.add_argument("--variant", default="base", help="base, prune:0.3, noise:0.3, skip:10-12, train:mathematics")
    parser.add_argument("--items", type=int, default=40, help="items of each benchmark at most (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the likelihoods")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
