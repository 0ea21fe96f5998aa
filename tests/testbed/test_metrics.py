"""Teacher-forced metrics against a direct computation, and the sampler against one without a cache."""

from __future__ import annotations

import math

import pytest
import torch

from qscope_posttrain.testbed.metrics import Metrics, mean_metrics, teacher_forced_metrics
from qscope_posttrain.testbed.model import build_model
from qscope_posttrain.testbed.sampling import sample_responses
from qscope_posttrain.testbed.windows import WindowMaker
from qscope_posttrain.text.tokens import script_token_ids


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer, hidden_size=32, num_layers=2, num_heads=2, max_length=48, seed=0).eval()


@torch.no_grad()
def test_metrics_equal_a_position_by_position_computation(model, maker: WindowMaker, tokenizer) -> None:
    windows = maker.dialogue("val", 45, seed=1)
    tokens = script_token_ids(tokenizer, "Han")
    result = teacher_forced_metrics(model, windows, "zh", tokens)
    masses, per_window, losses, masked, target_losses = [], [], [], [], []
    for language, row in zip(windows.languages, windows.input_ids, strict=True):
        probabilities = model(input_ids=row[None]).logits[0].double().softmax(-1)
        stays = 1.0
        for position in range(windows.prompt_length, len(row)):
            p = probabilities[position - 1]
            loss = -math.log(p[row[position]])
            if language == "zh":
                target_losses.append(loss)
                continue
            mass = float(p[tokens].sum())
            masses.append(mass)
            losses.append(loss)
            masked.append(-math.log(p[row[position]] / (1 - mass)))
            stays *= 1 - mass
        if language != "zh":
            per_window.append(1 - stays)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    expected = Metrics(
        mean(masses), mean(per_window), math.exp(mean(losses)), math.exp(mean(masked)), math.exp(mean(target_losses))
    )
    for name in Metrics.__dataclass_fields__:
        assert getattr(result, name) == pytest.approx(getattr(expected, name), rel=1e-4), name


def test_metrics_leave_the_mode_of_the_model_alone(model, maker: WindowMaker, tokenizer) -> None:
    tokens = script_token_ids(tokenizer, "Han")
    model.train()
    teacher_forced_metrics(model, maker.dialogue("val", 6, seed=1), "zh", tokens)
    assert model.training
    model.eval()


def test_metrics_need_both_kinds_of_windows_and_prompts(model, maker: WindowMaker, tokenizer) -> None:
    tokens = script_token_ids(tokenizer, "Han")
    with pytest.raises(ValueError, match="must hold 'zh' and another"):
        teacher_forced_metrics(model, maker.dialogue("val", 9, seed=1, languages=["en"]), "zh", tokens)
    with pytest.raises(ValueError, match="must hold 'zh' and another"):
        teacher_forced_metrics(model, maker.dialogue("val", 9, seed=1, languages=["zh"]), "zh", tokens)
    with pytest.raises(ValueError, match="dialogue layout"):
        teacher_forced_metrics(model, maker.pretraining(9, 0.0, seed=1), "zh", tokens)


def test_mean_over_seeds() -> None:
    assert mean_metrics([Metrics(0, 1, 2, 3, 4), Metrics(2, 3, 4, 5, 6)]) == Metrics(1, 2, 3, 4, 5)


@torch.no_grad()
def test_sampling_equals_sampling_without_a_cache(model, maker: WindowMaker) -> None:
    prompts = maker.dialogue("val", 7, seed=2).prompts
    responses = sample_responses(model, prompts, 6, temperature=0.7, seed=5)
    generator = torch.Generator().manual_seed(5)
    text = prompts
    for _ in range(6):
        distribution = (model(input_ids=text).logits[:, -1] / 0.7).softmax(-1)
        text = torch.cat([text, torch.multinomial(distribution, 1, generator=generator)], dim=1)
    assert torch.equal(responses, text[:, prompts.shape[1] :])
    assert torch.equal(responses, sample_responses(model, prompts, 6, temperature=0.7, seed=5))
    assert not torch.equal(responses, sample_responses(model, prompts, 6, temperature=0.7, seed=6))


def test_sampling_refuses_what_cannot_be_sampled(model, maker: WindowMaker) -> None:
    prompts = maker.dialogue("val", 2, seed=2).prompts
    with pytest.raises(ValueError, match="temperature above 0"):
        sample_responses(model, prompts, 4, temperature=0.0)
    with pytest.raises(ValueError, match="at least one row"):
        sample_responses(model, prompts[:0], 4)


def test_models_of_one_seed_are_equal_and_sizes_are_checked(tokenizer) -> None:
    state = torch.get_rng_state()
    first, second = (build_model(tokenizer, 32, 1, 2, 48, seed=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.config.tie_word_embeddings
    with pytest.raises(ValueError, match="even number of heads"):
        build_model(tokenizer, 32, 1, 3, 48, seed=4)
