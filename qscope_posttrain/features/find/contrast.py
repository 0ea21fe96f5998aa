"""Features that tell two sets of texts apart, and those that a single problematic response rests on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import feature_set_from, features_from_rows
from qscope_posttrain.features.feature_set import CONTRAST, RESPONSE, FeatureSet
from qscope_posttrain.features.find.language import load_sae
from qscope_posttrain.features.selection import top_features
from qscope_posttrain.features.statistics import LayerStatistics, collect_statistics
from qscope_posttrain.features.text_features import collect_text_features
from qscope_posttrain.models.batches import Text, TokenText, longest_allowed, tokenize_texts
from qscope_posttrain.models.layers import check_layers
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

Contrast = Literal["activation", "firing_rate"]
Strength = Literal["max", "mean"]

Sources = Mapping[int, SparseAutoencoder | str | Path]


def find_contrastive_features(
    model: nn.Module,
    tokenizer: Any,
    positive: Sequence[Text],
    negative: Sequence[Text],
    saes: Sources,
    *,
    top: int = 5,
    by: Contrast = "activation",
    names: tuple[str, str] = ("positive", "negative"),
    common_tokens: int = 0,
    k: int | None = None,
    **statistics_options: Any,
) -> FeatureSet:
    """The `top` features of each layer that are stronger in `positive` than in `negative` (Qwen-Scope, section 3).

    The score of feature s is the difference of a mean over tokens,

        activation   mean of f_s in positive - mean of f_s in negative
        firing_rate  share of tokens with f_s > 0 in positive - share in negative

    so that "activation" prefers features that fire strongly, "firing_rate" those that fire often. First tokens and norm
    outliers do not count (see `statistics.collect_statistics`, which takes `statistics_options`).

    Args:
        positive, negative: strings, token ids, or `TokenText`s that count from some position on.
        saes: {layer: SAE, or a source for `SparseAutoencoder.load`}, layers counted from 0.
        names: labels of the two sets in the FeatureSet; rows carry the first.
        common_tokens: so many token ids, the most frequent of both sets (see `most_common_tokens`), do not count:
            what a comma or an article does to a feature says nothing about either set.
        k: of TopK, for sources that do not say it.

    Raises:
        ValueError: an empty set, an unknown contrast, equal names, an SAE that does not fit, `top` out of range.
    """
    if by not in get_args(Contrast):
        raise UserValueError(f"by must be one of {', '.join(get_args(Contrast))}; got {by!r}.")
    if names[0] == names[1]:
        raise UserValueError(f"the two sets need different names; both are {names[0]!r}.")
    texts = {names[0]: positive, names[1]: negative}
    ignored = most_common_tokens(model, tokenizer, texts, common_tokens) if common_tokens else ()
    loaded = {layer: load_sae(saes[layer], layer, k, model) for layer in check_layers(model, sorted(saes))}
    passed = collect_statistics(model, tokenizer, texts, loaded, ignored_tokens=ignored, **statistics_options)
    layers, sources = {}, {}
    for layer, sae in loaded.items():
        scores = contrast_scores(passed.layers[layer], by)
        ids = top_features(scores, top)
        labels = [names[0]] * top
        rows = [f"{names[0]} #{feature}" for feature in ids.tolist()]
        layers[layer] = features_from_rows(passed.layers[layer], sae.select(ids), labels, rows, scores[ids])
        sources[layer] = sae.source
    settings = {"selector": CONTRAST, "by": by, "top": top, "common_tokens": common_tokens}
    return feature_set_from(passed, layers, settings, sources)


def contrast_scores(statistics: LayerStatistics, by: Contrast) -> Tensor:
    """[d_sae] fp64: the first set's mean activation, or firing rate, minus the second's."""
    means = statistics.mean_activation if by == "activation" else statistics.firing_rate
    return means[0] - means[1]


def most_common_tokens(
    model: nn.Module, tokenizer: Any, texts: Mapping[str, Sequence[Text]], count: int, max_length: int = 512
) -> frozenset[int]:
    """The `count` token ids that are most frequent in all sets: ranked by the lowest of their shares of a set's tokens.

    A token that is frequent in one set alone tells the sets apart, and stays.
    """
    if count < 0:
        raise UserValueError(f"common_tokens must be 0 or more; got {count}.")
    shares: list[dict[int, float]] = []
    sequences = tokenize_texts(tokenizer, texts, longest_allowed(model, max_length))
    for index in range(len(texts)):
        found = Counter(
            token for sequence in sequences if sequence.language == index for token in sequence.ids[sequence.start :]
        )
        total = found.total()
        shares.append({token: number / total for token, number in found.items()})
    shared = set(shares[0]).intersection(*shares[1:])
    ranked = sorted(shared, key=lambda token: (-min(share[token] for share in shares), token))
    return frozenset(ranked[:count])


def rank_response_features(
    model: nn.Module,
    tokenizer: Any,
    response: Text,
    saes: Sources,
    *,
    prompt: str = "",
    reference: Sequence[Text] = (),
    max_reference_rate: float = 1.0,
    by: Strength = "max",
    top: int = 10,
    k: int | None = None,
    max_length: int = 512,
    **statistics_options: Any,
) -> FeatureSet:
    """The features of each layer that are most active on one response (Qwen-Scope, section 3, first case study).

    The score is the feature's largest, or mean, activation over the tokens of the response; the prompt in front of it
    is read as context and does not count. Strong features of a response need not be its problem: many are strong
    everywhere. With `reference` texts each row also knows how often it fires there, and features that fire on more
    than `max_reference_rate` of the reference's tokens are passed over.

    Args:
        response: what the model wrote; a string is appended to `prompt` as text, and its tokens count from the first
            one that differs from the prompt's own.
        saes: {layer: SAE, or a source for `SparseAutoencoder.load`}.
        by: "max" or "mean" activation over the response's tokens.

    Raises:
        ValueError: an empty response, a rate outside 0..1, fewer than `top` features left.
    """
    if by not in get_args(Strength):
        raise UserValueError(f"by must be one of {', '.join(get_args(Strength))}; got {by!r}.")
    if not 0 < max_reference_rate <= 1:
        raise UserValueError(f"max_reference_rate is a share above 0 and up to 1; got {max_reference_rate}.")
    if max_reference_rate < 1 and not reference:
        raise UserValueError("max_reference_rate needs reference texts, in which the rate is measured.")
    text = _response_text(tokenizer, prompt, response)
    texts: dict[str, Sequence[Text]] = {RESPONSE: [text]}
    if reference:
        texts["reference"] = reference
    loaded = {layer: load_sae(saes[layer], layer, k, model) for layer in check_layers(model, sorted(saes))}
    passed = collect_statistics(model, tokenizer, texts, loaded, max_length=max_length, **statistics_options)
    pooled = collect_text_features(model, tokenizer, [text], loaded, pooling=by, max_length=max_length)
    layers, sources = {}, {}
    for layer, sae in loaded.items():
        scores = torch.zeros(sae.d_sae, dtype=torch.float64)
        ids, values = pooled[layer].row(0)
        scores[ids.long()] = values.double()
        if reference:
            scores[passed.layers[layer].firing_rate[1] > max_reference_rate] = -math.inf
        best = top_features(scores, top)
        if not float(scores[best[-1]]) > 0:
            left = int((scores > 0).sum())
            raise UserValueError(
                f"Layer {layer}: only {left} features fire on the response"
                + (f" and on at most {max_reference_rate:g} of the reference's tokens" if reference else "")
                + f", but top={top} were asked for."
            )
        rows = [f"{RESPONSE} #{feature}" for feature in best.tolist()]
        layers[layer] = features_from_rows(passed.layers[layer], sae.select(best), [RESPONSE] * top, rows, scores[best])
        sources[layer] = sae.source
    settings = {"selector": RESPONSE, "by": by, "top": top, "max_reference_rate": max_reference_rate}
    features = feature_set_from(passed, layers, settings, sources)
    return replace(features, provenance={**features.provenance, "prompt": prompt, "response": _shown(response)})


def _response_text(tokenizer: Any, prompt: str, response: Text) -> Text:
    """Prompt and response as one text whose prompt does not count."""
    if isinstance(response, str):
        if not response.strip():
            raise UserValueError("The response is empty: there is nothing to rank features on.")
        if not prompt:
            return response
        ids, before = (tuple(tokenizer(part, verbose=False)["input_ids"]) for part in (prompt + response, prompt))
        # The last token of the prompt may have merged with the first of the response; an end token may follow both.
        start = next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), len(before))
        return TokenText(ids, max(1, min(start, len(ids) - 1)))
    if prompt:
        raise UserValueError("Give a prompt as text together with a response as text, or one TokenText with its start.")
    return response


def _shown(response: Text) -> str:
    if isinstance(response, str):
        return response
    return f"{len(response.ids if isinstance(response, TokenText) else response)} token ids"
