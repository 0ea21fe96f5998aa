"""Collect completions in endless repetition, and ordinary ones for contrast: sampled from a model, or given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.features.dose_curve import MIN_COPIES, MIN_TOKENS
from qscope_posttrain.intervals import Interval, wilson
from qscope_posttrain.models.batches import TokenText
from qscope_posttrain.models.generation import Prompt, SamplingSettings, encode_prompts, sample_batch
from qscope_posttrain.report.progress import progress, status
from qscope_posttrain.report.summary import write_rows
from qscope_posttrain.text.repetition import RepeatedTail, repeated_tail

NORMAL_PER_LOOP = 4
PERIOD_TRIM = 0.1  # Share of the shortest and of the longest periods that are left out of `LoopCollection.periods`


@dataclass(frozen=True)
class Completion:
    """A completion of a prompt, as token ids without the end token."""

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

    tail: RepeatedTail  # Positions in it count from the first token of the completion

    def text(self) -> TokenText:
        """For a statistics pass: the tail from its second copy on counts, what led into it is context."""
        return TokenText(self.ids, len(self.prompt_ids) + self.tail.second_copy)


def occurrences(loop: Loop) -> list[tuple[int, int]]:
    """(first position, position) of the token at every position of the last whole copy, the last `period` tokens.

    Positions count from the first token of the prompt. The first occurrence is anywhere in the completion, before the
    tail or in its first copy; the prompt does not count. A block may hold a token several times: every position counts.
    The first token of a text has no state worth comparing (it is an attention sink), so it is skipped, and so is a
    token that occurs once.
    """
    start = len(loop.prompt_ids)
    first: dict[int, int] = {}
    for position, token in enumerate(loop.completion_ids, start):
        if position > 0:
            first.setdefault(token, position)
    end = start + len(loop.completion_ids)
    pairs = ((first[loop.ids[last]], last) for last in range(end - loop.tail.period, end))
    return [(before, after) for before, after in pairs if before < after]


@dataclass(frozen=True)
class LoopCollection:
    """Loops, ordinary completions for contrast, and the number of completions examined."""

    loops: tuple[Loop, ...]
    normal: tuple[Completion, ...]  # Completions that ended by themselves without a repeated tail; maybe not all
    samples: int  # Completions examined
    sampled: bool = True  # Whether the model was sampled for them, so that `rate` is a property of the model
    settings: Mapping[str, Any] = field(default_factory=dict)  # Sampling settings and limits; JSON values

    @property
    def rate(self) -> Interval | None:
        """Share of loops among the samples with its 95 % Wilson interval; None for given texts. Sampling stops when
        enough are found, which makes the share of n loops too high by about its n-th part."""
        return wilson(len(self.loops), self.samples) if self.sampled else None

    @property
    def periods(self) -> tuple[int, int]:
        """Shortest and longest period of a loop like these: half and twice the periods of all but odd ones.

        Odd are the shortest tenth and the longest tenth of the loops (rounded down to whole loops), so that one
        "6 6 6 6" among solutions that repeat a step does not make every stutter a loop of the model's own kind.
        """
        lengths = sorted(loop.tail.period for loop in self.loops)
        odd = int(PERIOD_TRIM * len(lengths))
        return -(-lengths[odd] // 2), 2 * lengths[-1 - odd]

    def summary(self) -> str:
        """One line with the counts and the rate."""
        rate = self.rate
        share = "" if rate is None else f" ({rate.estimate:.3%}, 95 % {rate.low:.3%} .. {rate.high:.3%})"
        kind = "samples" if self.sampled else "given texts"
        return f"{len(self.loops)} endless repetitions in {self.samples} {kind}{share}, {len(self.normal)} ordinary"

    def write(self, path: str | Path, tokenizer: Any) -> Path:
        """Write one completion per line: `kind`, token ids, text, and the tail of a loop; for `loops_from_texts`."""
        rows = []
        for kind, entries in (("loop", self.loops), ("normal", self.normal)):
            for entry in entries:
                text = {"prompt": tokenizer.decode(entry.prompt_ids)}
                text["completion"] = tokenizer.decode(entry.completion_ids)
                rows.append({"kind": kind, **asdict(entry), "ended": kind == "normal", **text})
        return write_rows(path, rows)


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
    """Sample until `wanted` completions loop (see `text.repetition.is_endless_repetition`), or `max_samples` are drawn.

    Prompts (see `models.generation.generate_samples`, also for `chat` and its options) are taken in turn, one sample
    each, again and again with other random numbers, a batch at a time. Finding fewer loops than wanted is reported with
    the number and the rate; finding none is an error.

    Args:
        normal: ordinary completions (ended by themselves, without a repeated tail) to keep; by default 4 * `wanted`.
        settings: how to draw; by default temperature 1, the whole distribution, 256 tokens, 64 at a time.
            `samples_per_prompt` is not used.
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
        judged = [
            _judged(Completion(tuple(prompt), tuple(tokens)), ended, min_copies, min_tokens)
            for prompt, (tokens, ended) in zip(batch, responses, strict=True)
        ]
        loops += [found for found in judged if isinstance(found, Loop)]
        ordinary += [found for found in judged if type(found) is Completion]
        samples += size
        if len(loops) >= wanted and len(ordinary) >= min(normal, NORMAL_PER_LOOP):
            break
    drawn = {**settings.to_dict(), "min_copies": min_copies, "min_tokens": min_tokens, "prompts": len(prompts)}
    collection = LoopCollection(tuple(loops), tuple(ordinary[:normal]), samples, settings=drawn)
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
    """Find loops and ordinary completions among given texts.

    A text is a string, or a mapping with `text`, with `prompt` and `completion` (or `response`, as in the examples of
    `qscope evaluate repetition`), or with `prompt_ids` and `completion_ids`; `ended` says whether the model ended it.
    With a repeated tail, and not ended, it is a loop; without one, and not known to be cut off, it is ordinary; the
    rest is left out.
    """
    settings = {"min_copies": min_copies, "min_tokens": min_tokens}
    judged = []
    for number, text in enumerate(texts, start=1):
        ended = text.get("ended") if isinstance(text, Mapping) else None
        judged.append(_judged(_completion(tokenizer, text, number), ended, **settings))
    loops = tuple(found for found in judged if isinstance(found, Loop))
    ordinary = tuple(found for found in judged if type(found) is Completion)
    collection = LoopCollection(loops, ordinary, len(judged), sampled=False, settings=settings)
    if not loops:
        raise UserValueError(
            f"{collection.summary()}: a loop ends in at least {min_copies} copies of something, {min_tokens} tokens in "
            "all, and was not ended by the model."
        )
    return collection


