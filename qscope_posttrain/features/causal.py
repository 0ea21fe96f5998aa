"""Effects of directions on a language: gradients of log P(its tokens), and a check by ablating and adding them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features import dose_curve
from qscope_posttrain.features.dose_curve import MEANS, RANDOM
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.intervals import Interval, bootstrap_of_sums
from qscope_posttrain.models import scoring
from qscope_posttrain.models.batches import TokenBatch
from qscope_posttrain.models.capture import LayerCapture
from qscope_posttrain.models.layers import check_layers, evaluation_mode, pretrained_model
from qscope_posttrain.models.scoring import TextScores
from qscope_posttrain.models.steering import Steering, steer
from qscope_posttrain.report.progress import progress
from qscope_posttrain.report.tables import Cell, Table

FEATURE, CONTROL = "feature", "control"
PROJECT_OUT, SUBTRACT, ADD = "project out", "subtract", "add"
RESAMPLES = 1000


def effect_gradients(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    target: str,
    layers: Sequence[int],
    *,
    show_progress: bool | None = None,
    **options: Any,
) -> dict[int, Tensor]:
    """g = (1/N) sum_s d (sum_t log P_t) / d h_s at the output of each layer, {layer: [d_model] fp64}.

    P_t is the probability of the target's tokens at position t; s and t run over the N positions of text in the other
    languages that have a next token. So g . d is the derivative of the mean log-probability with respect to e when
    h + e d replaces h at EVERY position: the first-order effect of steering. `options` are those of
    `scoring.contrast_sample`, which chooses texts and tokens. Parameters receive no gradient.
    """
    sample = scoring.contrast_sample(model, tokenizer, texts, target, **options)

    def target_mass(flat: Tensor, batch: TokenBatch) -> Tensor:
        chunks = scoring.logit_chunks(flat, scoring.predicted_tokens(batch)[0])
        masses = [scoring.log_masses(part, sample.target_tokens) for (part,) in chunks]
        return torch.stack([(log_target - log_all).sum() for log_all, log_target in masses]).sum()

    shown = progress(sample.batches, description=f"effects on {target}", enabled=show_progress)
    total = steering_gradients(model, shown, layers, target_mass)
    positions = sum(int((batch.lengths - 1).sum()) for batch in sample.batches)
    return {layer: gradient / positions for layer, gradient in total.items()}


@torch.enable_grad()
def steering_gradients(
    model: nn.Module,
    batches: Iterable[TokenBatch],
    layers: Sequence[int],
    objective: Callable[[Tensor, TokenBatch], Tensor],
    positions: Callable[[TokenBatch], Tensor] | None = None,
) -> dict[int, Tensor]:
    """Gradient of a sum with respect to one vector added to the states of a layer, {layer: [d_model] fp64, CPU}.

    `objective` makes a batch's share of the sum from its logits [batch * length, vocabulary]; `positions` are the
    flattened ones at which the vector is added, None for all. One backward pass per batch serves all layers.
    """
    layers = check_layers(model, layers)
    total: dict[int, Tensor] = {}
    with evaluation_mode(model), _differentiable_from_the_embedding(model), LayerCapture(model, layers) as capture:
        for batch in batches:
            capture.clear()
            value = objective(scoring.model_logits(model, batch), batch)
            hidden = capture.require()
            for layer, gradient in zip(hidden, torch.autograd.grad(value, list(hidden.values())), strict=True):
                rows = gradient.flatten(0, 1)
                if positions is not None:
                    rows = rows.index_select(0, positions(batch).to(rows.device))
                total[layer] = total.get(layer, 0.0) + rows.cpu().double().sum(dim=0)
        capture.clear()
    return total


@contextmanager
def _differentiable_from_the_embedding(model: nn.Module) -> Iterator[None]:
    """Let the graph begin at the token embedding, also when every parameter is frozen."""

    def require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_(True)

    handle = pretrained_model(model).get_input_embeddings().register_forward_hook(require_grad)
    try:
        yield
    finally:
        handle.remove()


def measure_effects(
    features: FeatureSet,
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    target: str,
    **options: Any,
) -> FeatureSet:
    """The same FeatureSet with `effects` = decoder . g for the rows of language `target`: the change of the mean
    log-probability of its tokens per unit of the decoder direction. `options` are those of `effect_gradients`."""
    features.check_model(model)
    layers = list(features.select(language=target).layers)
    gradients = effect_gradients(model, tokenizer, texts, target, layers, **options)
    measured = dict(features.layers)
    for layer in layers:
        rows = features.layers[layer]
        own = torch.tensor([label == target for label in rows.labels])
        effects = (rows.decoder.double() @ gradients[layer]).float()
        if not bool(effects.isfinite().all()):
            raise UserValueError(f"Layer {layer}: the gradient of log P({target}) is not finite.")
        measured[layer] = replace(rows, effects=torch.where(own, effects, rows.effects))
    return replace(features, layers=measured)


@dataclass(frozen=True)
class CausalEffect:
    """Effect of one intervention on one direction."""

    layer: int
    kind: str  # `feature`, `control` (a random feature or direction) or `difference of means`
    name: str
    intervention: str  # `project out`, `subtract` or `add`
    strength: float  # For subtract and add: length of the shift in units of the layer's median residual norm
    probability: float  # Mean P(target tokens) under the intervention
    probability_change: Interval  # Relative change, with a bootstrap interval over texts, paired with and without
    perplexity_change: Interval


@dataclass(frozen=True)
class CausalReport:
    """All interventions for one target language."""

    target: str
    languages: tuple[str, ...]  # Languages of the texts
    texts: int
    base_probability: float
    base_perplexity: float
    effects: tuple[CausalEffect, ...]

    def of(self, kind: str, layer: int, intervention: str, strength: float | None = None) -> list[CausalEffect]:
        """The effects of one kind of direction in one layer."""
        same = (e for e in self.effects if (e.kind, e.layer, e.intervention) == (kind, layer, intervention))
        return [effect for effect in same if strength is None or effect.strength == strength]

    def beyond_controls(self, effect: CausalEffect) -> bool:
        """Whether taking the direction away lowers P(target), or adding it raises it: clearly, with the whole interval
        on that side of 0, and more than each control under the same intervention."""
        sign = 1 if effect.intervention == ADD else -1
        change = effect.probability_change
        clear = change.low > 0 if sign > 0 else change.high < 0
        controls = self.of(CONTROL, effect.layer, effect.intervention, effect.strength)
        return clear and all(sign * change.estimate > sign * other.probability_change.estimate for other in controls)

    def to_table(self) -> Table:
        """Changes in percent; controls in one line, with the range over them in place of the interval."""
        rows: list[list[Cell]] = []
        for key in dict.fromkeys((e.layer, e.intervention, e.strength) for e in self.effects):
            same = [e for e in self.effects if (e.layer, e.intervention, e.strength) == key]
            shown: list[tuple[str, Sequence[CausalEffect], bool | None]] = [
                (e.name, [e], self.beyond_controls(e)) for e in same if e.kind != CONTROL
            ]
            drawn = [effect for effect in same if effect.kind == CONTROL]
            if drawn:
                kind = drawn[0].name.split(" #")[0].rstrip("0123456789 ")
                shown.append((f"{kind} ({len(drawn)}): mean, range", drawn, None))
            layer, intervention, strength = key
            for name, effects, beyond in shown:
                cells = _change_cells([e.probability_change for e in effects])
                cells += _change_cells([e.perplexity_change for e in effects])
                shown_strength = None if intervention == PROJECT_OUT else strength
                rows.append([layer, intervention, shown_strength, name, *cells, beyond])
        return Table(
            title=f"Causal check for {self.target}: P({self.target} tokens) = {self.base_probability:.3g} and "
            f"perplexity {self.base_perplexity:.4g} on {self.texts} texts in {', '.join(self.languages)}",
            columns=["layer", "intervention", "strength", "direction", "P, %", "95 %", "ppl, %", "ppl 95 %",
                     "beyond controls"],
            rows=rows,
            caption="Relative changes against no intervention, with bootstrap intervals over texts; for the controls "
            "their mean and range. Strength: length of the shift in median residual norms.",
        )  # fmt: skip


def causal_check(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    features: FeatureSet,
    target: str,
    *,
    controls: Mapping[int, Mapping[str, Tensor]] | None = None,
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
    shift has the same norm. Controls are the directions in `controls`, such as {layer: {"random #7": [d_model]}}, and
    in layers that it lacks `random_count` random directions. Forwards only: nothing is generated.
    `scoring.contrast_sample` chooses the texts to read and takes `options`.
    """
    features.check_model(model)
    chosen = features.select(language=target)
    if not strengths or any(not strength > 0 for strength in strengths):
        raise UserValueError(f"strengths must be positive, got {list(strengths)}.")
    if random_count < 1:
        raise UserValueError(f"random_count must be at least 1, got {random_count}.")
    sample = scoring.contrast_sample(model, tokenizer, texts, target, texts_per_language=texts_per_language, **options)
    trials = []
    for layer, rows in chosen.layers.items():
        number, drawn = features.language_index(target), (controls or {}).get(layer)
        for kind, name, direction in _directions(rows, number, drawn, random_count, seed + layer):
            taken = Steering(direction, (layer,), mode="project_out")
            trials.append((layer, kind, name, PROJECT_OUT, 1.0, taken))
            for strength in strengths:
                for intervention, sign in ((SUBTRACT, -1), (ADD, 1)):
                    length = sign * strength * rows.residual_median_norm
                    pushed = Steering(direction, (layer,), length, mode="add", unit="norm")
                    trials.append((layer, kind, name, intervention, strength, pushed))
    effects = []
    with evaluation_mode(model):
        base = scoring.score_sample(model, sample)
        shown = progress(trials, description=f"causal check for {target}", enabled=show_progress)
        for layer, kind, name, intervention, strength, steering in shown:
            with steer(model, steering):
                scores = scoring.score_sample(model, sample)
            measured = (scores.mean_probability, *_changes(base, scores, seed))
            effects.append(CausalEffect(layer, kind, name, intervention, strength, *measured))
    return CausalReport(
        target, sample.languages, len(base.tokens), base.mean_probability, base.perplexity, tuple(effects)
    )


