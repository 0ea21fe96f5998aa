"""Does a direction carry its language? Ablate it and add it, next to random features and the difference of means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.directions import random_directions
from qscope_posttrain.features.effects import effect_gradients, measure_effects
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.features.selection import difference_of_means
from qscope_posttrain.models.layers import evaluation_mode
from qscope_posttrain.models.scoring import TextScores, contrast_sample, score_sample, target_probability
from qscope_posttrain.models.steering import Steering, steer
from qscope_posttrain.report.progress import progress
from qscope_posttrain.report.tables import Cell, Table

__all__ = ["CausalEffect", "CausalReport", "causal_check", "effect_gradients", "measure_effects", "target_probability"]

FEATURE, CONTROL, MEANS = "feature", "control", "difference of means"
PROJECT_OUT, SUBTRACT, ADD = "project out", "subtract", "add"
BOOTSTRAP_DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Change:
    """A relative change with its bootstrap interval over texts, paired: the same texts with and without."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CausalEffect:
    """What one intervention on one direction did."""

    layer: int
    kind: str
    """`feature`, `control` (a random feature or direction) or `difference of means`"""
    name: str
    intervention: str
    """`project out`, `subtract` or `add`"""
    strength: float
    """For subtract and add: length of the shift in units of the layer's median residual norm"""
    probability: float
    """Mean P(target tokens) under the intervention"""
    probability_change: Change
    perplexity_change: Change


@dataclass(frozen=True)
class CausalReport:
    """All interventions for one target language."""

    target: str
    languages: tuple[str, ...]
    """Languages of the texts"""
    texts: int
    base_probability: float
    base_perplexity: float
    effects: tuple[CausalEffect, ...]

    def of(self, kind: str, layer: int, intervention: str, strength: float | None = None) -> list[CausalEffect]:
        """The effects of one kind of direction in one layer."""
        return [
            effect
            for effect in self.effects
            if (effect.kind, effect.layer, effect.intervention) == (kind, layer, intervention)
            and (strength is None or effect.strength == strength)
        ]

    def beyond_controls(self, effect: CausalEffect) -> bool:
        """Whether the direction does what its language's direction should, clearly, and more than every control.

        Taking it away must lower P(target), adding it must raise it: the whole interval on that side of 0, and the
        change beyond that of each control under the same intervention.
        """
        sign = 1 if effect.intervention == ADD else -1
        change = effect.probability_change
        clear = change.low > 0 if sign > 0 else change.high < 0
        controls = self.of(CONTROL, effect.layer, effect.intervention, effect.strength)
        return clear and all(sign * change.value > sign * other.probability_change.value for other in controls)

    def to_table(self) -> Table:
        """Changes in percent; controls in one line, with the range over them in place of the interval."""
        rows: list[list[Cell]] = []
        for key in dict.fromkeys((e.layer, e.intervention, e.strength) for e in self.effects):
            same = [e for e in self.effects if (e.layer, e.intervention, e.strength) == key]
            rows += [self._row(effect) for effect in same if effect.kind != CONTROL]
            controls = [effect for effect in same if effect.kind == CONTROL]
            if controls:
                rows.append(_control_row(controls))
        return Table(
            title=f"Causal check for {self.target}: P({self.target} tokens) = {self.base_probability:.3g} and "
            f"perplexity {self.base_perplexity:.4g} on {self.texts} texts in {', '.join(self.languages)}",
            columns=[
                "layer",
                "intervention",
                "strength",
                "direction",
                "P, %",
                "95 %",
                "ppl, %",
                "ppl 95 %",
                "beyond controls",
            ],
            rows=rows,
            caption="Relative changes against no intervention, with bootstrap intervals over texts; for the controls "
            "their mean and range. Strength: length of the shift in median residual norms.",
        )

    def _row(self, effect: CausalEffect) -> list[Cell]:
        probability, perplexity = effect.probability_change, effect.perplexity_change
        return [
            effect.layer, effect.intervention, _strength(effect), effect.name, 100 * probability.value,
            _range(probability.low, probability.high), 100 * perplexity.value,
            _range(perplexity.low, perplexity.high), self.beyond_controls(effect),
        ]  # fmt: skip


