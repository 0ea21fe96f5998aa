"""Measure how often a model repeats itself without end: the repeat ratio, with intervals."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from qscope_posttrain.errors import UserTypeError, UserValueError
from qscope_posttrain.evaluation.samples import GroupRate, group_by_prompt, note_of
from qscope_posttrain.intervals import seed_noise
from qscope_posttrain.models.generation import (
    Prompt,
    Sample,
    SamplingEngine,
    SamplingSettings,
    generate_samples,
    stated_settings,
)
from qscope_posttrain.report.summary import write_rows
from qscope_posttrain.report.tables import Table
from qscope_posttrain.text.repetition import RepeatedTail, compression_ratio, ngram_repetition_rate, repeated_tail

NGRAM = 3  # Length of the n-grams whose rate is reported, in tokens, as in TRL's reward

DEFAULT_SETTINGS = SamplingSettings(top_p=1.0, max_new_tokens=1024)
"""Samples as in GRPO, long enough to distinguish a loop from a phrase."""

_ALL = "all"


@dataclass(frozen=True)
class GroupRepetition(GroupRate):
    """Repetition in the responses to the prompts of one source language, or to all."""

    name: str
    endless: int  # Number of responses that were in a loop when they were cut off
    left: int  # Number of responses that left a loop of the same kind with their end token: repetition, but not endless
    ngram_rate: float  # Mean over responses of the share of token 3-grams that occurred before in the response
    compression: float  # Mean over responses of the bytes of the text divided by those after compression
    tokens: float  # Mean length of a response


@dataclass(frozen=True)
class RepetitionResult:
    """Repeat ratios with 95 % intervals, and the responses they were counted on."""

    groups: tuple[GroupRepetition, ...]  # One per source language
    total: GroupRepetition  # All responses together
    seed_noise: float
    """Half width of the 95 % range of the difference in `ratio` between two runs of the same model on the same prompts
    with different seeds. A smaller difference between two models is no evidence."""
    samples: tuple[Sample, ...] = field(repr=False)
    tails: tuple[RepeatedTail | None, ...] = field(repr=False)
    """The loop at the end of each of `samples`, if there is one, whether the response ended after it or not"""
    settings: dict[str, Any] = field(default_factory=dict)  # How the responses were drawn, and the definition of a loop

    @property
    def ratio(self) -> float:
        """Share of all responses that are endless."""
        return self.total.bootstrap.estimate

    def note(self) -> str:
        """Settings and noise in words, to stand wherever the ratio does."""
        return note_of(self.settings, self.seed_noise, "all prompts")

    def to_table(self) -> Table:
        """One row per source language, then all responses."""
        rows: list[list[Any]] = []
        for group in self.groups if len(self.groups) == 1 else (*self.groups, self.total):
            limits = [100 * limit for limit in (*group.wilson, *group.bootstrap[1:])]
            ended = 100 * group.ended / group.samples
            means = [group.ngram_rate, group.compression, ended, group.tokens]
            rows.append([group.name, group.prompts, group.samples, *limits, *means])
        columns = ["source", "prompts", "responses", "endless, %", "Wilson low", "Wilson high", "bootstrap low"]
        columns += ["bootstrap high", f"{NGRAM}-grams repeated", "compression", "ended, %", "tokens"]
        return Table("Endless repetition", columns, rows, caption=self.note())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready numbers, settings and note; without the responses (see `write_examples`)."""
        return {
            "ratio": self.ratio,
            **self.total.to_dict(),
            "seed_noise": self.seed_noise,
            "groups": {group.name: group.to_dict() for group in self.groups},
            "settings": dict(self.settings),
            "note": self.note(),
        }

    def write_examples(self, path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Write every response as one line of JSON.

        The fields are those of `Sample`, with the number of tokens instead of the tokens; `endless`; and `loop`, null
        or the `start`, `period` and `copies` of the loop at the end, counted in tokens, with its `block` as text if a
        tokenizer is given.
        """
        rows = []
        for sample, tail in zip(self.samples, self.tails, strict=True):
            loop = None if tail is None else asdict(tail)
            if loop is not None and tail is not None and tokenizer is not None:
                loop["block"] = str(tokenizer.decode(list(sample.tokens[tail.start : tail.second_copy])))
            row = {**sample.to_dict(tokens=False), "tokens": len(sample.tokens)}
            rows.append({**row, "endless": _is_endless(sample, tail), "loop": loop})
        return write_rows(path, rows)


def evaluate_repetition(
    model: nn.Module | SamplingEngine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt] | Mapping[str, Sequence[Prompt]],
    settings: SamplingSettings | None = None,
    *,
    min_copies: int = 4,
    min_tokens: int = 12,
    chat: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    show_progress: bool | None = None,
    keep: str | os.PathLike[str] | None = None,
) -> RepetitionResult:
    """Sample responses to `prompts` and count those that repeat themselves without end.

    Args:
        model (nn.Module or SamplingEngine): Causal language model of transformers, plain or wrapped, or another engine,
            such as `models.vllm_sampler.VLLMSampler`.
        tokenizer (PreTrainedTokenizerBase): Its tokenizer.
        prompts (sequence, or dict of str to sequence): Text or chat messages, in one list or by source language.
        settings (SamplingSettings, default None): How to draw; None is `DEFAULT_SETTINGS`. The ratio depends on each of
            them: the longer a response may be, the more room for a loop, and greedy decoding loops the most.
        min_copies (int, default 4): Copies at the end that make a loop, see `text.repetition.repeated_tail`.
        min_tokens (int, default 12): Length of these copies together, in tokens.
        chat (bool, default False): Send prompts through the chat template.
        chat_template_options (dict, default None): For the template, e.g. `{"enable_thinking": False}`.
        show_progress (bool, default None): Show a progress bar; None: on a terminal.
        keep (path, default None): File for the responses as they are drawn, from which the same call goes on.

    Raises:
        ValueError: an impossible `min_copies` or `min_tokens`, a response too short to hold such a loop, or as for
            `generate_samples`; before anything is generated.

    Example:
        >>> result = qp.evaluate_repetition(model, tokenizer, ["The river runs"], sampling)
        >>> 0 <= result.ratio <= 1
        True
    """
    settings = settings or DEFAULT_SETTINGS
    repeated_tail((), min_copies=min_copies, min_tokens=min_tokens)  # refuses values out of range
    if settings.max_new_tokens < max(min_copies, min_tokens):
        raise UserValueError(
            f"max_new_tokens={settings.max_new_tokens} leaves no room for {min_copies} copies of at least {min_tokens} "
            "tokens together; no response could count as a loop."
        )
    if isinstance(prompts, str):
        raise UserTypeError("Expected a list of prompts; got one string.")
    samples = generate_samples(
        model,
        tokenizer,
        prompts if isinstance(prompts, Mapping) else {_ALL: prompts},
        settings,
        chat=chat,
        chat_template_options=chat_template_options,
        show_progress=show_progress,
        keep=keep,
    )
    stated = {**stated_settings(model, settings), "chat": chat}
    return repeat_ratio(samples, min_copies=min_copies, min_tokens=min_tokens, settings=stated)


def repeat_ratio(
    samples: Sequence[Sample],
    *,
    min_copies: int = 4,
    min_tokens: int = 12,
    settings: Mapping[str, Any] | None = None,
) -> RepetitionResult:
    """Count endless repetition among samples: r = (1 / N) sum over responses of 1[cut off while in a loop].

    `min_copies` and `min_tokens` define a loop, see `text.repetition.repeated_tail`; `settings` say how the responses
    were drawn, and are reported with the result. ValueError for no samples, unequal numbers of samples per prompt, or
    samples without token ids.
    """
    matrices, groups = [], []
    kept: list[Sample] = []
    tails: list[RepeatedTail | None] = []
    for name, by_prompt in group_by_prompt(samples).items():
        ordered = [sample for group in by_prompt for sample in group]
        found = [_tail(sample, min_copies, min_tokens) for sample in ordered]
        outcomes = np.array([_is_endless(*pair) for pair in zip(ordered, found, strict=True)])
        matrix = outcomes.reshape(len(by_prompt), -1)
        groups.append(_group(name, ordered, found, matrix))
        matrices.append(matrix)
        kept += ordered
        tails += found
    together = np.concatenate(matrices)
    return RepetitionResult(
        groups=tuple(groups),
        total=_group(_ALL, kept, tails, together) if len(groups) > 1 else replace(groups[0], name=_ALL),
        seed_noise=seed_noise(together),
        samples=tuple(kept),
        tails=tuple(tails),
        settings={**(settings or {}), "min_copies": min_copies, "min_tokens": min_tokens},
    )


def _tail(sample: Sample, min_copies: int, min_tokens: int) -> RepeatedTail | None:
    if sample.response and not sample.tokens:
        raise UserValueError(
            f"Sample {sample.sample_index} of prompt {sample.prompt_index} has a response but no token ids, in which "
            "loops are found; draw the samples with generate_samples."
        )
    return repeated_tail(sample.tokens, min_copies=min_copies, min_tokens=min_tokens)


def _is_endless(sample: Sample, tail: RepeatedTail | None) -> bool:
    """As `text.repetition.is_endless_repetition`, for a tail that is known."""
    return tail is not None and not sample.ended


def _group(
    name: str, samples: Sequence[Sample], tails: Sequence[RepeatedTail | None], outcomes: NDArray[np.bool_]
) -> GroupRepetition:
    endless = int(outcomes.sum())
    return GroupRepetition(
        name=name,
        **GroupRate.fields_of(outcomes, samples),
        endless=endless,
        left=sum(tail is not None for tail in tails) - endless,
        ngram_rate=float(np.mean([ngram_repetition_rate(sample.tokens, NGRAM) for sample in samples])),
        compression=float(np.mean([compression_ratio(sample.response) for sample in samples])),
        tokens=float(np.mean([len(sample.tokens) for sample in samples])),
    )