def _judged(found: Completion, ended: bool | None, min_copies: int, min_tokens: int) -> Loop | Completion | None:
    """A loop, an ordinary completion, or None for neither: cut off, ended after repeating, or empty. `ended` says
    whether the model ended it, None that it is not known."""
    tail = repeated_tail(found.completion_ids, min_copies=min_copies, min_tokens=min_tokens)
    if tail is not None:
        return None if ended else Loop(found.prompt_ids, found.completion_ids, tail)
    return found if ended is not False and len(found.ids) > max(1, len(found.prompt_ids)) else None


def _completion(tokenizer: Any, text: str | Mapping[str, Any], number: int) -> Completion:
    if isinstance(text, str):
        text = {"text": text}
    if not isinstance(text, Mapping):
        raise UserTypeError(f"Text {number} must be a string or a mapping, got {type(text).__name__}.")
    written = text.get("completion", text.get("response"))
    if "completion_ids" in text:
        prompt, completion = text.get("prompt_ids", ()), text["completion_ids"]
    elif isinstance(written, str) and isinstance(text.get("prompt"), str):
        begins = text["prompt"].startswith(tokenizer.bos_token or "\0")  # a chat template has written it
        prompt = tokenizer(text["prompt"], add_special_tokens=not begins, verbose=False)["input_ids"]
        completion = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
    elif isinstance(text.get("text"), str):
        prompt, completion = (), tokenizer(text["text"], verbose=False)["input_ids"]
    else:
        raise UserValueError(
            f"Text {number} must have 'text', 'prompt' and 'completion' (or 'response'), or 'prompt_ids' and "
            f"'completion_ids'; it has {', '.join(map(str, islice(text, 8))) or 'nothing'}."
        )
    for name, ids in (("prompt_ids", prompt), ("completion_ids", completion)):
        if not isinstance(ids, Sequence) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise UserTypeError(f"{name} of text {number} must be a list of token ids, got {ids!r:.60}.")
    return Completion(tuple(prompt), tuple(completion))
