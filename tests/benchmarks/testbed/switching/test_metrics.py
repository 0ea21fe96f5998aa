"""Teacher-forced metrics against a direct computation, and the sampler against one without a cache."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.testbed.models import build_model
from benchmarks.testbed.sampling import SmallModelSampler
from benchmarks.testbed.switching.training import Metrics, mean_metrics, teacher_forced_metrics
from benchmarks.testbed.switching.windows import WindowMaker
from qscope_posttrain.models.generation import SamplingSettings
from qscope_posttrain.text.tokens import script_token_ids


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer, hidden_size=32, layers=2, heads=2, seed=0).eval()


@torch.no_grad()
def test_metrics_equal_a_position_by_position_computation(model, maker: WindowMaker, tokenizer) -> None:
    windows = maker.dialogue("val", 45, seed=1)
    tokens = script_token_ids(tokenizer, "Han")
    switching = maker.dialogue("val", 20, seed=2, switch=0.8, languages=["en", "ru"])
    result = teacher_forced_metrics(model, windows, switching, "zh", tokens)
    masses, per_window, losses, masked, target_losses = [], [], [], [], []
    of_language: dict[str, list[float]] = {"en": [], "ru": []}
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
            of_language[language].append(mass)
            losses.append(loss)
            masked.append(-math.log(p[row[position]] / (1 - mass)))
            stays *= 1 - mass
        if language != "zh":
            per_window.append(1 - stays)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    entries = []
    for cut, row in zip(switching.cuts.tolist(), switching.input_ids, strict=True):
        if cut >= 0:
            assert not torch.isin(row[:cut], tokens).any()
            entries.append(float(model(input_ids=row[None]).logits[0, cut - 1].double().log_softmax(-1)[row[cut]]))
    expected = Metrics(
        hz=mean(masses),
        csx=mean(per_window),
        ppl=math.exp(mean(losses)),
        masked_ppl=math.exp(mean(masked)),
        target_ppl=math.exp(mean(target_losses)),
        entry=mean(entries),
        hz_by_language={language: mean(values) for language, values in of_language.items()},
    )
    for name in Metrics.__dataclass_fields__:
        assert getattr(result, name) == pytest.approx(getattr(expected, name), rel=1e-4), name


def test_metrics_leave_the_mode_of_the_model_alone(model, maker: WindowMaker, tokenizer) -> None:
    tokens = script_token_ids(tokenizer, "Han")
    model.train()
    switching = maker.dialogue("val", 6, seed=1, switch=1.0, languages=["en"])
    teacher_forced_metrics(model, maker.dialogue("val", 6, seed=1), switching, "zh", tokens)
    assert model.training
    model.eval()


def test_metrics_need_both_kinds_of_windows_and_prompts(model, maker: WindowMaker, tokenizer) -> None:
    tokens = script_token_ids(tokenizer, "Han")
    switching = maker.dialogue("val", 6, seed=1, switch=1.0, languages=["en"])
    for language in ("en", "zh"):
        windows = maker.dialogue("val", 9, seed=1, languages=[language])
        with pytest.raises(ValueError, match="must hold 'zh' and another"):
            teacher_forced_metrics(model, windows, switching, "zh", tokens)
    with pytest.raises(ValueError, match="dialogue layout"):
        teacher_forced_metrics(model, maker.pretraining(9, 0.0, seed=1), switching, "zh", tokens)
    clean = maker.dialogue("val", 9, seed=1)
    with pytest.raises(ValueError, match="no window switches"):
        teacher_forced_metrics(model, clean, clean, "zh", tokens)


def test_mean_over_seeds() -> None:
    metrics = [Metrics(0, 1, 2, 3, 4, -5, {"en": 0.1}), Metrics(2, 3, 4, 5, 6, -7, {"en": 0.3})]
    assert mean_metrics(metrics) == Metrics(1, 2, 3, 4, 5, -6, {"en": pytest.approx(0.2)})


@torch.no_grad()
def test_sampling_without_an_end_equals_sampling_without_a_cache(model, maker: WindowMaker) -> None:
    prompts = maker.dialogue("val", 7, seed=2).prompts
    settings = SamplingSettings(temperature=0.7, top_p=1.0, max_new_tokens=6, seed=5)
    responses = SmallModelSampler(model).sample(prompts.tolist(), settings)
    generator = torch.Generator().manual_seed(5)
    text = prompts
    for _ in range(6):
        distribution = (model(input_ids=text).logits[:, -1] / 0.7).softmax(-1)
        text = torch.cat([text, torch.multinomial(distribution, 1, generator=generator)], dim=1)
    assert [list(response.tokens) for response in responses] == text[:, prompts.shape[1] :].tolist()
    assert not any(response.ended for response in responses)


def test_models_of_one_seed_are_equal_and_sizes_are_checked(tokenizer) -> None:
    state = torch.get_rng_state()
    first, second = (build_model(tokenizer, hidden_size=32, layers=1, heads=2, seed=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.config.tie_word_embeddings
    with pytest.raises(ValueError, match="even number of heads"):
        build_model(tokenizer, hidden_size=32, layers=1, heads=3, seed=4)
