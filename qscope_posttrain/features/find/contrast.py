"""Features that are stronger in some texts: of each language, of one set against another, of one response."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import Sources, best_rows, monolinguality, random_features, search
from qscope_posttrain.features.causal import causal_check, measure_effects
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.features.statistics import LayerStatistics, PassStatistics
from qscope_posttrain.features.text_features import collect_text_features
from qscope_posttrain.models.batches import Text, TokenText, check_texts, longest_allowed, tokenize_texts
from qscope_posttrain.models.layers import check_layers
from qscope_posttrain.models.scoring import contrast_sample
from qscope_posttrain.report.progress import status
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.text.scripts import language_hint

Contrast = Literal["activation", "firing_rate"]
Strength = Literal["max", "mean"]
RESPONSE = "response"
CHECKED_LAYERS = 2  # By default the causal check covers the two deepest layers, the ones that SASFT trains on
SCORE = "monolinguality"


def find_language_features(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    saes: Sources,
    *,
    top: int = 2,
    target: str | None = None,
    target_tokens: Tensor | None = None,
    causal: bool = True,
    causal_layers: Sequence[int] | None = None,
    controls: int = 5,
    seed: int = 0,
    show_progress: bool | None = None,
    **pass_options: Any,
) -> FeatureSet:
    """Find the `top` features of every language in every layer, by monolinguality, in one pass over the texts.

    Per layer the rows are grouped by language, best first. With a `target`, the effect of its rows on log P(target's
    tokens) is measured as well (one forward and backward pass over a sample), and with `causal` its directions are
    ablated and added in `causal_layers`, next to random features and the difference of means: see
    `provenance["causal_check"]`, a `Table.to_dict`.

    Memory: the second moments behind the covariances take languages * d_model^2 * 8 bytes per layer, 0.7 GiB for 5
    languages at width 4096. `saes_at_once` bounds them and the SAEs in memory; `second_moments=False` does without.

    Args:
        model (nn.Module): Causal language model of transformers.
        tokenizer (PreTrainedTokenizerBase): Its tokenizer.
        texts (dict of str to sequence of str): {language: texts}, at least two languages.
        saes (dict of int to SparseAutoencoder or path): {layer: SAE, or a source for `SparseAutoencoder.load`}, layers
            counted from 0.
        top (int, default 2): Number of features per language and layer.
        target (str, default None): Language whose features are measured for their effect; None measures none.
        target_tokens (Tensor, default None): Ids that count as the target's tokens; None: those that write its script.
        causal (bool, default True): Run the causal check, where there is a target.
        causal_layers (sequence of int, default None): Layers of that check; None: the two deepest in `saes`.
        controls (int, default 5): Number of random features in it.
        seed (int, default 0): Of the random features and the bootstrap.
        show_progress (bool, default None): Show progress bars; None: on a terminal.
        pass_options: `k`, `saes_at_once` and `checkpoint` of `build.search`, and the options of
            `statistics.collect_statistics`.

    Raises:
        ValueError: fewer than two languages, an unknown target, no layer, an SAE that does not fit the model.

    Example:
        >>> found = qp.find_language_features(model, tokenizer, texts, saes, top=2, target="zh", causal=False)
        >>> found.languages
        ('en', 'fr', 'zh', 'ru', 'ko')
        >>> len(found.select("zh"))  # two features in each of two layers
        4
    """
    languages = check_texts(texts)
    if len(languages) < 2:
        raise UserValueError(f"Language features need at least two languages to compare, got {', '.join(languages)}.")
    if target is not None and target not in languages:
        hint = language_hint(target, languages)
        raise UserValueError(f"target {target!r} is not among the languages of texts: {', '.join(languages)}.{hint}")
    layers = check_layers(model, sorted(saes))
    if causal_layers is not None and not set(causal_layers) <= set(layers):
        raise UserValueError(
            f"causal_layers {list(causal_layers)} must be among the layers with an SAE: {list(layers)}."
        )
    if controls < 1:
        raise UserValueError(f"controls must be at least 1, got {controls}; causal=False leaves the check out.")
    if target is not None:
        # Everything that can be wrong with the target must be found before the pass, not after it.
        contrast_sample(model, tokenizer, texts, target, target_tokens=target_tokens)
    checked = tuple(causal_layers) if causal_layers is not None else layers[-CHECKED_LAYERS:]
    checked = checked if causal and target is not None else ()
    drawn: dict[int, dict[str, Tensor]] = {}

    def choose(passed: PassStatistics, loaded: Mapping[int, SparseAutoencoder]) -> dict[int, LayerFeatures]:
        rows = {layer: language_rows(passed.layers[layer], sae, languages, top) for layer, sae in loaded.items()}
        for layer in set(checked) & set(loaded):  # random features are drawn while their SAE is in memory
            measured, number = passed.layers[layer], languages.index(str(target))
            scores, best = monolinguality(measured.mean_activation)[number], int(rows[layer].feature_ids[number * top])
            try:
                ids = random_features(measured.firing_rate, scores, controls, seed, exclude=[best])
                directions = loaded[layer].select(ids).decoder.float().cpu()
                if not directions.norm(dim=1).all():
                    raise UserValueError("A random feature of this SAE has a decoder row of norm 0.")
                drawn[layer] = {f"random #{i}": row for i, row in zip(ids.tolist(), directions, strict=True)}
            except ValueError as error:  # a small SAE may have too few; a long pass must not be lost over it
                status(f"Layer {layer}: random directions are the controls. {error}", enabled=True)
        return rows

    settings = {"selector": "monolinguality", "score": SCORE, "top": top, "target": target, "seed": seed}
    features = search(model, tokenizer, texts, saes, choose, settings, show_progress=show_progress, **pass_options)
    if target is None:
        return features
    options: dict[str, Any] = {"target_tokens": target_tokens, "show_progress": show_progress}
    features = measure_effects(features, model, tokenizer, texts, target, **options)
    if not checked:
        return features
    options |= {"random_count": controls, "seed": seed, "controls": drawn}
    chosen = features.select(language=target, layers=checked)
    report = causal_check(model, tokenizer, texts, chosen, target, **options)
    return replace(features, provenance={**features.provenance, "causal_check": report.to_table().to_dict()})


def language_rows(
    statistics: LayerStatistics, sae: SparseAutoencoder, languages: Sequence[str], top: int
) -> LayerFeatures:
    """The `top` features of every language by monolinguality, grouped by language."""
    scores = monolinguality(statistics.mean_activation)
    return best_rows(statistics, sae, dict(zip(languages, scores, strict=True)), top)


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

    Args:
        by: score of feature s: "activation", mean of f_s over the tokens of positive minus that of negative, prefers
            features that fire strongly; "firing_rate", the same of the share of tokens with f_s > 0, prefers those that
            fire often.
        names: labels of the two sets in the FeatureSet; rows carry the first.
        common_tokens: number of token ids to ignore, the most frequent of both sets (see `most_common_tokens`): the
            effect of a comma or an article on a feature says nothing about either set.
        pass_options: those of `build.search` and `statistics.collect_statistics`.
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
            inside, outside = measured.mean_activation if by == "activation" else measured.firing_rate
            rows[layer] = best_rows(measured, sae, {names[0]: inside - outside}, top)
        return rows

    score = "difference of mean activation, or of firing rate, between the first set and the second"
    settings = {"selector": "contrast", "score": score, "by": by, "top": top, "common_tokens": common_tokens}
    return search(model, tokenizer, texts, saes, choose, settings, ignored_tokens=ignored, **pass_options)


def most_common_tokens(
    model: nn.Module, tokenizer: Any, texts: Mapping[str, Sequence[Text]], count: int, max_length: int = 512
) -> frozenset[int]:
    """The `count` token ids that are most frequent in all sets, ranked by the lowest of their shares of a set's tokens:
    a token that is frequent in one set alone distinguishes the sets."""
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
            scores = torch.from_numpy(pooled[layer].matrix.toarray()[0]).double()
            if reference:
                scores[passed.layers[layer].firing_rate[1] > max_reference_rate] = -math.inf
            if (left := int((scores > 0).sum())) < top:
                raise UserValueError(
                    f"Layer {layer}: only {left} features fire on the response"
                    + (f" and on at most {max_reference_rate:g} of the reference's tokens" if reference else "")
                    + f", fewer than top={top}."
                )
            rows[layer] = best_rows(passed.layers[layer], sae, {RESPONSE: scores}, top)
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
