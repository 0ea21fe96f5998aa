"""Probes of the habit: how likely a model is to enter a known loop, to go on in it, and to stay there to the end.

All are teacher forced: no sampling noise, but they know exact repeats of known bodies only, and can fall while sampled
loops do not. Read them with sampled counts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.testbed.models import LanguageModel, pad_right
from benchmarks.testbed.repetition.config import RepetitionConfig
from benchmarks.testbed.repetition.language_model import OwnLoops, prompt_ids
from benchmarks.testbed.repetition.task import draw_problems, encode_words, write_steps
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.text.repetition import repeated_tail

_BATCH = 64
_LATE_COPY = 6


@dataclass(frozen=True)
class Case:
    """A text and a body that might be repeated after it."""

    prefix: tuple[int, ...]
    """Prompt and completion up to and with the first copy of the body."""
    body: tuple[int, ...]
    """The repeated tokens."""
    copies: int
    """K: how many more copies there are to the length limit, at least 2."""
    weight: float = 1.0
    """How many places like this one a completion has."""


@dataclass(frozen=True)
class ProbeSet:
    """Cases at which a model is probed: fixed once, from the start model, for all that is trained from it."""

    own: tuple[Case, ...]
    """The start model's own loops."""
    clean: tuple[Case, ...]
    """Right solutions of held-out problems, cut after a step."""
    solutions: int
    """How many solutions the clean cases come from."""


@dataclass(frozen=True)
class Probes:
    """With q_k = log P(k-th further copy of the body given all before it)."""

    oh: float
    """Entry: mean over own loops of exp(q_1)."""
    oc1: float
    """Continuation: mean over own loops of exp(q_2)."""
    oend: float
    """Endless: mean over own loops of exp(q_1 + .. + q_K). Too high as a level, since these loops were selected by
    having happened; fair between models."""
    h: float
    """Entry from right solutions: sum over clean cases of exp(q_1), over the number of solutions."""
    c1: float
    """Mean over clean cases of exp(q_2)."""
    c5: float
    """Mean over clean cases of exp(q_6)."""
    cend: float
    """Mean over clean cases of exp(q_2 + .. + q_K)."""
    end: float
    """Exact endless loops expected in a right solution: sum over clean cases of steps x exp(q_1 + .. + q_K), over the
    number of solutions."""


