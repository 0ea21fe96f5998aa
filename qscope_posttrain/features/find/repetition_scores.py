"""How much every SAE feature has to do with endless repetition: by its activation, and by its effect on the loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.accumulator import tokens_at_a_time
from qscope_posttrain.features.effects import differentiable_from_the_embedding
from qscope_posttrain.features.find.loops import Loop
from qscope_posttrain.features.selection import top_features
from qscope_posttrain.kernels.statistics import feature_statistics_
from qscope_posttrain.models.batches import (
    TokenBatch,
    TokenSequence,
    input_device,
    longest_allowed,
    token_batches,
)
from qscope_posttrain.models.capture import LayerCapture, forward_to_layer
from qscope_posttrain.models.layers import check_layers, evaluation_mode
from qscope_posttrain.models.scoring import LOGITS_AT_A_TIME, model_logits
from qscope_posttrain.report.progress import progress
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

Ranking = Literal["difference", "attribution", "both"]


@dataclass(frozen=True)
class Occurrence:
    """Two states of a loop that read the same token; positions count from the first token of the prompt."""

    first: int
    """Where the token stands for the first time in the completion"""
    last: int
    """Where it stands for the last time at this place of the repeated block"""


def occurrences(loop: Loop) -> list[Occurrence]:
    """For every position of the last whole copy, that is the last `period` tokens, where its token first occurred.

    The first occurrence anywhere in the completion, before the tail or in its first copy; what the prompt holds does
    not count. A block may hold a token several times: every position counts. The first token of a text has no state
    worth comparing (it serves attention as a sink), so it is skipped, and so is a token that occurs once.
    """
    start = len(loop.prompt_ids)
    first: dict[int, int] = {}
    for position, token in enumerate(loop.completion_ids, start):
        if position > 0:
            first.setdefault(token, position)
    end = start + len(loop.completion_ids)
    pairs = (Occurrence(first[loop.ids[last]], last) for last in range(end - loop.tail.period, end))
    return [pair for pair in pairs if pair.first < pair.last]


@torch.no_grad()
def repetition_differences(
    model: nn.Module,
    loops: Sequence[Loop],
    saes: Mapping[int, SparseAutoencoder],
    norm_limits: Mapping[int, float] | None = None,
    *,
    tokens_per_batch: int = 4096,
    show_progress: bool | None = None,
) -> dict[int, Tensor]:
    """Rise of every feature from the first occurrence of a token to its last one in the loop, {layer: [d_sae] fp64}.

    With f(i) the post-activation of a feature at position i (after TopK or whatever the SAE has) and the pairs of
    `occurrences`:

        score = mean over loops of  mean over the positions of the last copy of  f(last) - f(first)

    so that a short block counts as much as a long one (Qwen-Scope report, section 8.1; the token is the same on both
    sides, so its identity cancels). Only the compared states are encoded, and summed in fp64.

    Args:
        norm_limits: by layer, the norm above which a state is an outlier and its pair is left out; None for no limit.
        tokens_per_batch: tokens in a forward pass, padding included.

    Raises:
        ValueError: no loop, a loop longer than the model's positions, or no pair of states within the limits.
    """
    layers = check_layers(model, sorted(saes))
    pairs = [occurrences(loop) for loop in loops]
    sequences = _sequences(model, [loop.ids for loop in loops])
    sums = {layer: torch.zeros(saes[layer].d_sae, dtype=torch.float64) for layer in layers}
    counted = dict.fromkeys(layers, 0)
    with evaluation_mode(model):
        for batch in progress(
            token_batches(sequences, tokens_per_batch), description="first and last occurrences", enabled=show_progress
        ):
            owners, firsts, lasts = _flat_pairs(batch, pairs)
            hidden = forward_to_layer(model, layers, input_ids=batch.input_ids.to(input_device(model)))
            for layer in layers:
                states = hidden.pop(layer).flatten(0, 1)
                before, after = (states.index_select(0, at.to(states.device)).float() for at in (firsts, lasts))
                limit = float("inf") if norm_limits is None else norm_limits[layer]
                kept = ((before.norm(dim=1) <= limit) & (after.norm(dim=1) <= limit)).cpu()
                per_loop = torch.zeros(len(batch.sequences)).index_add_(0, owners, kept.float())
                weights = torch.where(kept, 1 / per_loop[owners], 0.0).double()
                counted[layer] += int((per_loop > 0).sum())
                sums[layer] += _encoded_sum(saes[layer], after, weights) - _encoded_sum(saes[layer], before, weights)
    empty = [str(layer) for layer in layers if counted[layer] == 0]
    if empty:
        raise UserValueError(
            f"Layer(s) {', '.join(empty)}: no token of {len(loops)} loops could be compared with its first occurrence."
        )
    return {layer: sums[layer] / counted[layer] for layer in layers}


def repetition_gradients(
    model: nn.Module,
    loops: Sequence[Loop],
    layers: Sequence[int],
    *,
    copies: int = 2,
    tokens_per_batch: int = 2048,
    show_progress: bool | None = None,
) -> dict[int, Tensor]:
    """Gradient of log P(`copies` exact repeats) with respect to a constant steering vector, {layer: [d_model] fp64}.

    A loop is cut after its first copy: the prefix. Its block B then follows `copies` times, as it did in the loop.
    With h_t the output of the layer, summed over the positions t that predict a token of these copies (from the last
    token of the prefix on), and averaged over loops:

        g = mean over loops of  sum_t d log P(B ... B | prefix) / d h_t

    so g . v is the first-order effect, in nats a loop, of adding v to those states: of steering from the boundary on.
    What the copies gain once the loop runs is small, because they are certain already; the entry decides. Parameters
    receive no gradient.

    Raises:
        ValueError: no loop, a loop with too few copies, or one longer than the model's positions.
    """
    layers = check_layers(model, layers)
    needed = copies + 1
    if copies < 1 or any(loop.tail.copies < needed for loop in loops):
        raise UserValueError(f"{copies} repeats (at least 1) need loops of {needed} whole copies or more.")
    cut = [loop.ids[: len(loop.prompt_ids) + loop.tail.second_copy + copies * loop.tail.period] for loop in loops]
    starts = [len(loop.prompt_ids) + loop.tail.second_copy for loop in loops]
    total = {layer: torch.zeros(0) for layer in layers}
    sequences = _sequences(model, cut, starts)
    with evaluation_mode(model), differentiable_from_the_embedding(model), LayerCapture(model, layers) as capture:
        for batch in progress(
            token_batches(sequences, tokens_per_batch), description="gradients of the loops", enabled=show_progress
        ):
            capture.clear()
            for layer, gradient in _batch_gradients(model, batch, capture).items():
                total[layer] = total[layer] + gradient if total[layer].numel() else gradient
        capture.clear()
    return {layer: total[layer] / len(loops) for layer in layers}


def rank_features(
    difference: Tensor, attribution: Tensor, fires: Tensor, top: int, rank_by: Ranking = "both"
) -> Tensor:
    """Ids of the `top` features, best first.

    Args:
        difference: [d_sae], see `repetition_differences`.
        attribution: [d_sae] effect of a step along the unit decoder row, see `repetition_gradients`.
        fires: bool [d_sae], whether the feature fires within the loops. One that does not can still point the right
            way, but is not what the model uses: it is left out.
        rank_by: by either, or by both in turn: the best by difference, the best by attribution, the second best by
            difference, and so on.

    Raises:
        ValueError: an unknown ranking, or fewer than `top` features that fire.
    """
    if rank_by not in ("difference", "attribution", "both"):
        raise UserValueError(f'rank_by must be "difference", "attribution" or "both", got {rank_by!r}.')
    alive = int(fires.sum())
    if not 1 <= top <= alive:
        raise UserValueError(f"top must lie between 1 and the {alive} features that fire within the loops, got {top}.")
    lists = [
        top_features(torch.where(fires, scores, -torch.inf), top).tolist()
        for name, scores in (("difference", difference), ("attribution", attribution))
        if rank_by in (name, "both")
    ]
    in_turn = dict.fromkeys(feature for group in zip(*lists, strict=True) for feature in group)
    return torch.tensor(list(in_turn)[:top])


def _sequences(
    model: nn.Module, ids: Sequence[tuple[int, ...]], starts: Sequence[int] | None = None
) -> list[TokenSequence]:
    if not ids:
        raise UserValueError("No loops given; see features.loops.collect_loops.")
    longest = max(map(len, ids))
    if longest_allowed(model, longest) < longest:
        raise UserValueError(f"A loop has {longest} tokens, prompt included: more than the model's positions.")
    return [
        TokenSequence(0, number, tokens, False, 1 if starts is None else starts[number])
        for number, tokens in enumerate(ids)
    ]


def _flat_pairs(batch: TokenBatch, pairs: Sequence[Sequence[Occurrence]]) -> tuple[Tensor, Tensor, Tensor]:
    """(row in the batch, flattened position of the first, of the last occurrence) of all pairs, int64 [pairs]."""
    width = batch.input_ids.shape[1]
    flat = [
        (row, row * width + pair.first, row * width + pair.last)
        for row, sequence in enumerate(batch.sequences)
        for pair in pairs[sequence.text]
    ]
    columns = torch.tensor(flat, dtype=torch.long).view(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


def _encoded_sum(sae: SparseAutoencoder, states: Tensor, weights: Tensor) -> Tensor:
    """sum over tokens of weight * post-activation, [d_sae] fp64 on the CPU, from `states` [tokens, d_model]."""
    device = torch.device("cpu") if sae.device.type == "mps" else sae.device  # which has no fp64
    total = torch.zeros(1, sae.d_sae, dtype=torch.float64, device=device)
    step = tokens_at_a_time(sae)
    for part, factors in zip(states.to(sae.device, sae.dtype).split(step), weights.to(device).split(step), strict=True):
        values, indices = (tensor.to(device) for tensor in sae.encode(part))
        feature_statistics_(values.double() * factors[:, None], indices, activation_sum=total)
    return total[0].cpu()


@torch.enable_grad()
def _batch_gradients(model: nn.Module, batch: TokenBatch, capture: LayerCapture) -> dict[int, Tensor]:
    """d (log P of the tokens that count) / d h, summed over the states that predict them: {layer: [d_model] fp64}."""
    flat = model_logits(model, batch)
    counted = batch.positions()
    targets = batch.input_ids.flatten()[counted]
    predicting = counted - 1
    total = flat.new_zeros((), dtype=torch.float32)
    for at, tokens in _chunks(predicting, targets, flat.shape[1]):
        logits = flat.index_select(0, at.to(flat.device)).float()
        chosen = logits.gather(1, tokens.to(flat.device)[:, None]).squeeze(1)
        total = total + (chosen - logits.logsumexp(dim=1)).sum()
    hidden = capture.require()
    gradients = torch.autograd.grad(total, list(hidden.values()))
    return {
        layer: gradient.flatten(0, 1).index_select(0, predicting.to(gradient.device)).cpu().double().sum(dim=0)
        for layer, gradient in zip(hidden, gradients, strict=True)
    }


def _chunks(positions: Tensor, tokens: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, LOGITS_AT_A_TIME // vocabulary)
    yield from zip(positions.split(size), tokens.split(size), strict=True)
