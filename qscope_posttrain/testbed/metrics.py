"""Teacher-forced metrics of the habit: far less noisy than sampling, to be read next to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qscope_posttrain.errors import UserValueError
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
    entry: float
    """Mean log-probability, in nats, of the first target token where a held-out window really switches. It needs no
    list of tokens: where there is none, exp(entry) relative to another model's is the hazard relative to its hazard."""
    hz_by_language: Mapping[str, float]
    """`hz` of each other language by itself."""


@torch.no_grad()
def teacher_forced_metrics(
    model: PreTrainedModel, windows: Windows, switching: Windows, target: str, target_tokens: Tensor
) -> Metrics:
    """Evaluate on dialogue windows of both the target and other languages.

    Args:
        model: a causal language model.
        windows: clean windows in the dialogue layout; only response positions count.
        switching: windows that switch to the target in their response, for `entry`; others among them are left out.
        target: the language whose windows count for `target_ppl` only.
        target_tokens: int64 ids of the vocabulary entries that betray the target.

    Raises:
        ValueError: the windows have no prompt, no window of the target, or none of another language, or no window
            of `switching` switches.
    """
    if windows.prompt_length < 1:
        raise UserValueError("teacher-forced metrics need windows in the dialogue layout (a prompt and a response)")
    others = [language for language in dict.fromkeys(windows.languages) if language != target]
    if not others or target not in windows.languages:
        raise UserValueError(
            f"the windows must hold {target!r} and another language, got {sorted(set(windows.languages))}"
        )
    clean = windows.of_language(*others)
    nll, mass = _nll_and_mass(model, clean, target_tokens)
    target_nll, _ = _nll_and_mass(model, windows.of_language(target), target_tokens)
    kept = torch.log1p(-mass.clamp(max=1 - 1e-12))
    by_language = {
        language: mass[[row for row, own in enumerate(clean.languages) if own == language]].mean().item()
        for language in others
    }
    return Metrics(
        hz=mass.mean().item(),
        csx=(1 - kept.sum(1).exp()).mean().item(),
        ppl=nll.mean().exp().item(),
        masked_ppl=(nll + kept).mean().exp().item(),
        target_ppl=target_nll.mean().exp().item(),
        entry=_entry(model, switching, target_tokens),
        hz_by_language=by_language,
    )


def _entry(model: PreTrainedModel, switching: Windows, target_tokens: Tensor) -> float:
    """Mean log-probability of the first target token of the windows that switch."""
    rows = switching.select(switching.switched.nonzero().flatten().tolist())
    if not len(rows):
        raise UserValueError("no window switches: draw them with switch=1")
    nll, _ = _nll_and_mass(model, rows, target_tokens)
    places = (rows.cuts - rows.prompt_length).unsqueeze(1)
    return -nll.gather(1, places).mean().item()


def _nll_and_mass(model: PreTrainedModel, windows: Windows, target_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Per response token: negative log-likelihood and probability of `target_tokens`, [windows, responses] fp64."""
    was_training = model.training
    model.eval()
    nll: list[Tensor] = []
    mass: list[Tensor] = []
    columns = target_tokens.to(model.device)
    for batch in windows.input_ids.split(_BATCH):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, windows.prompt_length - 1 : -1]
        log_p = logits.float().log_softmax(-1)
        answer = batch[:, windows.prompt_length :]
        nll.append(-log_p.gather(-1, answer.unsqueeze(-1)).squeeze(-1).double().cpu())
        mass.append(log_p[..., columns].exp().double().sum(-1).cpu())
    model.train(was_training)
    return torch.cat(nll), torch.cat(mass)


def mean_metrics(metrics: Sequence[Metrics]) -> Metrics:
    """The mean of each number over seeds."""
    numbers = {
        field.name: sum(getattr(entry, field.name) for entry in metrics) / len(metrics)
        for field in fields(Metrics)
        if field.name != "hz_by_language"
    }
    by_language = {
        language: sum(entry.hz_by_language[language] for entry in metrics) / len(metrics)
        for language in metrics[0].hz_by_language
    }
    return Metrics(**numbers, hz_by_language=by_language)
