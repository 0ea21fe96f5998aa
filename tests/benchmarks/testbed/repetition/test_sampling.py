"""The sampler: the model's own distribution, rows that leave, seeds."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from benchmarks.testbed.models import LanguageModel
from benchmarks.testbed.repetition.language_model import prompt_ids
from benchmarks.testbed.repetition.task import draw_problems
from benchmarks.testbed.sampling import SmallModelSampler
from qscope_posttrain.models.generation import Response, SamplingSettings, generate_samples


def sample(model, prompts, max_new_tokens: int, end: int | None = None, **settings) -> list[Response]:
    settings = {"samples_per_prompt": 1, "top_p": 1.0, "batch_size": 512} | settings
    chosen = SamplingSettings(max_new_tokens=max_new_tokens, **settings)
    return SmallModelSampler(model, end).sample(prompts, chosen)


def test_greedy_completions_are_those_of_generate(tiny: LanguageModel) -> None:
    prompts = prompt_ids(tiny, draw_problems(24, (1, 3), 0, held_out=None))
    completions = sample(tiny.model, prompts, 30, temperature=0.0, end=tiny.tokenizer.eos_token_id)
    end = tiny.tokenizer.eos_token_id
    settings = GenerationConfig(do_sample=False, max_new_tokens=30, eos_token_id=end, pad_token_id=0)
    for prompt, completion in zip(prompts, completions, strict=True):
        output = tiny.model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        assert list(completion.tokens) == (output[: output.index(end)] if end in output else output)
        assert completion.ended == (end in output)


def _likely_to_end(tiny: LanguageModel) -> LanguageModel:
    """The end token gets a fair share everywhere, so that rows end at all lengths."""
    head = torch.nn.Linear(16, len(tiny.tokenizer))
    head.weight.data.copy_(tiny.model.lm_head.weight * 0.3)
    head.bias.data.zero_()
    head.bias.data[tiny.tokenizer.eos_token_id] = 1.5
    tiny.model.lm_head = head
    return tiny


def test_rows_that_leave_do_not_disturb_the_others(tiny: LanguageModel) -> None:
    """With so small a temperature that draws are certain, what remains of a batch must go on as if nothing happened."""
    model, end = _likely_to_end(tiny), tiny.tokenizer.eos_token_id
    prompts = prompt_ids(model, draw_problems(60, (2, 2), 0, held_out=None))
    sampled = sample(model.model, prompts, 25, temperature=1.0, seed=3, end=end)
    assert len({len(completion.tokens) for completion in sampled if completion.ended}) > 3
    for prompt, completion in zip(prompts, sampled, strict=True):
        row = [*prompt, *completion.tokens]
        # The likelihood of what was drawn cannot tell; the greedy choice after it can.
        after = sample(model.model, [row], 1, temperature=0.0, end=end)[0]
        with torch.no_grad():
            best = int(model.model(torch.tensor([row])).logits[0, -1].argmax())
        assert after.tokens == ([] if best == model.tokenizer.eos_token_id else [best])
    together = sample(model.model, prompts, 25, temperature=1e-4, end=end)
    assert together == sample(model.model, prompts, 25, temperature=1e-4, end=end, batch_size=1)


def test_frequencies_are_the_model_s_probabilities(tiny: LanguageModel) -> None:
    model = _likely_to_end(tiny)
    prompt = prompt_ids(model, draw_problems(1, (3, 3), 4, held_out=None))[0]
    rows = 6000
    end = model.tokenizer.eos_token_id
    sampled = sample(model.model, [prompt] * rows, 2, seed=1, batch_size=2000, end=end)
    with torch.no_grad():
        first = model.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        pairs = torch.zeros(len(first), len(first))
        for token in range(len(first)):
            pairs[token] = first[token] * model.model(torch.tensor([[*prompt, token]])).logits[0, -1].softmax(-1)
    counted = torch.zeros_like(pairs)
    ended_at_once = 0
    for completion in sampled:
        tokens = [*completion.tokens, end]
        if len(completion.tokens) == 0:
            ended_at_once += 1
        else:
            counted[tokens[0], tokens[1]] += 1
    assert ended_at_once / rows == pytest.approx(float(first[end]), abs=0.025)
    pairs[end] = 0
    deviation = (counted / rows - pairs).abs() / (pairs * (1 - pairs) / rows).sqrt().clamp_min(1e-4)
    assert float(deviation.max()) < 5


def test_the_same_seed_gives_the_same_draws_and_leaves_global_state_alone(tiny: LanguageModel) -> None:
    prompts = prompt_ids(tiny, draw_problems(10, (1, 3), 0, held_out=None))
    state = torch.get_rng_state()
    first = sample(tiny.model, prompts, 20, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert first == sample(tiny.model, prompts, 20, seed=5)
    assert first != sample(tiny.model, prompts, 20, seed=6)
    tiny.model.train()
    sample(tiny.model, prompts, 2)
    assert tiny.model.training


def test_impossible_settings_are_refused(tiny: LanguageModel) -> None:
    with pytest.raises(ValueError, match="top_p=1"):
        sample(tiny.model, [[1, 2]], 2, top_p=0.9)
    for prompts in ([[]], []):
        with pytest.raises(ValueError, match="needs a prompt"):
            sample(tiny.model, prompts, 2)


def test_it_is_an_engine_of_generate_samples(tiny: LanguageModel) -> None:
    settings = SamplingSettings(2, top_p=1.0, max_new_tokens=9, seed=4)
    sampler = SmallModelSampler(tiny.model, tiny.tokenizer.eos_token_id)
    texts = [tiny.tokenizer.decode(row) for row in prompt_ids(tiny, draw_problems(3, (2, 2), 0, held_out=None))]
    samples = generate_samples(sampler, tiny.tokenizer, {"all": texts}, settings)
    again = sampler.sample([found.prompt_tokens for found in samples], settings)
    assert [found.tokens for found in samples] == [tuple(response.tokens) for response in again]
