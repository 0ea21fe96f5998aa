"""Dose curves: effect and cost of steering at each strength, for features and for controls of equal length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import regex
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.dose_curve import FEATURE, RANDOM, UNSTEERED, Trial, controls, sample_trials
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.steering import feature_steering
from qscope_posttrain.intervals import Interval, bootstrap_of_sums, bootstrap_over_prompts, wilson
from qscope_posttrain.models.generation import Prompt, Sample, SamplingSettings, encode_prompts
from qscope_posttrain.models.scoring import response_losses, text_losses
from qscope_posttrain.models.steering import steer
from qscope_posttrain.models.steering_spec import unit
from qscope_posttrain.report.progress import status
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.text.repetition import is_endless_repetition, ngram_repetition_rate
from qscope_posttrain.text.scripts import contains_language_script

Effect = Callable[[Sample], float]
"""Score of a response in [0, 1]: 1 where it shows the behavior that steering is to cause (or to suppress)."""

PLAIN = "plain prompt"
_RESAMPLES = 2000


def writes_language(language: str) -> Effect:
    """1 for a response that contains a character of the language's script."""
    return lambda sample: float(contains_language_script(sample.response, language))


def matches(pattern: str) -> Effect:
    """1 for a response in which the regular expression is found. ValueError if it is not valid."""
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise UserValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return lambda sample: float(compiled.search(sample.response) is not None)


@dataclass(frozen=True)
class DosePoint:
    """The responses to all prompts at one strength along one direction (or several of one kind)."""

    kind: str  # FEATURE, RANDOM, MEANS, PLAIN or UNSTEERED
    strength: float
    samples: int
    effect: Interval  # Mean of the effect, with a bootstrap interval over prompts
    perplexity: Interval
    """exp of the mean loss of the responses' tokens under the unsteered model after the original prompt"""
    endless: float  # Share of responses in endless repetition
    repeated: float  # Mean share of 3-grams of a response that it had before
    ended: float  # Share of responses that end by themselves
    tokens: float  # Mean length of a response
    text_perplexity: float | None = None  # Perplexity of other text to the steered model; None without such text
    responses: tuple[Sample, ...] = ()  # All of them, direction by direction


