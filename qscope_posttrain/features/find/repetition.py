"""Features of endless repetition: scored by their rise in loops and by their effect on the loops' probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import Sources, features_from_rows, search, top_features
from qscope_posttrain.features.causal import steering_gradients
from qscope_posttrain.features.dose_curve import CurveSettings
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.find.loops import Loop, LoopCollection, collect_loops, occurrences
from qscope_posttrain.features.find.repetition_curve import LOOP, NORMAL, steering_curve, with_choice
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.features.statistics import PassStatistics
from qscope_posttrain.features.sums import tokens_at_a_time
from qscope_posttrain.kernels.statistics import feature_statistics_
from qscope_posttrain.models.batches import (
    Text,
    TokenBatch,
    TokenSequence,
    input_device,
    longest_allowed,
    token_batches,
)
from qscope_posttrain.models.capture import forward_to_layer
from qscope_posttrain.models.generation import Prompt, encode_prompts
from qscope_posttrain.models.layers import check_layers, evaluation_mode
from qscope_posttrain.models.scoring import predicted_tokens, token_losses
from qscope_posttrain.report.progress import progress
from qscope_posttrain.report.tables import Cell, Table
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

Ranking = Literal["difference", "attribution", "both"]
BENIGN = "benign"
REPETITION = "repetition"  # `settings["selector"]` of these features
DEFAULT_CURVE = CurveSettings()
COPIES = 2  # Repeats whose probability the attribution is about


def find_repetition_features(
    model: nn.Module,
    tokenizer: Any,
    saes: Sources,
    prompts: Sequence[Prompt] | None = None,
    *,
    loops: LoopCollection | None = None,
    benign: Sequence[Text] | None = None,
    top: int = 4,
    rank_by: Ranking = "both",
    curve: CurveSettings | None = DEFAULT_CURVE,
    collect: Mapping[str, Any] | None = None,
    chat: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    show_progress: bool | None = None,
    **pass_options: Any,
) -> FeatureSet:
    """Find the features of endless repetition in every layer, and the direction that makes the model loop by itself.

    1. Loops: given, or sampled on `prompts` (`loops.collect_loops`).
    2. One pass gives firing rates in three classes: "loop" (tokens of the repeated tail from its second copy on),
       "normal" (tokens of completions that ended by themselves) and "benign".
    3. Two scores for every feature: its rise from the first to the last occurrence of a token in the loop
       (`repetition_differences`), stored as `scores`, and the gradient of log P(two more repeats) along its decoder
       row (`repetition_gradients`), stored as `effects`, in nats per unit of the row. The `top` features of each layer
       become rows labeled "loop", best first.
    4. `repetition_curve.steering_curve` tries them against random directions and the difference of means, and chooses
       layer, rows, strength and window. Of the chosen layer only the chosen rows are kept.

    `settings["steering"]` is the result of `SteeringCurve.to_settings`, `specific` false (and a warning) for a choice
    that is not clearly more than random, and absent (with a warning) when nothing makes the model loop. In
    `provenance`: "steering_curve" and "ranking" as `Table.to_dict`, "loops" with their number and rate.

    Args:
        model (nn.Module): Causal language model of transformers.
        tokenizer (PreTrainedTokenizerBase): Its tokenizer.
        saes (dict of int to SparseAutoencoder or path): {layer: SAE, or a source for `SparseAutoencoder.load`}, layers
            counted from 0.
        prompts (sequence, default None): For the curve, and to sample loops on; texts or chats (see
            `models.generation.generate_samples`).
        loops (LoopCollection, default None): Loops that are there already; None samples them.
        benign (sequence, default None): Texts that repeat for a good reason (lists, tables, copied questions): strings
            or token ids.
        top (int, default 4): Number of features per layer.
        rank_by (str, default "both"): "difference", "attribution", or "both" in turn, see
            `rank_features`.
        curve (CurveSettings, default `DEFAULT_CURVE`): Of the steering curve; None leaves it out.
        collect (dict, default None): Further arguments of `collect_loops`. It samples as `curve.sampling` says unless
            `settings` are given.
        chat (bool, default False): Send prompts through the chat template.
        chat_template_options (dict, default None): For the template, e.g. `{"enable_thinking": False}`.
        show_progress (bool, default None): Show progress bars; None: on a terminal.
        pass_options: `k` and `saes_at_once` of `build.search`, and the options of `statistics.collect_statistics`.
            `max_length` is by default that of the longest completion, because a loop is at the end of its text.

    Raises:
        ValueError: neither loops nor prompts, a curve without prompts, no ordinary completion, no layer, an SAE that
            does not fit the model; and what `collect_loops` raises when nothing loops.

    Example:
        >>> collect = {"settings": sampling, "wanted": 4}  # sampling: SamplingSettings
        >>> found = qp.find_repetition_features(
        ...     model, tokenizer, saes, prompts, top=1, rank_by="difference", curve=None, collect=collect
        ... )
        >>> found.languages
        ('loop', 'normal')
    """
    if prompts is None and (loops is None or curve is not None):
        raise UserValueError(
            "Prompts are needed: to sample loops on, where none are given, and for the steering curve."
        )
    templated: dict[str, Any] = {"chat": chat, "chat_template_options": chat_template_options}
    prompt_ids = encode_prompts(tokenizer, prompts, **templated) if prompts is not None else []
    if loops is None:
        options: dict[str, Any] = {"settings": curve.sampling} if curve is not None else {}
        options |= {**templated, "show_progress": show_progress, **(collect or {})}
        loops = collect_loops(model, tokenizer, prompts or [], **options)
    if not loops.loops or not loops.normal:
        raise UserValueError(
            f"Both loops and ordinary completions are needed; there are {len(loops.loops)} and {len(loops.normal)}. "
            "Ordinary ones end by themselves: raise max_new_tokens, or give some."
        )
    texts: dict[str, Sequence[Text]] = {
        LOOP: [loop.text() for loop in loops.loops],
        NORMAL: [entry.text() for entry in loops.normal],
    }
    if benign is not None:
        texts[BENIGN] = benign
    found = loops

    def choose(passed: PassStatistics, loaded: Mapping[int, SparseAutoencoder]) -> dict[int, LayerFeatures]:
        factor = float(passed.settings["outlier_factor"])
        limits = {layer: factor * measured.median_norm for layer, measured in passed.layers.items()}
        rises = repetition_differences(model, found.loops, loaded, limits, show_progress=show_progress)
        gradients = repetition_gradients(model, found.loops, list(loaded), copies=COPIES, show_progress=show_progress)
        rows = {}
        for layer, sae in loaded.items():
            measured = passed.layers[layer]
            fires = measured.firing_rate[passed.languages.index(LOOP)] > 0
            effects = torch.cat([part.cpu().double() @ gradients[layer] for part in sae.W_dec.split(4096)])
            norms = sae.W_dec.float().norm(dim=1).double().cpu()
            ids = rank_features(rises[layer], effects / norms.clamp_min(1e-12), fires, top, rank_by)
            kept = features_from_rows(measured, sae.select(ids), [LOOP] * top, rises[layer][ids])
            rows[layer] = replace(kept, effects=effects[ids].float())
        return rows

    score = "activation at the last occurrence of a token in a loop minus its first"
    settings = {"selector": REPETITION, "score": score, "rank_by": rank_by, "top": top, "loops": dict(loops.settings)}
    longest = max(len(entry.ids) for entry in (*loops.loops, *loops.normal))
    pass_options = {"max_length": longest, "show_progress": show_progress, **pass_options}
    features = search(model, tokenizer, texts, saes, choose, settings, **pass_options)
    described: dict[str, Any] = {"loops": len(loops.loops), "normal": len(loops.normal), "samples": loops.samples}
    described["rate"] = None if loops.rate is None else list(loops.rate)
    described["periods"] = [loop.tail.period for loop in loops.loops]
    ranking = repetition_table(features).to_dict()
    features = replace(features, provenance={**features.provenance, "ranking": ranking, "loops": described})
    if curve is None:
        return features
    made = steering_curve(
        model, tokenizer, prompt_ids, features, curve, periods=loops.periods, show_progress=show_progress
    )
    return with_choice(features, made)


def repetition_table(features: FeatureSet) -> Table:
    """One line per row labeled "loop": both scores and the firing rate in every class."""
    lines: list[list[Cell]] = []
    for layer, rows in features.layers.items():
        for i, label in enumerate(rows.labels):
            if label != LOOP:
                continue
            length = rows.residual_median_norm / float(rows.decoder[i].norm())
            rates = [float(rate) for rate in rows.firing_rate[:, i]]
            lines.append([layer, rows.names[i], float(rows.scores[i]), float(rows.effects[i]) * length, *rates])
    counts = next(iter(features.layers.values())).tokens.tolist()
    tokens = ", ".join(f"{name} {count}" for name, count in zip(features.languages, counts, strict=True))
    return Table(
        title=f"Features of endless repetition in {features.model.get('name_or_path') or features.model['model_type']}",
        columns=["layer", "feature", "rise", "attribution", *(f"fires in {name}" for name in features.languages)],
        rows=lines,
        caption="rise: mean activation at the last occurrence of a token in the loop minus its first one. attribution: "
        f"first-order change of log P({COPIES} more repeats), in nats, for a push of one median residual norm. fires: "
        f"share of tokens (counted: {tokens}).",
    )


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
    `loops.occurrences`:

        score = mean over loops of  mean over the positions of the last copy of  f(last) - f(first)

    so that a short block counts as much as a long one (Qwen-Scope report, section 8.1; the token is the same on both
    sides, so its identity cancels). Only the compared states are encoded, and summed in fp64. A pair with a state whose
    norm exceeds the layer's entry in `norm_limits` is left out.
    """
    layers = check_layers(model, sorted(saes))
    pairs = [occurrences(loop) for loop in loops]
    sequences = _sequences(model, [loop.ids for loop in loops], [1] * len(loops))
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
    With h_t the output of the layer at the positions t that predict a token of these copies:

        g = mean over loops of  sum_t d log P(B ... B | prefix) / d h_t

    so g . v is the first-order effect, in nats per loop, of adding v to those states: of steering from the boundary on.
    The copies gain little once the loop runs, because they are certain already; the entry decides.
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
    """Ids of the `top` features, best first, by `difference` [d_sae] (`repetition_differences`), by `attribution`
    [d_sae] (effect of a step along the unit decoder row), or by "both" in turn: the best by difference, the best by
    attribution, the second best by difference, and so on.

    A feature that does not fire within the loops (`fires` [d_sae]) can still point the right way, but is not what the
    model uses: it is left out.
    """
    if rank_by not in get_args(Ranking):
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


def _sequences(model: nn.Module, ids: Sequence[tuple[int, ...]], starts: Sequence[int]) -> list[TokenSequence]:
    longest = max(map(len, ids))
    if longest_allowed(model, longest) < longest:
        raise UserValueError(f"A loop has {longest} tokens, prompt included: more than the model's positions.")
    pairs = enumerate(zip(ids, starts, strict=True))
    return [TokenSequence(0, number, tokens, False, start) for number, (tokens, start) in pairs]


def _encoded_sum(sae: SparseAutoencoder, states: Tensor, weights: Tensor) -> Tensor:
    """sum over tokens of weight * post-activation, [d_sae] fp64 on the CPU, from `states` [tokens, d_model]."""
    device = torch.device("cpu") if sae.device.type == "mps" else sae.device  # which has no fp64
    total = torch.zeros(1, sae.d_sae, dtype=torch.float64, device=device)
    step = tokens_at_a_time(sae)
    for part, factors in zip(states.to(sae.device, sae.dtype).split(step), weights.to(device).split(step), strict=True):
        values, indices = (tensor.to(device) for tensor in sae.encode(part))
        feature_statistics_(values.double() * factors[:, None], indices, activation_sum=total)
    return total[0].cpu()