@dataclass(frozen=True)
class ProbedConfig(RepetitionConfig):
    """Settings of a repetition experiment, in which models are probed during training."""

    probe_solutions: int = field(default=100, metadata={"help": "Right solutions at which models are probed."})
    probe_every: int = field(default=10, metadata={"help": "Updates between two measurements of the probes."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("probe_solutions", "probe_every"):
            if getattr(self, name) < 1:
                raise UserValueError(f"repetition setting {name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Probing:
    """Probes that watch a run, see `testbed.repetition.experiment.Watch`."""

    every: int
    solutions: int

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the measurements; raise the version when the same settings would give others."""
        return {"probes": "1", "every": self.every, "solutions": self.solutions}

    def prepare(
        self, language_model: LanguageModel, loops: OwnLoops, config: RepetitionConfig
    ) -> Callable[[PreTrainedModel], dict[str, float]]:
        """Return the measurement: of all own loops, and of clean cases of held-out problems."""
        found = loops.collection.loops
        own = own_cases(
            [loop.prompt_ids for loop in found], [loop.completion_ids for loop in found], config.answer_tokens
        )
        clean = clean_cases(language_model, config.operations, config.answer_tokens, self.solutions, config.model_seed)
        probes = ProbeSet(own, clean, self.solutions)
        return lambda model: asdict(measure_probes(model, probes))


def own_cases(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], answer_tokens: int
) -> tuple[Case, ...]:
    """Return one case per loop: the body is the second copy in the repeated tail, K fills `answer_tokens`.

    Raises:
        ValueError: a completion without a repeated tail.
    """
    cases = []
    for prompt, completion in zip(prompts, completions, strict=True):
        tail = repeated_tail(completion)
        if tail is None:
            raise UserValueError("a probe of own loops needs completions that end in at least three copies of a period")
        start = tail.second_copy
        body = tuple(completion[start : start + tail.period])
        cases.append(Case((*prompt, *completion[:start]), body, _copies(start, body, answer_tokens)))
    return tuple(cases)


def clean_cases(
    language_model: LanguageModel, operations: tuple[int, int], answer_tokens: int, solutions: int, seed: int
) -> tuple[Case, ...]:
    """Return cases from right solutions of held-out problems, each cut after one random step.

    The body is the last step, and, in a second case where there are two, the last two steps.
    """
    rng = random.Random(f"clean probes {seed}")
    tokenizer = language_model.tokenizer
    cases = []
    problems = draw_problems(solutions, operations, seed, held_out=True)
    for problem, prompt in zip(problems, prompt_ids(language_model, problems), strict=True):
        steps = [encode_words(tokenizer, step) for step in write_steps(problem, rng)[0]]
        done = rng.randint(1, len(steps))
        written = [token for step in steps[:done] for token in step]
        for length in range(1, min(done, 2) + 1):
            body = tuple(token for step in steps[done - length : done] for token in step)
            copies = _copies(len(written), body, answer_tokens)
            cases.append(Case((*prompt, *written), body, copies, float(len(steps))))
    return tuple(cases)


def measure_probes(model: PreTrainedModel, probes: ProbeSet) -> Probes:
    """Measure all probes of a model, in float64 from its logits on.

    Raises:
        ValueError: no own loop or no clean case.
    """
    if not probes.own or not probes.clean:
        raise UserValueError(f"probes need own loops and clean cases, got {len(probes.own)} and {len(probes.clean)}")
    own, clean = copy_log_probabilities(model, probes.own), copy_log_probabilities(model, probes.clean)
    ends = [q[: case.copies].sum().exp() for q, case in zip(clean, probes.clean, strict=True)]
    steps = [end * case.weight for end, case in zip(ends, probes.clean, strict=True)]
    return Probes(
        oh=_mean([q[0].exp() for q in own]),
        oc1=_mean([q[1].exp() for q in own]),
        oend=_mean([q[: case.copies].sum().exp() for q, case in zip(own, probes.own, strict=True)]),
        h=_mean([q[0].exp() for q in clean]) * len(clean) / probes.solutions,
        c1=_mean([q[1].exp() for q in clean]),
        c5=_mean([q[_LATE_COPY - 1].exp() for q in clean]),
        cend=_mean([q[1 : case.copies].sum().exp() for q, case in zip(clean, probes.clean, strict=True)]),
        end=_mean(steps) * len(clean) / probes.solutions,
    )


@torch.no_grad()
def copy_log_probabilities(model: PreTrainedModel, cases: Sequence[Case]) -> list[Tensor]:
    """Return q_1, q_2, .. of every case, float64 [max(K, 6)], from one forward over the prefix and all copies."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(cases)), key=lambda index: _length(cases[index]))
    found: dict[int, Tensor] = {}
    for begin in range(0, len(order), _BATCH):
        indices = order[begin : begin + _BATCH]
        rows = [[*cases[index].prefix, *cases[index].body * _repeats(cases[index])] for index in indices]
        # Padding on the right: causality keeps it out of everything that is read here.
        tokens = pad_right(rows).to(model.device)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        scores = logits.double().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1).cpu()
        for index, score in zip(indices, scores, strict=True):
            case = cases[index]
            first = len(case.prefix) - 1  # the state that predicts the first token after the prefix
            found[index] = score[first : first + _repeats(case) * len(case.body)].view(_repeats(case), -1).sum(-1)
    model.train(was_training)
    return [found[index] for index in range(len(cases))]


def _copies(start: int, body: Sequence[int], answer_tokens: int) -> int:
    return max(2, (answer_tokens - start) // len(body))


def _repeats(case: Case) -> int:
    return max(case.copies, _LATE_COPY)


def _length(case: Case) -> int:
    return len(case.prefix) + len(case.body) * _repeats(case)


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.stack(list(values)).mean())
