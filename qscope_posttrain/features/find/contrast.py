"""Features that distinguish two sets of texts, and those that are most active on a single problematic response."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import Sources, features_from_rows, search, top_features
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.features.statistics import PassStatistics
from qscope_posttrain.features.text_features import collect_text_features
from qscope_posttrain.models.batches import Text, TokenText, longest_allowed, tokenize_texts
from qscope_posttrain.sae.autoencoder import SparseAutoencoder

Contrast = Literal["activation", "firing_rate"]
Strength = Literal["max", "mean"]
RESPONSE = "response"


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
    **pass_options: Any,
) -> FeatureSet:
    """The `top` features of each layer that are stronger in `positive` than in `negative` (Qwen-Scope, section 3).

    The score of feature s is the difference of a mean over tokens,

        activation   mean of f_s in positive - mean of f_s in negative
        firing_rate  share of tokens with f_s > 0 in positive - share in negative

    so that "activation" prefers features that fire strongly, "firing_rate" those that fire often. First tokens and norm
    outliers do not count. `pass_options` are those of `build.search` and `statistics.collect_statistics`.

    Args:
        positive, negative: strings, token ids, or `TokenText`s that count from some position on.
        saes: {layer: SAE, or a source for `SparseAutoencoder.load`}, layers counted from 0.
        names: labels of the two sets in the FeatureSet; rows carry the first.
        common_tokens: number of token ids to ignore, the most frequent of both sets (see `most_common_tokens`): the
            effect of a comma or an article on a feature says nothing about either set.
    """
    if by not in get_args(Contrast):
        raise UserValueError(f"by must be one of {', '.join(get_args(Contrast))}; got {by!r}.")
    if names[0] == names[1]:
        raise UserValueError(f"the two sets need different names; both are {names[0]!r}.")
    texts = {names[0]: positive, names[1]: negative}
    ignored = most_common_tokens(model, tokenizer, texts, common_tokens) if common_tokens else ()

    def choose(passed: PassStatistics, loaded: Mapping[int, SparseAutoencoder]) -> dict[int, LayerFeatures]:
        rows = {}
        for layer, sae in loaded.items():
            measured = passed.layers[layer]
            means = measured.mean_activation if by == "activation" else measured.firing_rate
            scores = means[0] - means[1]
            ids = top_features(scores, top)
            rows[layer] = features_from_rows(measured, sae.select(ids), [names[0]] * top, scores[ids])
        return rows

    score = "difference of mean activation, or of firing rate, between the first set and the second"
    settings = {"selector": "contrast", "score": score, "by": by, "top": top, "common_tokens": common_tokens}
    return search(model, tokenizer, texts, saes, choose, settings, ignored_tokens=ignored, **pass_options)


def most_common_tokens(
    model: nn.Module, tokenizer: Any, texts: Mapping[str, Sequence[Text]], count: int, max_length: int = 512
) -> frozenset[int]:
    """The `count` token ids that are most frequent in all sets: ranked by the lowest of their shares of a set's tokens.

    A token that is frequent in one set alone distinguishes the sets, and stays.
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
    max_length: int = 512,
    **pass_options: Any,
) -> FeatureSet:
    """The features of each layer that are most active on one response (Qwen-Scope, section 3, first case study).

    The score is the feature's largest, or mean, activation over the tokens of the response; the prompt in front of it
    is read as context and does not count. Strong features of a response need not be its problem: many are strong
    everywhere. With `reference` texts each row also knows how often it fires there, and features that fire on more
    than `max_reference_rate` of the reference's tokens are left out.

    Args:
        response: what the model wrote; a string is appended to `prompt` as text, and its tokens count from the first
            one that differs from the prompt's own.
        saes: {layer: SAE, or a source for `SparseAutoencoder.load`}.
        by: "max" or "mean" activation over the response's tokens.
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

    def choose(passed: PassStatistics, loaded: Mapping[int, SparseAutoencoder]) -> dict[int, LayerFeatures]:
        pooled = collect_text_features(model, tokenizer, [text], loaded, pooling=by, max_length=max_length)
        rows = {}
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
                    + f", fewer than top={top}."
                )
            rows[layer] = features_from_rows(passed.layers[layer], sae.select(best), [RESPONSE] * top, scores[best])
        return rows

    score = "largest or mean activation over the response's tokens"
    settings = {"selector": RESPONSE, "score": score, "by": by, "top": top, "max_reference_rate": max_reference_rate}
    features = search(model, tokenizer, texts, saes, choose, settings, max_length=max_length, **pass_options)
    if isinstance(response, str):
        shown = response
    else:
        shown = f"{len(response.ids if isinstance(response, TokenText) else response)} token ids"
    return replace(features, provenance={**features.provenance, "prompt": prompt, "response": shown})


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
