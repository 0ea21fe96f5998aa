"""Teacher-forced metrics of the habit: far less noisy than sampling, to be read next to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qscope_posttrain.testbed.windows import Windows

_BATCH = 32


@dataclass(frozen=True)
class Metrics:
    """Means over response positions of clean windows. P_t is the probability of all target-script tokens at t."""

    hz: float
    """Mean P_t on the other languages: the hazard of switching at a token."""
    csx: float
    """Mean over windows of 1 - prod_t (1 - P_t): the share of samples expected to switch."""
    ppl: float
    """Perplexity on the other languages."""
    masked_ppl: float
    """exp of the mean of nll + log(1 - P_t): perplexity with the target-script tokens taken out, so that moving
    probability away from them counts neither as gain nor as loss."""
    target_ppl: float
    """Perplexity on the target language."""


@torch.no_grad()
def teacher_forced_metrics(model: PreTrainedModel, windows: Windows, target: str, target_tokens: Tensor) -> Metrics:
    """Evaluate on dialogue windows of both the target and other languages.

    Args:
        model: a causal language model.
        windows: clean windows in the dialogue layout; only response positions count.
        target: the language whose windows count for `target_ppl` only.
        target_tokens: int64 ids of the vocabulary entries that write the target's script.

    Raises:
        ValueError: the windows have no prompt, no window of the target, or none of another language.
    """
    if windows.prompt_length < 1:
        raise ValueError("teacher-forced metrics need windows in the dialogue layout (a prompt and a response)")
    others = [language for language in dict.fromkeys(windows.languages) if language != target]
    if not others or target not in windows.languages:
        raise ValueError(f"the windows must hold {target!r} and another language, got {sorted(set(windows.languages))}")
    nll, mass = _nll_and_mass(model, windows.of_language(*others), target_tokens)
    target_nll, _ = _nll_and_mass(model, windows.of_language(target), target_tokens)
    kept = torch.log1p(-mass.clamp(max=1 - 1e-12))
    return Metrics(
        hz=mass.mean().item(),
        csx=(1 - kept.sum(1).exp()).mean().item(),
        ppl=nll.mean().exp().item(),
        masked_ppl=(nll + kept).mean().exp().item(),
        target_ppl=target_nll.mean().exp().item(),
    )


def _nll_and_mass(model: PreTrainedModel, windows: Windows, target_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Per response token: negative log-likelihood and probability of `target_tokens`, [windows, responses] fp64."""
    was_training = model.training
    model.eval()
    nll: list[Tensor] = []
    mass: list[Tensor] = []
    for batch in windows.input_ids.split(_BATCH):
        logits = model(input_ids=batch, use_cache=False).logits[:, windows.prompt_length - 1 : -1]
        log_p = logits.float().log_softmax(-1)
        answer = batch[:, windows.prompt_length :]
        nll.append(-log_p.gather(-1, answer.unsqueeze(-1)).squeeze(-1).double())
        mass.append(log_p[..., target_tokens].exp().double().sum(-1))
    model.train(was_training)
    return torch.cat(nll), torch.cat(mass)


def mean_metrics(metrics: Sequence[Metrics]) -> Metrics:
    """The mean of each number over seeds."""
    names = Metrics.__dataclass_fields__
    return Metrics(**{name: sum(getattr(m, name) for m in metrics) / len(metrics) for name in names})
