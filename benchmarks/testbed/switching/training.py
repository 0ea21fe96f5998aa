"""Supervised fine-tuning with a stock `trl.SFTTrainer` and one method's penalty, and teacher-forced metrics after it.

The metrics are far less noisy than sampling, and to be read beside it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from benchmarks.testbed.switching.config import Arm, SwitchingConfig
from benchmarks.testbed.switching.language_model import SwitchingModel
from benchmarks.testbed.switching.windows import Windows
from benchmarks.testbed.training import StepClock, common_arguments, renamed_argument_ignored, train_quietly
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.features.feature_set import FeatureSet
from qscope_posttrain.sft.baselines import TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback

if TYPE_CHECKING:
    from datasets import Dataset

_WARMUP_STEPS = 10
_EVALUATION_BATCH = 32


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned model and how it got there."""

    model: PreTrainedModel
    """In evaluation mode, without hooks."""
    history: tuple[Mapping[str, Any], ...]
    """Metrics that the trainer logged at every step: `loss`, and the penalty's own metrics."""
    seconds: float
    """Wall time of the training loop."""
    step_seconds: float
    """Median wall time of a step."""


def fine_tune(
    language_model: SwitchingModel,
    arm: Arm,
    weight: float,
    features: FeatureSet | None,
    config: SwitchingConfig,
    seed: int,
    *,
    start: PreTrainedModel | None = None,
    windows: int | None = None,
) -> FineTuned:
    """Train a copy of a model for one pass over SFT windows.

    Args:
        weight: of the method's penalty.
        features: directions to penalize; ValueError if the arm needs them and they are missing.
        seed: of the data and their order, the same for every method.
        start: the model to copy, by default the pretrained one.
        windows: their number, by default `config.sft_windows`.
    """
    from trl import SFTConfig, SFTTrainer

    data = language_model.maker.dialogue("sft", windows or config.sft_windows, seed, config.sft_switch)
    if arm.drop_switched:
        data = data.select((~data.switched).nonzero().flatten().tolist())
    with tempfile.TemporaryDirectory(prefix="qscope-sft-") as folder:
        with renamed_argument_ignored():
            arguments = SFTConfig(
                **common_arguments(config, seed, folder),
                num_train_epochs=1,
                per_device_train_batch_size=config.sft_batch_size,
                learning_rate=config.sft_learning_rate,
                lr_scheduler_type="cosine_with_min_lr",
                lr_scheduler_kwargs={"min_lr_rate": 0.1},
                warmup_steps=_WARMUP_STEPS,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
            )
        clock = StepClock()
        model = copy.deepcopy(language_model.model)
        if start is not None:
            # No copy of `start` itself: TRL gave it a forward that keeps to its own parameters, and a copy has it, too.
            model.load_state_dict(start.state_dict())
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=_dataset(data, config),
            processing_class=language_model.tokenizer,
            callbacks=[clock, *_penalties(language_model, arm, weight, features)],
        )
        history, seconds = train_quietly(trainer)
    return FineTuned(model.eval(), history, seconds, clock.median())


def _penalties(
    language_model: SwitchingModel, arm: Arm, weight: float, features: FeatureSet | None
) -> list[TrainerCallback]:
    target, tokens = language_model.maker.target, language_model.target_tokens
    callbacks: list[TrainerCallback] = []
    if arm.penalty in ("token", "both"):
        callbacks.append(
            TokenPenaltyCallback(
                target,
                arm.token_scale * weight,
                languages=language_model.languages,
                target_token_ids=tokens,
                **arm.token_options,
            )
        )
    if arm.uses_features:
        if features is None:
            raise UserValueError(f"method {arm.name!r} penalizes features, so it needs a FeatureSet")
        layers = tuple(sorted(features.layers))[-arm.layers :]
        callbacks.append(
            SASFTCallback(features, target, weight, layers=layers, top=arm.top, target_token_ids=tokens, **arm.options)
        )
    return callbacks


def _dataset(windows: Windows, config: SwitchingConfig) -> Dataset:
    """Rows that are tokenized already, with labels on the response only, and the language as a column.

    A language in which methods do not act goes by the target's name: penalties leave rows of the target alone, and
    these rows stay in their denominators.
    """
    from datasets import Dataset

    acting = set(windows.languages if config.penalised is None else config.penalised)
    return Dataset.from_dict(
        {
            "input_ids": windows.input_ids.tolist(),
            "labels": windows.labels.tolist(),
            "language": [language if language in acting else config.target for language in windows.languages],
        }
    )


@dataclass(frozen=True)
class Metrics:
    """Means over response positions of clean windows; P_t is the probability of all target-script tokens at t."""

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
        windows: clean windows in the dialogue layout, of the target and other languages; response positions count.
        switching: windows that switch to the target in their response, for `entry`; others among them are left out.
        target: the language whose windows count for `target_ppl` only.
        target_tokens: int64 ids of the vocabulary entries that betray the target.
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
    of_language = {name: [row for row, own in enumerate(clean.languages) if own == name] for name in others}
    return Metrics(
        hz=mass.mean().item(),
        csx=(1 - kept.sum(1).exp()).mean().item(),
        ppl=nll.mean().exp().item(),
        masked_ppl=(nll + kept).mean().exp().item(),
        target_ppl=target_nll.mean().exp().item(),
        entry=_entry(model, switching, target_tokens),
        hz_by_language={name: mass[rows].mean().item() for name, rows in of_language.items()},
    )


def _entry(model: PreTrainedModel, switching: Windows, target_tokens: Tensor) -> float:
    """Return the mean log-probability of the first target token of the windows that switch."""
    rows = switching.select(switching.switched.nonzero().flatten().tolist())
    if not len(rows):
        raise UserValueError("no window switches: draw them with switch=1")
    nll, _ = _nll_and_mass(model, rows, target_tokens)
    places = (rows.cuts - rows.prompt_length).unsqueeze(1)
    return -nll.gather(1, places).mean().item()


def _nll_and_mass(model: PreTrainedModel, windows: Windows, target_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return negative log-likelihood and probability of `target_tokens` per response token, [windows, responses]."""
    was_training = model.training
    model.eval()
    nll: list[Tensor] = []
    mass: list[Tensor] = []
    columns = target_tokens.to(model.device)
    for batch in windows.input_ids.split(_EVALUATION_BATCH):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, windows.prompt_length - 1 : -1]
        log_p = logits.float().log_softmax(-1)
        answer = batch[:, windows.prompt_length :]
        nll.append(-log_p.gather(-1, answer.unsqueeze(-1)).squeeze(-1).double().cpu())
        mass.append(log_p[..., columns].exp().double().sum(-1).cpu())
    model.train(was_training)
    return torch.cat(nll), torch.cat(mass)


def mean_metrics(metrics: Sequence[Metrics]) -> Metrics:
    """Average each number over seeds."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {name: mean([value[name] for value in values]) for name in values[0]}
        return sum(values) / len(values)

    return Metrics(**{f.name: mean([getattr(entry, f.name) for entry in metrics]) for f in fields(Metrics)})
