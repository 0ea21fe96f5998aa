"""Scores of SAE features for endless repetition: rise of activation in loops, and effect on their probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import top_features
from qscope_posttrain.features.causal import steering_gradients
from qscope_posttrain.features.find.loops import Loop
from qscope_posttrain.features.sums import tokens_at_a_time
from qscope_posttrain.kernels.statistics import feature_statistics_
from qscope_posttrain.models.batches import (
    TokenBatch,
    TokenSequence,
    input_device,
    longest_allowed,
    token_batches,
)
from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.models.layers import check_layers, evaluation_mode
from qscope_posttrain.models.scoring import predicted_tokens, token_losses
from qscope_posttrain.report.progress import progress
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

Ranking = Literal["difference", "attribution", "both"]


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
    """
    layers = check_layers(model, sorted(saes))
    pairs = [occurrences(loop) for loop in loops]
    sequences = _sequences(model, [loop.ids for loop in loops])
    sums = {layer: torch.zeros(saes[layer].d_sae, dtype=torch.float64) for layer in layers}
    counted = dict.fromkeys(layers, 0)
    batches = token_batches(sequences, tokens_per_batch)
    with evaluation_mode(model):
        for batch in progress(batches, description="first and last occurrences", enabled=show_progress):
            width = batch.input_ids.shape[1]
            flat = [
                (row, row * width + first, row * width + last)
                for row, sequence in enumerate(batch.sequences)
                for first, last in pairs[sequence.text]
            ]
            owners, firsts, lasts = torch.tensor(flat, dtype=torch.long).view(-1, 3).unbind(1)
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

    so g . v is the first-order effect, in nats per loop, of adding v to those states: of steering from the boundary on.
    The copies gain little once the loop runs, because they are certain already; the entry decides. Parameters receive
    no gradient.
    """
    needed = copies + 1
    if copies < 1 or any(loop.tail.copies < needed for loop in loops):
        raise UserValueError(f"{copies} repeats (at least 1) need loops of {needed} whole copies or more.")
    cut = [loop.ids[: len(loop.prompt_ids) + loop.tail.second_copy + copies * loop.tail.period] for loop in loops]
    starts = [len(loop.prompt_ids) + loop.tail.second_copy for loop in loops]
    batches = token_batches(_sequences(model, cut, starts), tokens_per_batch)

    def log_probability(flat: Tensor, batch: TokenBatch) -> Tensor:
        return -token_losses(flat, *predicted_tokens(batch)[:2]).sum()

    shown = progress(batches, description="gradients of the loops", enabled=show_progress)
    total = steering_gradients(model, shown, layers, log_probability, lambda batch: predicted_tokens(batch)[0])
    return {layer: gradient / len(loops) for layer, gradient in total.items()}


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


def _encoded_sum(sae: SparseAutoencoder, states: Tensor, weights: Tensor) -> Tensor:
    """sum over tokens of weight * post-activation, [d_sae] fp64 on the CPU, from `states` [tokens, d_model]."""
    device = torch.device("cpu") if sae.device.type == "mps" else sae.device  # which has no fp64
    total = torch.zeros(1, sae.d_sae, dtype=torch.float64, device=device)
    step = tokens_at_a_time(sae)
    for part, factors in zip(states.to(sae.device, sae.dtype).split(step), weights.to(device).split(step), strict=True):
        values, indices = (tensor.to(device) for tensor in sae.encode(part))
        feature_statistics_(values.double() * factors[:, None], indices, activation_sum=total)
    return total[0].cpu()
