"""What steering does at each strength: the wanted effect, its price, and the same for directions without a meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import regex
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.evaluation.response_loss import response_losses, text_losses
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.steering import feature_steering
from qscope_posttrain.intervals import Interval, bootstrap_over_prompts, wilson
from qscope_posttrain.models.generation import Prompt, Sample, SamplingSettings, encode_prompts, generate_samples
from qscope_posttrain.models.steering import Steering, steer
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.text.repetition import is_endless_repetition, ngram_repetition_rate
from qscope_posttrain.text.scripts import contains_language_script

Effect = Callable[[Sample], float]
"""What a response is worth, in [0, 1]: 1 where it shows what steering is to bring about (or to suppress)."""

FEATURE, RANDOM, MEANS, PLAIN, UNSTEERED = (
    "features",
    "random",
    "difference of means",
    "plain prompt",
    "unsteered",
)

_RESAMPLES = 2000


def writes_language(language: str) -> Effect:
    """1 for a response that contains a character of the language's script."""
    return lambda sample: float(contains_language_script(sample.response, language))


def matches(pattern: str) -> Effect:
    """1 for a response in which the regular expression is found. ValueError if it is none."""
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise UserValueError(f"{pattern!r} is no regular expression: {error}") from error
    return lambda sample: float(compiled.search(sample.response) is not None)


@dataclass(frozen=True)
class DosePoint:
    """The responses to all prompts at one strength along one direction (or several of one kind)."""

    kind: str
    """FEATURE, RANDOM, MEANS, PLAIN or UNSTEERED"""
    strength: float
    samples: int
    effect: Interval
    """Mean of the effect, with a bootstrap interval over prompts"""
    perplexity: Interval
    """exp of the mean loss of the responses' tokens under the unsteered model after the original prompt"""
    endless: float
    """Share of responses in endless repetition"""
    repeated: float
    """Mean share of 3-grams of a response that it had before"""
    ended: float
    """Share of responses that end by themselves"""
    tokens: float
    """Mean length of a response"""
    text_perplexity: float | None = None
    """Perplexity of other text to the steered model; None without such text"""


@dataclass(frozen=True)
class DoseCurve:
    """All points, the unsteered one first."""

    points: tuple[DosePoint, ...]
    layer: int
    settings: Mapping[str, Any]

    @property
    def unsteered(self) -> DosePoint:
        return self.points[0]

    def of(self, kind: str) -> list[DosePoint]:
        """Points of one kind, by strength, with the unsteered one in its place at strength 0."""
        own = [point for point in self.points if point.kind == kind]
        return sorted([*own, replace(self.unsteered, kind=kind)], key=lambda point: point.strength)

    def best(self, max_perplexity_ratio: float = 1.1, sign: int = 1) -> DosePoint | None:
        """The point of the features with the largest (sign 1) or smallest (-1) effect at a bearable price.

        Bearable is a perplexity of at most `max_perplexity_ratio` times that without steering. None where no strength
        is bearable. It is the best of several on the same responses: sample anew before you quote its effect.
        """
        limit = max_perplexity_ratio * self.unsteered.perplexity.estimate
        affordable = [p for p in self.points if p.kind == FEATURE and p.perplexity.estimate <= limit]
        return max(affordable, key=lambda point: sign * point.effect.estimate, default=None)

    def to_table(self) -> Table:
        texts = self.unsteered.text_perplexity is not None
        columns = ["steered along", "strength", "effect", "low", "high", "perplexity", "low ", "high ",
                   "endless", "repeated 3-grams", "ended", "tokens"]  # fmt: skip
        rows: list[list[Cell]] = []
        for p in self.points:
            numbers = [*p.effect, *p.perplexity, p.endless, p.repeated, p.ended, p.tokens]
            rows.append([p.kind, p.strength, *numbers, *([p.text_perplexity] if texts else [])])
        return Table(
            title=f"Dose curve of layer {self.layer}: {self.unsteered.samples} responses a point",
            columns=columns + (["perplexity of other text"] if texts else []),
            rows=rows,
            caption="effect: mean over responses, 95 % bootstrap interval over prompts. perplexity: of the responses "
            "under the unsteered model after the original prompt. Directions of one strength have equal length."
            + (" perplexity of other text: to the steered model." if texts else ""),
        )


