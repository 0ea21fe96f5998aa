"""Gradients of a step's loss written out over rows that run alone: SASFT, token penalty, anchor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from sft.cases import TARGET, make_rows
from torch.nn.functional import cross_entropy

from qscope_posttrain.sft.attachment import AuxiliaryLossCallback
from qscope_posttrain.sft.baselines import TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback

TARGETS = torch.arange(100, 140)
WEIGHT = 0.4
VOCABULARY = 512


def rows_with_target_tokens() -> list[dict[str, Any]]:
    """Rows of which one response contains target tokens, which "skip_target_labels" is about."""
    rows = make_rows(8)
    rows[0]["input_ids"][-3:] = rows[0]["labels"][-3:] = [100, 101, 139]
    return rows


def gradients_by_hand(
    model,
    rows,
    term: Callable[[list[dict[str, Any]]], torch.Tensor],
    normalization="token_mean",
    target=TARGET,
    precision: AbstractContextManager[Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Rows run alone, all graphs kept; `term(records of rows outside of the target) -> sum`, divided as named."""
    model = copy.deepcopy(model).train()
    states: dict[int, torch.Tensor] = {}
    blocks = [module for name, module in model.named_modules() if name.split(".")[-2:-1] == ["layers"]]
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda module, args, output, number=number: states.__setitem__(number, output))
    records, ce, count = [], torch.zeros(()), 0
    for row in rows:
        with precision or nullcontext():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].float()
        labels = torch.tensor(row["labels"])
        ce = ce + cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
        kept = {layer: hidden[0].float() for layer, hidden in states.items()}
        records.append({"row": row, "logits": logits, "labels": labels, "states": kept})
    others = [record for record in records if record["row"]["language"] != target]
    penalized = sum(int((record["labels"][1:] != -100).sum()) for record in others)
    divisor = {"token_mean": count, "paper": penalized}[normalization]
    (ce / count + term(others) / divisor).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def predicting(record) -> torch.Tensor:
    """The positions of a row that predict a response token, bool."""
    return torch.cat([record["labels"][1:] != -100, torch.tensor([False])])


def sasft_by_hand(features) -> Callable[[list[dict[str, Any]]], torch.Tensor]:
    """The default form: per layer, decoder directions weighted by ReLU(nu), in standard deviations."""

    def term(others):
        total = torch.zeros(())
        for layer, rows in features.layers.items():
            weights = rows.scores.relu() / rows.scores.relu().sum()
            pooled = [features.language_index(name) for name in ("en", "fr")]
            sigma = rows.pooled_std("decoder", pooled, weights.double()).float()
            for record in others:
                alpha = rows.decoder_mean[features.languages.index(record["row"]["language"])] @ weights
                excess = torch.relu((record["states"][layer] @ rows.decoder.T @ weights - alpha) / sigma)
                total = total + excess[predicting(record)].sum()
        return WEIGHT * total

    return term


def tokens_by_hand(start, precision=None) -> Callable[[list[dict[str, Any]]], torch.Tensor]:
    """The token penalty, and the divergence from `start` over the other tokens."""
    kept = [i for i in range(VOCABULARY) if i not in TARGETS.tolist()]

    def term(others):
        total = torch.zeros(())
        for record in others:
            p = record["logits"].softmax(-1)[:, TARGETS].sum(-1)
            for t in range(len(p) - 1):
                if record["labels"][t + 1] != -100 and record["labels"][t + 1] not in TARGETS:
                    total = total - WEIGHT * torch.log(1 - p[t])
            total = total + WEIGHT * divergence_by_hand(record, start, kept, precision)
        return total

    return term


def divergence_by_hand(record, start, kept, precision=None) -> torch.Tensor:
    """KL of a row's positions that predict a response token, over the tokens `kept`."""
    with torch.no_grad(), precision or nullcontext():
        reference = start(input_ids=torch.tensor([record["row"]["input_ids"]])).logits[0].float()
    p, q = reference[:, kept].log_softmax(-1), record["logits"][:, kept].log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)[predicting(record)].sum()


def moved(model):
    """A copy of a model with other weights, to be the start of an anchor that is not 0."""
    start = copy.deepcopy(model)
    for parameter in start.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data * 0.95
    return start


def case(name: str, model, features, precision=None) -> tuple[AuxiliaryLossCallback, Callable[..., torch.Tensor]]:
    """A callback, "sasft" or "token penalty and anchor", and its term by hand."""
    if name == "sasft":
        return SASFTCallback(features, weight=WEIGHT), sasft_by_hand(features)
    start = moved(model)
    options = {"languages": features.languages, "target_token_ids": TARGETS, "anchor_model": start}
    return TokenPenaltyCallback("zh", WEIGHT, anchor_weight=WEIGHT, **options), tokens_by_hand(start, precision)
