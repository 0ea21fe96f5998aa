"""Completions that ran in a circle until they were cut off, and ordinary ones beside them: sampled, or given."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.intervals import Interval, wilson
from qscope_posttrain.models.batches import TokenText
from qscope_posttrain.models.generation import Prompt, SamplingSettings, encode_prompts, sample_batch
from qscope_posttrain.report.progress import progress, status
from qscope_posttrain.report.summary import write_text
from qscope_posttrain.text.repetition import RepeatedTail, repeated_tail

MIN_COPIES, MIN_TOKENS = 4, 12
NORMAL_PER_LOOP = 4
PERIOD_TRIM = 0.1
"""Share of the shortest and of the longest periods that do not shape `LoopCollection.periods`."""


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt, as token ids without the end token."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and completion."""
        return self.prompt_ids + self.completion_ids

    def text(self) -> TokenText:
        """For a statistics pass: the completion counts, the prompt is its context."""
        return TokenText(self.ids, max(1, len(self.prompt_ids)))


@dataclass(frozen=True)
class Loop(Completion):
    """A completion in endless repetition."""

    tail: RepeatedTail
    """Positions in it count from the first token of the completion."""

    def text(self) -> TokenText:
        """For a statistics pass: the tail from its second copy on counts, what led into it is context."""
        return TokenText(self.ids, len(self.prompt_ids) + self.tail.second_copy)


