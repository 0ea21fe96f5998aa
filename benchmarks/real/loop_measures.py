"""Measure what a training did to a chat model's loops: `python -m benchmarks.real.loop_measures --model ..`.

All models are measured at the same places, which come from the start model's own greedy responses:

- right: greedy answers to held-out sums;
- own loops: the probability of the second and further copies of the block, where the start model looped;
- going on: the probability of a further copy of a first sentence that stands there k times;
- endless: whether the model goes on by itself, after three copies, up to the length limit;
- clean text: the loss of held-out documentation, and the KL divergence from the start model on it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from benchmarks.real.sums import is_right
from benchmarks.real.texts import paragraphs
from qscope_posttrain.features.find.loops import Loop, loops_from_texts
from qscope_posttrain.models.generation import SamplingSettings, encode_prompts, generate_samples, sample_batch
from qscope_posttrain.models.loading import load_model
from qscope_posttrain.models.scoring import completion_sequences, sequence_losses
from qscope_posttrain.report.summary import to_json, write_text
from qscope_posttrain.text.repetition import is_endless_repetition

COPIES = 5
"""Further copies whose probability is measured, after the first one"""
SEEDED = 3
"""Copies after which the model goes on by itself"""
LONGEST = 40
"""Tokens of a block, so that its copies fit"""
SENTENCE_ENDS = (".", "!", "?", "\n", ":")


@dataclass(frozen=True)
class Place:
    """A text up to and with the first copy of its block."""

    prefix: tuple[int, ...]
    block: tuple[int, ...]
    prompt_length: int


def own_places(tokenizer: PreTrainedTokenizerBase, responses: Sequence[Mapping[str, Any]]) -> list[Place]:
    """Where the start model's own loops begin."""
    found = loops_from_texts(tokenizer, responses).loops
    return [own_place(loop) for loop in found if loop.tail.period <= LONGEST]


def own_place(loop: Loop) -> Place:
    """The prefix of a loop up to its second copy, and the block as it stands there."""
    start = loop.tail.second_copy
    block = loop.completion_ids[start : start + loop.tail.period]
    return Place(loop.prompt_ids + loop.completion_ids[:start], block, len(loop.prompt_ids))


def first_sentence(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], shortest: int = 4) -> int | None:
    """Number of tokens of the first sentence of a response, None where it does not end within `LONGEST`."""
    for length in range(shortest, min(LONGEST, len(tokens)) + 1):
        if tokenizer.decode(list(tokens[:length])).rstrip(" ").endswith(SENTENCE_ENDS):
            return length
    return None


def clean_places(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]],
                 responses: Sequence[Sequence[int]]) -> list[Place]:  # fmt: skip
    """After the first sentence of every response that has one."""
    places = []
    for prompt, response in zip(prompts, responses, strict=True):
        length = first_sentence(tokenizer, response)
        if length is not None:
            sentence = tuple(response[:length])
            places.append(Place((*prompt, *sentence), sentence, len(prompt)))
    return places


def copy_probabilities(model: nn.Module, places: Sequence[Place], copies: int = COPIES) -> list[list[float]]:
    """[places][copies]: mean log-probability per token of each further copy of the block, given all before it."""
    sequences = completion_sequences([place.prefix for place in places], [place.block * copies for place in places])
    losses: dict[int, list[float]] = {}
    for texts, values in sequence_losses(model, sequences, tokens_per_batch=2048):
        for text, value in zip(texts.tolist(), values.tolist(), strict=True):
            losses.setdefault(text, []).append(value)
    found = []
    for number, place in enumerate(places):
        each = torch.tensor(losses[number]).view(copies, len(place.block))
        found.append((-each.mean(dim=1)).tolist())
    return found


def seeded_endless(model: nn.Module, tokenizer: PreTrainedTokenizerBase, places: Sequence[Place],
                   settings: SamplingSettings) -> list[bool]:  # fmt: skip
    """Whether each response goes on repeating up to the limit, after `SEEDED` copies of its sentence."""
    seeded = [(*place.prefix, *(place.block * (SEEDED - 1))) for place in places]
    responses = sample_batch(model, tokenizer, seeded, settings)
    return [
        is_endless_repetition([*before[place.prompt_length :], *tokens], ended=ended)
        for place, before, (tokens, ended) in zip(places, seeded, responses, strict=True)
    ]


