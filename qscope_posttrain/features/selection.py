"""Choose features and directions: pure functions of the statistics of a pass."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from qscope_posttrain.errors import UserValueError


def monolinguality(mean_activation: Tensor) -> Tensor:
    """nu_s^L = mu_s^L - mean over the other languages I of mu_s^I, for all features s and languages L at once.

    mu_s^L is the mean post-activation over the tokens of language L; the languages in the second term count alike,
    whatever their number of tokens (SASFT, arXiv 2507.14894, equation 7).

    Args:
        mean_activation: [L, features], at least two languages.

    Returns:
        [L, features]
    """
    if mean_activation.dim() != 2 or len(mean_activation) < 2:
        raise UserValueError(
            "Monolinguality compares languages: expected mean activations [languages, features] of at least two "
            f"languages, got {list(mean_activation.shape)}."
        )
    others = (mean_activation.sum(dim=0) - mean_activation) / (len(mean_activation) - 1)
    return mean_activation - others


def top_features(scores: Tensor, top: int) -> Tensor:
    """Ids of the `top` highest of `scores` [features], best first; equal scores in the order of their ids."""
    if not 1 <= top <= len(scores):
        raise UserValueError(f"top must lie between 1 and the {len(scores)} features of the SAE, got {top}.")
    return scores.sort(descending=True, stable=True).indices[:top]


def random_features(
    firing_rate: Tensor,
    scores: Tensor,
    count: int,
    seed: int = 0,
    *,
    exclude: Collection[int] = (),
    min_firing_rate: float = 0.005,
    max_relative_score: float = 0.05,
) -> Tensor:
    """Ids of `count` random features that fire but do not depend on the language: the control group.

    Eligible are features that fire on more than `min_firing_rate` of the tokens (mean over languages) and whose
    |score| is below `max_relative_score` times the highest score.

    Args:
        firing_rate: [L, features]
        scores: [features], for the target language.
        exclude: ids that must not be drawn.
    """
    eligible = (firing_rate.mean(dim=0) > min_firing_rate) & (scores.abs() < max_relative_score * scores.max())
    eligible[list(exclude)] = False
    ids = eligible.nonzero().squeeze(1)
    if len(ids) < count:
        raise UserValueError(
            f"Only {len(ids)} features fire on more than {min_firing_rate:g} of the tokens with a score below "
            f"{max_relative_score:g} of the best; {count} random features were requested. Request fewer, or relax "
            "min_firing_rate or max_relative_score."
        )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return ids[order[:count]]


def difference_of_means(mean_residual: Tensor, target: int) -> Tensor:
    """[d_model]: the target's row of `mean_residual` [L, d_model] minus the unweighted mean of the other rows."""
    return monolinguality(mean_residual)[target]