@dataclass(frozen=True)
class LoopCollection:
    """Loops, ordinary completions for contrast, and how many were looked at."""

    loops: tuple[Loop, ...]
    normal: tuple[Completion, ...]
    """Completions that ended by themselves without a repeated tail; not all that were seen"""
    samples: int
    """Completions looked at"""
    sampled: bool = True
    """Whether the model was sampled for them, so that `rate` says something about it"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How they were drawn; JSON values"""

    @property
    def rate(self) -> Interval | None:
        """Share of loops among the samples with its 95 % Wilson interval; None for given texts.

        Sampling stops when enough are found, which makes the share of n loops too high by about its n-th part.
        """
        return wilson(len(self.loops), self.samples) if self.sampled else None

    @property
    def periods(self) -> tuple[int, int]:
        """Shortest and longest period of a loop like these: half and twice the periods of all but odd ones.

        Odd are the shortest tenth and the longest tenth of the loops (rounded down to whole loops), so that one
        "6 6 6 6" among solutions that repeat a step does not make every stuttering a loop of the model's own kind.
        """
        lengths = sorted(loop.tail.period for loop in self.loops)
        odd = int(PERIOD_TRIM * len(lengths))
        return -(-lengths[odd] // 2), 2 * lengths[-1 - odd]

    def summary(self) -> str:
        """One line: how many of how many, and the rate."""
        rate = self.rate
        share = "" if rate is None else f" ({rate.estimate:.3%}, 95 % {rate.low:.3%} .. {rate.high:.3%})"
        kind = "samples" if self.sampled else "given texts"
        return f"{len(self.loops)} endless repetitions in {self.samples} {kind}{share}, {len(self.normal)} ordinary"

    def write(self, path: str | Path, tokenizer: Any) -> Path:
        """JSONL, a completion a line: `kind`, token ids, text, and the tail of a loop. `loops_from_texts` reads it."""
        lines = []
        for kind, entries in (("loop", self.loops), ("normal", self.normal)):
            for entry in entries:
                row: dict[str, Any] = {"kind": kind, **asdict(entry), "ended": kind == "normal"}
                row["prompt"] = tokenizer.decode(entry.prompt_ids)
                row["completion"] = tokenizer.decode(entry.completion_ids)
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        write_text(path, "".join(lines))
        return Path(path)


def collect_loops(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    wanted: int = 20,
    max_samples: int = 4096,
    normal: int | None = None,
    settings: SamplingSettings | None = None,
    min_copies: int = MIN_COPIES,
    min_tokens: int = MIN_TOKENS,
    chat: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    show_progress: bool | None = None,
) -> LoopCollection:
    """Sample until `wanted` completions loop (see `text.repetition.is_endless_repetition`), or give up.

    Prompts are taken in turn, one sample each, again and again with other random numbers, a batch at a time. Finding
    fewer loops than wanted is reported with the number and the rate; finding none is an error.

    Args:
        prompts: texts or chats, see `residual.sampling.generate_samples`, also for `chat` and its options.
        max_samples: completions after which to give up.
        normal: ordinary completions (ended by themselves, without a repeated tail) to keep; by default four times
            `wanted`.
        settings: how to draw; by default temperature 1, the whole distribution, 256 tokens, 64 at a time.
            `samples_per_prompt` plays no part.

    Raises:
        ValueError: no prompt, a number below 1, or no loop in `max_samples` samples.
    """
    settings = settings or SamplingSettings(top_p=1.0, batch_size=64)
    normal = NORMAL_PER_LOOP * wanted if normal is None else normal
    if not prompts:
        raise UserValueError("No prompts to sample loops from; give at least one.")
    if wanted < 1 or max_samples < 1 or normal < 1:
        raise UserValueError(
            f"wanted, max_samples and normal must be at least 1; got {wanted}, {max_samples} and {normal}."
        )
    ids = encode_prompts(tokenizer, prompts, chat=chat, chat_template_options=chat_template_options)
    loops: list[Loop] = []
    ordinary: list[Completion] = []
    samples = 0
    rounds = progress(
        range(math.ceil(max_samples / settings.batch_size)),
        description="looking for endless repetition",
        enabled=show_progress,
        note=lambda: f"{len(loops)} of {wanted} in {samples} samples",
    )
    for number in rounds:
        size = min(settings.batch_size, max_samples - samples)
        batch = [ids[(samples + place) % len(ids)] for place in range(size)]
        responses = sample_batch(model, tokenizer, batch, replace(settings, seed=settings.seed + number))
        for prompt, (tokens, ended) in zip(batch, responses, strict=True):
            found = _judged(Completion(tuple(prompt), tuple(tokens)), ended, min_copies, min_tokens)
            if isinstance(found, Loop):
                loops.append(found)
            elif found is not None and len(ordinary) < normal:
                ordinary.append(found)
        samples += size
        if len(loops) >= wanted and len(ordinary) >= min(normal, NORMAL_PER_LOOP):
            break
    drawn = {**settings.to_dict(), "min_copies": min_copies, "min_tokens": min_tokens, "prompts": len(prompts)}
    collection = LoopCollection(tuple(loops), tuple(ordinary), samples, settings=drawn)
    if not loops:
        raise UserValueError(
            f"{collection.summary()}. Raise max_samples or max_new_tokens (a loop must be cut off to be one), take "
            "prompts on which the model repeats itself, or give loops that were seen elsewhere (loops_from_texts)."
        )
    if len(loops) < wanted:
        status(f"warning: only {collection.summary()}; {wanted} loops were wanted.", enabled=True)
    return collection


def loops_from_texts(
    tokenizer: Any,
    texts: Iterable[str | Mapping[str, Any]],
    *,
    min_copies: int = MIN_COPIES,
    min_tokens: int = MIN_TOKENS,
) -> LoopCollection:
    """Loops and ordinary completions among texts that are there already.

    A text is a string, or a mapping with `text`, with `prompt` and `completion`, or with `prompt_ids` and
    `completion_ids`; `ended` says whether the model ended it. With a repeated tail, and not ended, it is a loop;
    without one, and not known to be cut off, it is ordinary; the rest is left out.

    Raises:
        TypeError, ValueError: a text of another form, or no loop among them.
    """
    loops: list[Loop] = []
    ordinary: list[Completion] = []
    count = 0
    for count, text in enumerate(texts, start=1):
        given = _completion(tokenizer, text, count)
        ended = text.get("ended") if isinstance(text, Mapping) else None
        tail = repeated_tail(given.completion_ids, min_copies=min_copies, min_tokens=min_tokens)
        if tail is not None and not ended:
            loops.append(Loop(given.prompt_ids, given.completion_ids, tail))
        elif tail is None and ended is not False and len(given.ids) > max(1, len(given.prompt_ids)):
            ordinary.append(given)
    settings = {"min_copies": min_copies, "min_tokens": min_tokens}
    collection = LoopCollection(tuple(loops), tuple(ordinary), count, sampled=False, settings=settings)
    if not loops:
        raise UserValueError(
            f"{collection.summary()}: a loop ends in at least {min_copies} copies of something, {min_tokens} tokens in "
            "all, and was not ended by the model."
        )
    return collection


def _judged(found: Completion, ended: bool, min_copies: int, min_tokens: int) -> Loop | Completion | None:
    """A loop, an ordinary completion, or None for what is neither: cut off, ended after repeating, or empty.

    A loop here is what `text.repetition.is_endless_repetition` says: it did not end, and has a repeated tail.
    """
    tail = repeated_tail(found.completion_ids, min_copies=min_copies, min_tokens=min_tokens)
    if tail is not None and not ended:
        return Loop(found.prompt_ids, found.completion_ids, tail)
    return found if tail is None and ended and found.completion_ids else None


def _completion(tokenizer: Any, text: str | Mapping[str, Any], number: int) -> Completion:
    if isinstance(text, str):
        text = {"text": text}
    if not isinstance(text, Mapping):
        raise UserTypeError(f"Text {number} must be a string or a mapping, got {type(text).__name__}.")
    if "completion_ids" in text:
        prompt, completion = text.get("prompt_ids", ()), text["completion_ids"]
    elif isinstance(text.get("completion"), str) and isinstance(text.get("prompt"), str):
        prompt = tokenizer(text["prompt"], verbose=False)["input_ids"]
        completion = tokenizer(text["completion"], add_special_tokens=False, verbose=False)["input_ids"]
    elif isinstance(text.get("text"), str):
        prompt, completion = (), tokenizer(text["text"], verbose=False)["input_ids"]
    else:
        raise UserValueError(
            f"Text {number} must have 'text', 'prompt' and 'completion', or 'prompt_ids' and 'completion_ids'; it has "
            f"{', '.join(map(str, islice(text, 8))) or 'nothing'}."
        )
    for name, ids in (("prompt_ids", prompt), ("completion_ids", completion)):
        if not isinstance(ids, Sequence) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise UserTypeError(f"{name} of text {number} must be a list of token ids, got {ids!r:.60}.")
    return Completion(tuple(prompt), tuple(completion))