def dose_curve(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    features: FeatureSet,
    effect: Effect,
    strengths: Sequence[float],
    *,
    settings: SamplingSettings | None = None,
    label: str | None = None,
    random_vectors: Tensor | None = None,
    random_count: int = 3,
    plain_prompt: str | None = None,
    texts: Sequence[str] = (),
    chat: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    **steering_options: Any,
) -> DoseCurve:
    """Responses to `prompts` at every strength along the features, and along controls of equal length.

    The controls are `random_count` random directions, or the rows of `random_vectors` (for example decoder rows of
    random features of the same SAE), whose responses are pooled; the difference of means between the label and the
    other sets of the FeatureSet, where there are others; and, unsteered, `plain_prompt` in front of every prompt.

    Args:
        effect: what a response is worth; `writes_language`, `matches`, or any function such as a judge's verdict.
        strengths: multiples of `unit` (by default of the layer's median residual norm), negative to suppress; not 0,
            which is always measured.
        random_vectors: `[directions, d_model]`.
        plain_prompt: an instruction that asks for the effect; a system message in front of a chat, else text and a
            line break in front of the prompt.
        texts: other text, whose perplexity to the steered model is the price that responses alone do not show.
        steering_options: layer, unit, positions, mode ("add" or "project_out") of `features.steering.feature_steering`.

    Raises:
        ValueError: no strengths, a zero among them, or what `feature_steering` and `generate_samples` refuse.
    """
    if not strengths or 0 in strengths:
        raise UserValueError(
            f"strengths must be numbers other than 0 (which is always measured), got {list(strengths)}."
        )
    if steering_options.get("mode", "add") not in ("add", "project_out"):
        raise UserValueError("a dose curve compares directions: mode must be 'add' or 'project_out'.")
    settings = settings or SamplingSettings()
    one = feature_steering(features, label=label, strength=1.0, **steering_options)
    directions = {FEATURE: one.direction[None]}
    directions[RANDOM] = _random(one.direction, random_count, seed) if random_vectors is None else random_vectors
    means = _difference_of_means(features, one.layers[0], label)
    if means is not None:
        directions[MEANS] = means[None]
    options = dict(chat_template_options or {})
    original = encode_prompts(tokenizer, prompts, chat=chat, chat_template_options=options)

    def measure(kind: str, strength: float, steerings: Sequence[Steering], asked: Sequence[Prompt]) -> DosePoint:
        status(f"dose curve: {kind}" + (f", strength {strength:g}" if steerings else ""))
        samples: list[Sample] = []
        other: list[tuple[Tensor, Tensor]] = []
        given: list[Steering | None] = [*steerings] or [None]
        for steering in given:
            with steer(model, steering, require_generated=False) if steering is not None else nullcontext():
                samples += generate_samples(
                    model, tokenizer, {"all": asked}, settings, chat=chat, chat_template_options=options
                )
            if texts:
                everywhere = None if steering is None else replace(steering, positions="all")
                with steer(model, everywhere) if everywhere is not None else nullcontext():
                    other.append(text_losses(model, tokenizer, texts))
        return _point(kind, strength, samples, original, model, effect, other)

    points = [measure(UNSTEERED, 0.0, [], prompts)]
    if plain_prompt is not None:
        points.append(measure(PLAIN, 0.0, [], [_with_instruction(prompt, plain_prompt) for prompt in prompts]))
    for kind, vectors in directions.items():
        for strength in sorted(strengths):
            steerings = [replace(one, direction=vector.float(), strength=float(strength)) for vector in vectors]
            points.append(measure(kind, float(strength), _equal_length(steerings, one), prompts))
    described = {"sampling": settings.to_dict(), "random_directions": len(directions[RANDOM]), "seed": seed}
    return DoseCurve(tuple(points), one.layers[0], described)