@torch.no_grad()
def clean_text(model: nn.Module, start: nn.Module, tokenizer: PreTrainedTokenizerBase,
               texts: Sequence[str]) -> dict[str, list[float]]:  # fmt: skip
    """Per text, nats per token: the loss, and the KL divergence of the model from the start model."""
    found: dict[str, list[float]] = {"loss": [], "kl": []}
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:96]])
        own, before = (given(input_ids=ids).logits[0].float().log_softmax(-1) for given in (model, start))
        found["loss"].append(float(-own[:-1].gather(1, ids[0, 1:, None]).mean()))
        found["kl"].append(float((own[:-1].exp() * (own[:-1] - before[:-1])).sum(-1).mean()))
    return found


def right_answers(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]],
                  settings: SamplingSettings) -> dict[str, Any]:  # fmt: skip
    """Per sum: whether the greedy answer is right, has ended, and how long it is."""
    samples = generate_samples(model, tokenizer, {"en": [row["prompt"] for row in rows]}, settings, chat=True)
    return {
        "right": [is_right(sample.response, row["answer"]) for sample, row in zip(samples, rows, strict=True)],
        "ended": [sample.ended for sample in samples],
        "length": [len(sample.tokens) for sample in samples],
        "responses": [sample.response for sample in samples[:8]],
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model, per prompt."""
    model, tokenizer = load_model(str(options.model), dtype="float32", device="cpu")
    start, _ = load_model(str(options.start), dtype="float32", device="cpu")
    sums = read(options.work / "test.jsonl")[: 8 if options.quick else None]
    held_out = read(options.work / "start_greedy" / "examples.jsonl")
    own = own_places(tokenizer, read(options.work / "loops" / "examples.jsonl"))
    texts = [row["response"] for row in held_out]
    prompts = [list(ids) for ids in encode_prompts(tokenizer, [row["prompt"] for row in held_out])]
    open_places = clean_places(tokenizer, prompts, [tokenizer(text)["input_ids"] for text in texts])
    sum_places = clean_places(
        tokenizer,
        encode_prompts(tokenizer, [row["prompt"] for row in sums]),
        [tokenizer(solution(row))["input_ids"] for row in sums],
    )
    greedy = SamplingSettings(1, temperature=0.0, top_p=1.0, max_new_tokens=64, batch_size=48)
    drawn = SamplingSettings(1, temperature=0.7, top_p=1.0, max_new_tokens=64, seed=1)
    found: dict[str, Any] = {"sums": right_answers(model, tokenizer, sums, greedy)}
    kinds = {"own loops": own[:48], "open text": open_places[:48], "sums": sum_places[:48]}
    found["copies"] = {name: copy_probabilities(model, places) for name, places in kinds.items()}
    found["blocks"] = {name: [len(place.block) for place in places] for name, places in kinds.items()}
    found["endless"] = {
        f"{name}, {way}": seeded_endless(model, tokenizer, kinds[name], settings)
        for name in ("open text", "sums")
        for way, settings in (("greedy", greedy), ("temperature 0.7", drawn))
        if settings is greedy or options.sampled
    }
    count = 4 if options.quick else 40
    clean = [text for text in paragraphs("en", held_out=True) if len(text) > 160][-count:]
    return {**found, "clean": clean_text(model, start, tokenizer, clean)}


def solution(row: Mapping[str, Any]) -> str:
    """The sentence that answers a sum rightly."""
    return row["prompt"][-1]["content"].removeprefix("What is ").removesuffix("?") + f" is {row['answer']}."


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--start", type=Path, required=True, help="folder of the model that it was trained from")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the study, with responses of the start model"
    )
    parser.add_argument("--sampled", action="store_true", help="let seeded loops go on at temperature 0.7, too")
    parser.add_argument("--quick", action="store_true", help="few sums and texts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the numbers")
    options = parser.parse_args(arguments)
    write_text(options.output, json.dumps(to_json(measure(options)), ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
