"""Soft prompts of PEFT, whose virtual tokens stand before every row in the model: the loss at the real tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from sft.cases import KeepGradients, make_features, make_rows, make_trainer, relative_error
from torch.nn.functional import cross_entropy

from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback

TARGETS = torch.arange(100, 140)
ROWS = make_rows(8)
PROMPTS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("batch", [8, 2])
def test_losses_of_a_model_with_a_soft_prompt(model, tiny_tokenizer, kind, batch):
    torch.manual_seed(0)
    prompted = get_peft_model(copy.deepcopy(model), PROMPTS[kind])
    for parameter in prompted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    features = make_features(model)
    callbacks = [
        SASFTCallback(features, weight=0.4, layers=(1,)),
        TokenPenaltyCallback(weight=3.0, anchor_weight=0.7, target_token_ids=TARGETS),
        KLAnchorCallback(weight=0.5),
    ]
    keep = KeepGradients()
    trainer = make_trainer(
        copy.deepcopy(prompted), ROWS, [*callbacks, keep], processing_class=tiny_tokenizer,
        per_device_train_batch_size=batch, gradient_accumulation_steps=8 // batch,
    )  # fmt: skip
    trainer.train()
    logs = trainer.state.log_history[0]
    assert [logs[f"{callback.name}/hook_calls"] for callback in callbacks] == [1, 1, 1]

    expected = by_hand(prompted, model, features)
    assert relative_error(keep.gradients, expected) <= 2e-6
    assert relative_error(by_hand(prompted, model, features, penalised=False), expected) > 0.01


def by_hand(prompted, start, features, penalised=True):
    """Each row alone; the last positions are those of its own tokens."""
    prompted = copy.deepcopy(prompted).train()
    states = []
    prompted.base_model.model.layers[1].register_forward_hook(lambda module, args, output: states.append(output))
    rows = features.layers[1]
    weights = rows.scores.relu() / rows.scores.relu().sum()
    pooled = [features.language_index(name) for name in ("en", "fr")]
    sigma = features.layers[1].pooled_std("decoder", pooled, weights.double()).float()
    kept = [i for i in range(512) if i not in TARGETS.tolist()]
    total, count = torch.zeros(()), 0
    for row in ROWS:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = prompted(input_ids=ids).logits[0, -len(labels) :]
        hidden = states.pop()[0, -len(labels) :]
        with torch.no_grad():
            before = start(input_ids=ids).logits[0]
        total = total + cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
        chosen = torch.cat([labels[1:] != -100, torch.tensor([False])])
        if not penalised:
            continue
        total = total + 0.5 * divergence(before[chosen], logits[chosen])
        if row["language"] == "zh":
            continue
        alpha = rows.decoder_mean[features.languages.index(row["language"])] @ weights
        excess = torch.relu((hidden[chosen] @ rows.decoder.T @ weights - alpha) / sigma)
        total = total + 0.4 * excess.sum()
        allowed = chosen & torch.cat([~torch.isin(labels[1:], TARGETS), torch.tensor([False])])
        total = total - 3.0 * torch.log(1 - logits[allowed].softmax(-1)[:, TARGETS].sum(-1)).sum()
        total = total + 0.7 * divergence(before[chosen][:, kept], logits[chosen][:, kept])
    (total / count).backward()
    return {name: p.grad for name, p in prompted.named_parameters() if p.grad is not None}


def divergence(before, after):
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("shape", [(2, 7, 32), (4, 5, 32), (3, 2, 5, 32), (2, 3, 32)])
def test_hidden_states_of_another_shape_than_the_labels(model, tiny_tokenizer, shape):
    loss = KLAnchorCallback().prepare(make_trainer(copy.deepcopy(model), ROWS, processing_class=tiny_tokenizer))
    loss.capture.tensors = dict.fromkeys(loss.capture.layers, torch.zeros(shape))
    loss.capture.named = {"final_norm": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"and the labels of the batch \[2, 5\].*virtual prompt tokens"):
        loss.captured(torch.zeros(2, 5))
