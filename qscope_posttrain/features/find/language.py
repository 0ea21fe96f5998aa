"""From a model, its SAEs and text to a FeatureSet: the language features of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.build import (
    Sources,
    feature_set_from,
    features_from_rows,
    monolinguality,
    random_layer_features,
    search,
    top_features,
)
from qscope_posttrain.features.causal import causal_check, measure_effects
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.features.layer_features import LayerFeatures
from qscope_posttrain.features.statistics import LayerStatistics, PassStatistics
from qscope_posttrain.models.batches import check_texts
from qscope_posttrain.models.layers import check_layers
from qscope_posttrain.models.scoring import contrast_sample
from qscope_posttrain.report.progress import status
from qscope_posttrain.sae.autoencoder import SparseAutoencoder
from qscope_posttrain.text.language_labels import language_hint

CHECKED_LAYERS = 2
"""By default the causal check covers the two deepest layers, the ones that SASFT trains on."""
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

    The FeatureSet holds, per layer, the rows grouped by language (best first) and the exact mean and covariance of
    their encoder and decoder readouts in every language.

    With a `target`, the effect of its rows on log P(target's tokens) is measured as well (one forward and backward
    pass over a sample), and with `causal` its directions are ablated and added in `causal_layers`, next to random
    features and the difference of means. That table is kept in `provenance["causal_check"]`, in the form of
    `report.tables.Table.to_dict`; `causal.causal_check` gives it as an object.

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
    control_rows: dict[int, LayerFeatures] = {}

    def choose(passed: PassStatistics, loaded: Mapping[int, SparseAutoencoder]) -> dict[int, LayerFeatures]:
        rows = {layer: _language_rows(passed.layers[layer], sae, languages, top) for layer, sae in loaded.items()}
        for layer in set(checked) & set(loaded):  # random features are drawn while their SAE is in memory
            best = rows[layer].take([languages.index(str(target)) * top] * controls)
            try:
                drawn = random_layer_features(passed.layers[layer], loaded[layer], best, languages, seed)
                control_rows[layer] = drawn
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
    options |= {"random_count": controls, "seed": seed}
    options["controls"] = replace(features, layers=control_rows) if control_rows else None
    chosen = features.select(language=target, layers=checked)
    report = causal_check(model, tokenizer, texts, chosen, target, **options)
    return replace(features, provenance={**features.provenance, "causal_check": report.to_table().to_dict()})


def language_feature_set(
    statistics: PassStatistics, saes: Mapping[int, SparseAutoencoder], *, top: int = 2
) -> FeatureSet:
    """The FeatureSet of `find_language_features`, from a pass that is already there; effects are not measured."""
    layers = {
        layer: _language_rows(statistics.layers[layer], sae, statistics.languages, top) for layer, sae in saes.items()
    }
    sources = {layer: sae.source for layer, sae in saes.items()}
    return feature_set_from(statistics, layers, {"selector": "monolinguality", "score": SCORE, "top": top}, sources)


def _language_rows(
    statistics: LayerStatistics, sae: SparseAutoencoder, languages: Sequence[str], top: int
) -> LayerFeatures:
    """The `top` features of each language in one layer, grouped by language in the order given, best first."""
    scores = monolinguality(statistics.mean_activation)
    ids = torch.stack([top_features(scores[i], top) for i in range(len(languages))])
    labels = [language for language in languages for _ in range(top)]
    return features_from_rows(statistics, sae.select(ids.flatten()), labels, scores.gather(1, ids).flatten())