def _equal_length(steerings: Sequence[Steering], one: Steering) -> list[Steering]:
    """Directions as long as the features' own, which matters where strength multiplies the direction as it is."""
    length = one.direction.norm()
    return [replace(s, direction=s.direction / s.direction.norm() * length) for s in steerings]


def _point(
    kind: str,
    strength: float,
    samples: Sequence[Sample],
    original: Sequence[Sequence[int]],
    model: nn.Module,
    effect: Effect,
    other: Sequence[tuple[Tensor, Tensor]],
) -> DosePoint:
    loss, tokens = response_losses(model, [original[s.prompt_index] for s in samples], [s.tokens for s in samples])
    text_perplexity = None
    if other:
        text_loss, text_tokens = (torch.stack(part).sum() for part in zip(*other, strict=True))
        text_perplexity = float((text_loss / text_tokens).exp())
    by_prompt: list[list[float]] = [[] for _ in original]
    for sample in samples:
        by_prompt[sample.prompt_index].append(effect(sample))
    return DosePoint(
        kind=kind,
        strength=strength,
        samples=len(samples),
        effect=_effect_interval(by_prompt),
        perplexity=_perplexity(loss, tokens, [sample.prompt_index for sample in samples]),
        endless=float(np.mean([is_endless_repetition(s.tokens, ended=s.ended) for s in samples])),
        repeated=float(np.mean([ngram_repetition_rate(s.tokens, 3) for s in samples])),
        ended=float(np.mean([s.ended for s in samples])),
        tokens=float(np.mean([len(s.tokens) for s in samples])),
        text_perplexity=text_perplexity,
    )


def _effect_interval(by_prompt: Sequence[Sequence[float]]) -> Interval:
    """Bootstrap over prompts; where no response or every one shows the effect, which a bootstrap takes for certain, the
    Wilson limits of as many prompts."""
    found = bootstrap_over_prompts(by_prompt, _RESAMPLES)
    if found.estimate not in (0.0, 1.0) or found.low != found.high:
        return found
    prompts = sum(1 for outcomes in by_prompt if outcomes)
    return wilson(round(found.estimate * prompts), prompts)


def _perplexity(loss: Tensor, tokens: Tensor, prompts: Sequence[int]) -> Interval:
    """exp(sum of losses / sum of tokens), with a percentile interval that resamples whole prompts."""
    owners = np.asarray(prompts)
    count = int(owners.max()) + 1
    losses, counts = (np.bincount(owners, part.double().numpy(), count) for part in (loss, tokens))
    if counts.sum() == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    drawn = np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))
    replicates = np.exp(losses[drawn].sum(1) / np.maximum(counts[drawn].sum(1), 1))
    low, high = np.quantile(replicates, [0.025, 0.975])
    return Interval(float(np.exp(losses.sum() / counts.sum())), float(low), float(high))


def _random(direction: Tensor, count: int, seed: int) -> Tensor:
    if count < 1:
        raise UserValueError(f"random_count must be at least 1; got {count}.")
    return torch.randn(count, direction.shape[-1], generator=torch.Generator().manual_seed(seed))


def _difference_of_means(features: FeatureSet, layer: int, label: str | None) -> Tensor | None:
    """Mean residual of the label's texts minus that of the other sets, which count alike; None without another set."""
    if len(features.languages) < 2:
        return None
    rows = features.layers[layer]
    own = features.language_index(label if label is not None else rows.labels[0])
    means = rows.mean_residual
    others = [index for index in range(len(means)) if index != own]
    return means[own] - means[others].mean(dim=0)


def _with_instruction(prompt: Prompt, instruction: str) -> Prompt:
    if isinstance(prompt, str):
        return f"{instruction}\n{prompt}"
    if isinstance(prompt, Mapping):
        return {**prompt, "prompt": _with_instruction(prompt["prompt"], instruction)}
    return [{"role": "system", "content": instruction}, *prompt]