def causal_check(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    features: FeatureSet,
    target: str,
    *,
    controls: FeatureSet | None = None,
    strengths: Sequence[float] = (0.1,),
    random_count: int = 5,
    texts_per_language: int | None = 50,
    seed: int = 0,
    show_progress: bool | None = None,
    **options: Any,
) -> CausalReport:
    """Intervene at every token of real text in other languages, and measure P(target tokens) and perplexity.

    For every row of `features` that belongs to `target`, with u its decoder direction at unit length and m the
    median residual norm of its layer:

        project out     h - (h . u) u
        subtract        h - c m u           for each c in `strengths`
        add             h + c m u

    The same is done to the difference of means of the layer and to the controls, all at unit length, so that every
    shift has the same norm. Forwards only: nothing is generated.

    Args:
        texts: {language: texts}; `contrast.contrast_sample` chooses those that are read and takes `options`.
        controls: FeatureSet of random features (see `directions.random_feature_set`). Without it, and for layers it
            lacks, `random_count` random directions take their place and are named so.
        seed: of the random directions and of the bootstrap.

    Raises:
        ValueError: the target is not in `features`, the features belong to another model, or no text of another
            language is there.
    """
    features.check_model(model)
    chosen = features.select(language=target)
    if not strengths or any(not strength > 0 for strength in strengths):
        raise UserValueError(f"strengths must be positive, got {list(strengths)}.")
    if random_count < 1:
        raise UserValueError(f"random_count must be at least 1, got {random_count}.")
    sample = contrast_sample(model, tokenizer, texts, target, texts_per_language=texts_per_language, **options)
    trials = [
        (layer, kind, name, intervention, strength, steering)
        for layer, rows in chosen.layers.items()
        for kind, name, direction in _directions(features, layer, rows, target, controls, random_count, seed)
        for intervention, strength, steering in _interventions(direction, layer, rows.residual_median_norm, strengths)
    ]
    effects = []
    with evaluation_mode(model):
        base = score_sample(model, sample)
        draws = _bootstrap_draws(len(base.tokens), seed)
        for layer, kind, name, intervention, strength, steering in progress(
            trials, description=f"causal check for {target}", enabled=show_progress
        ):
            with steer(model, steering):
                scores = score_sample(model, sample)
            probability, perplexity = _changes(base, scores, draws)
            effects.append(
                CausalEffect(
                    layer, kind, name, intervention, strength, scores.mean_probability, probability, perplexity
                )
            )
    return CausalReport(
        target=target,
        languages=sample.languages,
        texts=len(base.tokens),
        base_probability=base.mean_probability,
        base_perplexity=base.perplexity,
        effects=tuple(effects),
    )


def _directions(
    features: FeatureSet,
    layer: int,
    rows: LayerFeatures,
    target: str,
    controls: FeatureSet | None,
    random_count: int,
    seed: int,
) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, name, direction) of everything that is tried in one layer."""
    for name, direction in zip(rows.names, rows.decoder, strict=True):
        yield FEATURE, name, direction
    if len(features.languages) > 1:
        yield MEANS, MEANS, difference_of_means(rows.mean_residual, features.language_index(target))
    if controls is not None and layer in controls.layers:
        drawn, names = controls.layers[layer].decoder, controls.layers[layer].names
    else:
        drawn = random_directions(torch.ones(random_count), rows.d_model, seed + layer)
        names = tuple(f"random direction {i + 1}" for i in range(random_count))
    for name, direction in zip(names, drawn, strict=True):
        yield CONTROL, name, direction


def _interventions(
    direction: Tensor, layer: int, median_norm: float, strengths: Sequence[float]
) -> Iterator[tuple[str, float, Steering]]:
    yield PROJECT_OUT, 1.0, Steering(direction, (layer,), mode="project_out")
    for strength in strengths:
        length = strength * median_norm
        yield SUBTRACT, strength, Steering(direction, (layer,), -length, mode="add", unit="norm")
        yield ADD, strength, Steering(direction, (layer,), length, mode="add", unit="norm")


def _bootstrap_draws(texts: int, seed: int) -> Tensor:
    """[draws, texts] how often each text is drawn, with replacement; fp64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(texts, (BOOTSTRAP_DRAWS, texts), generator=generator)
    return torch.zeros(BOOTSTRAP_DRAWS, texts, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64)
    )


def _changes(base: TextScores, scores: TextScores, draws: Tensor) -> tuple[Change, Change]:
    """Relative changes of mean P(target) and of perplexity, with intervals over the same draws of texts."""

    def change(weights: Tensor) -> tuple[Tensor, Tensor]:
        probability = (weights @ scores.probability) / (weights @ base.probability) - 1
        perplexity = ((weights @ (scores.loss - base.loss)) / (weights @ base.tokens)).expm1()
        return probability, perplexity

    quantiles = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    intervals = [values.quantile(quantiles).tolist() for values in change(draws)]
    values = [float(value) for value in change(torch.ones(draws.shape[1], dtype=torch.float64))]
    return Change(values[0], *intervals[0]), Change(values[1], *intervals[1])


def _control_row(controls: Sequence[CausalEffect]) -> list[Cell]:
    probability = [100 * control.probability_change.value for control in controls]
    perplexity = [100 * control.perplexity_change.value for control in controls]
    kind = controls[0].name.split(" #")[0].rstrip("0123456789 ")
    return [
        controls[0].layer, controls[0].intervention, _strength(controls[0]), f"{kind} ({len(controls)}): mean, range",
        sum(probability) / len(controls), _range(min(probability) / 100, max(probability) / 100),
        sum(perplexity) / len(controls), _range(min(perplexity) / 100, max(perplexity) / 100), None,
    ]  # fmt: skip


def _strength(effect: CausalEffect) -> float | None:
    return None if effect.intervention == PROJECT_OUT else effect.strength


def _range(low: float, high: float) -> str:
    return f"{100 * low:+.3g} .. {100 * high:+.3g}"
