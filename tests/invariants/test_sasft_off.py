"""Weight 0 trains bit for bit like a plain SFTTrainer, and a resumed run like one that was never stopped."""

from __future__ import annotations

import copy

import pytest
import torch
from sft.cases import case_model, make_features, make_rows, make_trainer

from qscope_posttrain.sft.baselines import KLAnchorCallback, TokenPenaltyCallback
from qscope_posttrain.sft.callback import SASFTCallback

STEPS = 20
RUN = {"max_steps": STEPS, "learning_rate": 1e-3, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}


def train(model, callbacks, tokenizer, resume=None, **arguments):
    torch.manual_seed(0)
    trainer = make_trainer(
        copy.deepcopy(model), make_rows(24), callbacks, processing_class=tokenizer, **{**RUN, **arguments}
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_parameters(first, second):
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def model(make_model):
    return case_model(make_model, attention_dropout=0.1)  # dropout: the term must not draw random numbers either


@pytest.fixture(scope="module")
def plain(model, tiny_tokenizer):
    return train(model, [], tiny_tokenizer)


@pytest.mark.promise(
    "Weight 0 trains bit-identically to plain SFTTrainer: losses and parameters of 20 steps, dropout on"
)
@pytest.mark.parametrize("kind", ["sasft", "token penalty", "anchor"])
def test_weight_zero_is_bit_identical(model, plain, tiny_tokenizer, kind):
    features = make_features(model)
    if kind == "token penalty":
        callback = TokenPenaltyCallback("zh", 0.0)
    elif kind == "anchor":
        callback = KLAnchorCallback(0.0)
    else:
        callback = SASFTCallback(features, weight=0.0, normalization="paper")
    trainer = train(model, [callback], tiny_tokenizer)
    assert len(losses(trainer)) == STEPS
    assert losses(trainer) == losses(plain)
    assert_same_parameters(trainer, plain)
    assert trainer.state.log_history[0][f"{callback.name}/penalty"] > 0
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()


def test_a_weight_changes_the_run(model, plain, tiny_tokenizer):
    trainer = train(model, [SASFTCallback(make_features(model), weight=0.5)], tiny_tokenizer)
    assert losses(trainer) != losses(plain)


@pytest.mark.promise("An SFT run that is resumed equals an unbroken one bit for bit")
def test_resumed_equals_uninterrupted(model, tiny_tokenizer, tmp_path):
    features = make_features(model)

    def callback(weight=0.5, seed=0):
        return SASFTCallback(make_features(model, seed=seed) if seed else features, weight=weight)

    saving = {"save_strategy": "steps", "save_steps": STEPS // 2, "output_dir": str(tmp_path)}
    whole = train(model, [callback()], tiny_tokenizer, **saving)
    checkpoint = str(tmp_path / f"checkpoint-{STEPS // 2}")
    resumed = train(model, [callback()], tiny_tokenizer, resume=checkpoint)
    assert losses(resumed) == losses(whole)
    assert_same_parameters(resumed, whole)
    penalties = [[e["sasft/penalty"] for e in t.state.log_history if "sasft/penalty" in e] for t in (resumed, whole)]
    assert penalties[0] == penalties[1]

    with pytest.raises(ValueError, match=r"config.weight was 0.5, is 0.25"):
        train(model, [callback(weight=0.25)], tiny_tokenizer, resume=checkpoint)
    with pytest.raises(ValueError, match="features_sha256 was"):
        train(model, [callback(seed=5)], tiny_tokenizer, resume=checkpoint)


@pytest.mark.promise("Resuming SFT with other features or settings is refused")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (TokenPenaltyCallback, {"weight": 5.0}, "config.weight was 20.0, is 5.0"),
        (TokenPenaltyCallback, {"anchor_weight": 1.0}, "config.anchor_weight was 0.0, is 1.0"),
        (TokenPenaltyCallback, {"target_token_ids": torch.tensor([7])}, "target_tokens_sha256 was"),
        (KLAnchorCallback, {"target": "zh"}, "config.target was None, is 'zh'"),
        (KLAnchorCallback, {"anchor_model": None}, "start_sha256 was"),
    ],
)
def test_resuming_with_another_loss_is_refused(model, tiny_tokenizer, tmp_path, make, change, message):
    one = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    train(model, [make()], tiny_tokenizer, **one)
    checkpoint = str(tmp_path / "checkpoint-1")
    train(model, [make()], tiny_tokenizer, resume=checkpoint, max_steps=2)
    if "anchor_model" in change:  # the model of the checkpoint is not the one that training began with
        change = {"anchor_model": type(model).from_pretrained(checkpoint)}
    with pytest.raises(ValueError, match=message):
        train(model, [make(**change)], tiny_tokenizer, resume=checkpoint, max_steps=2)


@pytest.mark.promise("Resuming SFT with other features or settings is refused")
def test_resuming_a_plain_checkpoint_with_sasft_is_refused(model, tiny_tokenizer, tmp_path):
    train(model, [], tiny_tokenizer, max_steps=1, save_strategy="steps", save_steps=1, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="trained without qscope_posttrain/sasft"):
        train(
            model, [SASFTCallback(make_features(model))], tiny_tokenizer, max_steps=2, resume=f"{tmp_path}/checkpoint-1"
        )