def _directions(
    rows: LayerFeatures, target: int, drawn: Mapping[str, Tensor] | None, random_count: int, seed: int
) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, name, direction) of everything that is tried in one layer; `target` is the language's number."""
    for name, direction in zip(rows.names, rows.decoder, strict=True):
        yield FEATURE, name, direction
    found = dose_curve.controls(rows.mean_residual, target, random_count, seed)
    if MEANS in found:
        yield MEANS, MEANS, found[MEANS][0]
    for name, direction in (drawn or {f"random direction {i + 1}": row for i, row in enumerate(found[RANDOM])}).items():
        yield CONTROL, name, direction


def _changes(base: TextScores, scores: TextScores, seed: int) -> tuple[Interval, Interval]:
    """Relative changes of mean P(target) and of perplexity, with intervals over the same draws of texts."""
    sums = torch.stack([scores.probability, base.probability, scores.loss - base.loss, base.tokens], dim=1).numpy()
    return (
        bootstrap_of_sums(sums, lambda s: s[..., 0] / s[..., 1] - 1, RESAMPLES, seed=seed),
        bootstrap_of_sums(sums, lambda s: np.expm1(s[..., 2] / s[..., 3]), RESAMPLES, seed=seed),
    )


def _change_cells(changes: Sequence[Interval]) -> list[Cell]:
    """A change with its interval, or the mean of several with their range, in percent."""
    values = [change.estimate for change in changes]
    low, high = changes[0][1:] if len(changes) == 1 else (min(values), max(values))
    return [100 * (sum(values) / len(values)), f"{100 * low:+.3g} .. {100 * high:+.3g}"]