@dataclass(frozen=True)
class DoseCurve:
    """All points, the unsteered one first."""

    points: tuple[DosePoint, ...]
    layer: int

    @property
    def unsteered(self) -> DosePoint:
        return self.points[0]

    def of(self, kind: str) -> list[DosePoint]:
        """Points of one kind, by strength, with the unsteered one in its place at strength 0."""
        own = [point for point in self.points if point.kind == kind]
        return sorted([*own, replace(self.unsteered, kind=kind)], key=lambda point: point.strength)

    def best(self, max_perplexity_ratio: float = 1.1, sign: int = 1) -> DosePoint | None:
        """The point of the features with the largest (sign 1) or smallest (-1) effect at a perplexity of at most
        `max_perplexity_ratio` times that without steering, or None. It is the best of several on the same responses:
        sample anew before you quote its effect."""
        limit = max_perplexity_ratio * self.unsteered.perplexity.estimate
        affordable = [p for p in self.points if p.kind == FEATURE and p.perplexity.estimate <= limit]
        return max(affordable, key=lambda point: sign * point.effect.estimate, default=None)

    def to_table(self) -> Table:
        texts = self.unsteered.text_perplexity is not None
        columns = ["steered along", "strength", "effect", "low", "high", "perplexity", "low ", "high "]
        columns += ["endless", "repeated 3-grams", "ended", "tokens"]
        rows: list[list[Cell]] = []
        for p in self.points:
            numbers = [*p.effect, *p.perplexity, p.endless, p.repeated, p.ended, p.tokens]
            rows.append([p.kind, p.strength, *numbers, *([p.text_perplexity] if texts else [])])
        return Table(
            title=f"Dose curve of layer {self.layer}: {self.unsteered.samples} responses per point",
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
        effect: score of a response; `writes_language`, `matches`, or any function such as a judge's verdict.
        strengths: multiples of `unit` (by default of the layer's median residual norm), negative to suppress; not 0,
            which is always measured.
        random_vectors: `[directions, d_model]`.
        plain_prompt: an instruction that asks for the effect; a system message in front of a chat, else text and a
            line break in front of the prompt.
        texts: other text; its perplexity to the steered model is the cost that responses alone do not show.
        steering_options: layer, unit, positions, mode ("add" or "project_out") of `features.steering.feature_steering`.
    """
    if not strengths or 0 in strengths:
        raise UserValueError(
            f"strengths must be numbers other than 0 (which is always measured), got {list(strengths)}."
        )
    if steering_options.get("mode", "add") not in ("add", "project_out"):
        raise UserValueError("a dose curve compares directions: mode must be 'add' or 'project_out'.")
    settings = settings or SamplingSettings()
    one = feature_steering(features, label=label, strength=1.0, **steering_options)
    if random_count < 1:
        raise UserValueError(f"random_count must be at least 1; got {random_count}.")
    layer = one.layers[0]
    rows = features.layers[layer]
    own = features.language_index(label if label is not None else rows.labels[0])
    directions = {FEATURE: one.direction[None], **controls(rows.mean_residual, own, random_count, seed)}
    if random_vectors is not None:
        directions[RANDOM] = random_vectors
    templated: dict[str, Any] = {"chat": chat, "chat_template_options": chat_template_options}
    original = encode_prompts(tokenizer, prompts, **templated)
    count = len(original) * settings.samples_per_prompt

    def steered(trial: Trial) -> AbstractContextManager[Any]:
        if trial.vectors is None:
            return nullcontext()
        return steer(model, replace(one, direction=trial.vectors[0], strength=trial.strength, positions="all"))

    def measure(kind: str, trials: Sequence[Trial], asked: list[list[int]]) -> DosePoint:
        strength = trials[0].strength
        status(f"dose curve: {kind}" + (f", strength {strength:g}" if strength else ""))
        samples: list[Sample] = []
        sums = torch.zeros(2, dtype=torch.float64)
        for trial in trials:
            # The same random numbers for every trial, so that points differ by their steering.
            (responses,) = sample_trials(model, tokenizer, asked, [trial], count, settings, seed=settings.seed)
            for j, (tokens, ended) in enumerate(responses):
                place, number = j % len(asked), j // len(asked)
                prompt = str(tokenizer.decode(asked[place]))
                response = str(tokenizer.decode(tokens, skip_special_tokens=True))
                ids = tuple(asked[place]), tuple(tokens)
                samples.append(Sample("all", place, number, prompt, response, ended, *ids))
            if texts:
                with steered(trial):
                    sums += torch.stack([part.double().sum() for part in text_losses(model, tokenizer, texts)])
        losses = response_losses(model, [original[s.prompt_index] for s in samples], [s.tokens for s in samples])
        by_prompt: list[list[float]] = [[] for _ in original]
        for sample in samples:
            by_prompt[sample.prompt_index].append(effect(sample))
        return DosePoint(
            kind=kind,
            strength=strength,
            samples=len(samples),
            effect=_effect_interval(by_prompt),
            perplexity=_perplexity(*losses, [sample.prompt_index for sample in samples]),
            endless=float(np.mean([is_endless_repetition(s.tokens, ended=s.ended) for s in samples])),
            repeated=float(np.mean([ngram_repetition_rate(s.tokens, 3) for s in samples])),
            ended=float(np.mean([s.ended for s in samples])),
            tokens=float(np.mean([len(s.tokens) for s in samples])),
            text_perplexity=float((sums[0] / sums[1]).exp()) if texts else None,
            responses=tuple(samples),
        )

    points = [measure(UNSTEERED, [Trial(UNSTEERED, UNSTEERED)], original)]
    if plain_prompt is not None:
        instructed = encode_prompts(
            tokenizer, [_with_instruction(prompt, plain_prompt) for prompt in prompts], **templated
        )
        points.append(measure(PLAIN, [Trial(PLAIN, PLAIN)], instructed))
    norm = (one.residual_norms or {})[layer] if one.unit == "relative" else 1.0
    for kind, vectors in directions.items():
        for strength in map(float, sorted(strengths)):
            how: dict[str, Any] = {"norm": norm, "strength": strength, "mode": one.mode, "positions": one.positions}
            trials = [Trial(kind, kind, layer, unit(vector.float())[None], **how) for vector in vectors]
            points.append(measure(kind, trials, original))
    return DoseCurve(tuple(points), layer)


def _effect_interval(by_prompt: Sequence[Sequence[float]]) -> Interval:
    """Bootstrap over prompts; where no response or every one shows the effect, which a bootstrap takes for certain, the
    Wilson limits of as many prompts."""
    found = bootstrap_over_prompts(by_prompt, _RESAMPLES)
    if found.estimate not in (0.0, 1.0) or found.low != found.high:
        return found
    prompts = sum(1 for outcomes in by_prompt if outcomes)
    return wilson(round(found.estimate * prompts), prompts)


def _perplexity(loss: Tensor, tokens: Tensor, prompts: Sequence[int]) -> Interval:
    """exp(sum of losses / sum of tokens), with a bootstrap interval that resamples whole prompts."""
    if not int(tokens.sum()):
        return Interval(float("nan"), float("nan"), float("nan"))
    owners = np.asarray(prompts)
    sums = np.stack([np.bincount(owners, part.double().numpy()) for part in (loss, tokens)], axis=1)
    return bootstrap_of_sums(sums, lambda drawn: np.exp(drawn[..., 0] / np.maximum(drawn[..., 1], 1)), _RESAMPLES)


def _with_instruction(prompt: Prompt, instruction: str) -> Prompt:
    if isinstance(prompt, str):
        return f"{instruction}\n{prompt}"
    if isinstance(prompt, Mapping):
        return {**prompt, "prompt": _with_instruction(prompt["prompt"], instruction)}
    return [{"role": "system", "content": instruction}, *prompt]
