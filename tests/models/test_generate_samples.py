"""Sampling follows its settings and nothing else, and leaves no trace."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from qscope_posttrain.models.generation import Sample, SamplingSettings, encode_prompts, generate_samples

SHORT = SamplingSettings(samples_per_prompt=2, max_new_tokens=6, top_p=1.0, batch_size=4)
GREEDY = SamplingSettings(samples_per_prompt=1, max_new_tokens=6, temperature=0, batch_size=3)


@pytest.fixture
def prompts(texts):
    return {"en": texts["en"][:3], "ru": [texts["ru"][0], "Да."]}


def test_order_and_content(make_model, tiny_tokenizer, prompts):
    samples = generate_samples(make_model(), tiny_tokenizer, prompts, SHORT)
    assert [(s.language, s.prompt_index, s.sample_index) for s in samples] == [
        (language, prompt, sample)
        for language, group in prompts.items()
        for prompt in range(len(group))
        for sample in (0, 1)
    ]
    assert {s.prompt for s in samples} == {prompt for group in prompts.values() for prompt in group}


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "qwen3_5_text"])
def test_padded_batches_equal_single_prompts(make_model, tiny_tokenizer, prompts, architecture):
    """Greedy responses do not depend on what shares the batch, so that padding and masking are right."""
    model = make_model(architecture)
    batched = generate_samples(model, tiny_tokenizer, prompts, GREEDY)
    for sample in batched:
        alone = generate_samples(model, tiny_tokenizer, {sample.language: [sample.prompt]}, GREEDY)
        assert alone[0].response == sample.response


def test_greedy_equals_a_plain_loop(make_model, tiny_tokenizer):
    model = make_model()
    ids = tiny_tokenizer("The river")["input_ids"]
    start = len(ids)
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    (sample,) = generate_samples(model, tiny_tokenizer, {"en": ["The river"]}, GREEDY)
    assert sample.response == tiny_tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_seed(make_model, tiny_tokenizer, prompts):
    model = make_model()
    first = generate_samples(model, tiny_tokenizer, prompts, SHORT)
    torch.manual_seed(12345)
    assert generate_samples(model, tiny_tokenizer, prompts, SHORT) == first
    other = generate_samples(model, tiny_tokenizer, prompts, SamplingSettings(**{**SHORT.to_dict(), "seed": 1}))
    assert [s.response for s in other] != [s.response for s in first]
    assert first[0].response != first[1].response


def test_the_caller_finds_everything_as_it_was(make_model, tiny_tokenizer, prompts):
    model = make_model().train()
    model.model.layers[1].eval()
    model.generation_config = defaults = GenerationConfig(top_k=1, do_sample=True, repetition_penalty=5.0)
    kept, side = copy.deepcopy(defaults), tiny_tokenizer.padding_side
    too_small = nn.Embedding(2, 64)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    generate_samples(model, tiny_tokenizer, prompts, SHORT)
    model.model.embed_tokens = too_small
    with pytest.raises(IndexError):
        generate_samples(model, tiny_tokenizer, prompts, SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is defaults
    assert defaults == kept
    assert tiny_tokenizer.padding_side == side
    assert model.training
    assert not model.model.layers[1].training


def test_generation_defaults_of_the_model_do_not_shape_the_samples(make_model, tiny_tokenizer, prompts):
    plain, opinionated = make_model(), make_model()
    opinionated.generation_config = GenerationConfig(
        top_k=1, repetition_penalty=5.0, min_p=0.5, eos_token_id=plain.generation_config.eos_token_id
    )
    assert generate_samples(plain, tiny_tokenizer, prompts, SHORT) == generate_samples(
        opinionated, tiny_tokenizer, prompts, SHORT
    )


def test_distribution_is_that_of_temperature_and_nucleus(make_model, tiny_tokenizer):
    """First tokens of many samples against temperature and nucleus computed by hand."""
    model = make_model()
    model.requires_grad_(False)
    model.lm_head.weight.mul_(10)  # peaked, so that the nucleus is small
    settings = SamplingSettings(samples_per_prompt=2000, temperature=1.5, top_p=0.6, max_new_tokens=1, batch_size=500)
    logits = model(torch.tensor([tiny_tokenizer("Nobody knew")["input_ids"]])).logits[0, -1]
    probabilities, order = (logits / 1.5).softmax(-1).sort(descending=True)
    kept = (probabilities.cumsum(0) - probabilities) < 0.6
    expected = {
        int(token): float(p / probabilities[kept].sum())
        for token, p in zip(order[kept], probabilities[kept], strict=True)
    }
    assert 2 < len(expected) < 200
    samples = generate_samples(model, tiny_tokenizer, {"en": ["Nobody knew"]}, settings)
    by_text: dict[str, float] = {}
    for token, p in expected.items():
        text = tiny_tokenizer.decode([token], skip_special_tokens=True)
        by_text[text] = by_text.get(text, 0.0) + p
    seen = [sample.response for sample in samples]
    assert set(seen) <= set(by_text)
    for text, p in by_text.items():
        assert abs(seen.count(text) / 2000 - p) < 5 * (p * (1 - p) / 2000) ** 0.5 + 1e-3


def test_tokens_are_those_read_and_written(make_model, tiny_tokenizer):
    settings = SamplingSettings(samples_per_prompt=60, max_new_tokens=40, top_p=1.0, batch_size=60)
    samples = generate_samples(make_model(), tiny_tokenizer, {"en": ["We bought", "The old river"]}, settings)
    for sample in samples:
        assert sample.prompt_tokens == tuple(tiny_tokenizer(sample.prompt)["input_ids"])
        assert sample.response == tiny_tokenizer.decode(list(sample.tokens), skip_special_tokens=True)
        assert tiny_tokenizer.eos_token_id not in sample.tokens
        assert len(sample.tokens) < 40 if sample.ended else len(sample.tokens) == 40


def test_a_sample_survives_json(make_model, tiny_tokenizer, prompts):
    sample = generate_samples(make_model(), tiny_tokenizer, prompts, SHORT)[0]
    assert Sample(**json.loads(json.dumps(sample.to_dict()))) == sample
    assert set(sample.to_dict()) - set(sample.to_dict(tokens=False)) == {"prompt_tokens", "tokens"}


def test_ended_and_cut_at_the_end_token(make_model, tiny_tokenizer):
    model = make_model()
    settings = SamplingSettings(samples_per_prompt=60, max_new_tokens=40, temperature=1.0, top_p=1.0, batch_size=60)
    samples = generate_samples(model, tiny_tokenizer, {"en": ["We bought"]}, settings)
    ended = [sample for sample in samples if sample.ended]
    assert 0 < len(ended) < 60
    model.generation_config.eos_token_id = [2, *range(3, 512)]
    assert all(s.ended and not s.response for s in generate_samples(model, tiny_tokenizer, {"en": ["We"]}, GREEDY))


def test_chat(make_model, tiny_tokenizer):
    model = make_model()
    rendered = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    (from_text,) = generate_samples(model, tiny_tokenizer, {"en": ["Hello"]}, GREEDY, chat=True)
    messages = [{"role": "user", "content": "Hello"}]
    (from_messages,) = generate_samples(model, tiny_tokenizer, {"en": [messages]}, GREEDY)
    assert from_text == from_messages
    assert from_text.prompt == rendered
    (raw,) = generate_samples(model, tiny_tokenizer, {"en": [rendered]}, GREEDY)
    assert raw.response == from_text.response


def test_chat_without_template_is_refused(make_model, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        generate_samples(make_model(), tokenizer, {"en": ["Hello"]}, GREEDY, chat=True)


def test_tokenizer_without_special_tokens(make_model, tiny_tokenizer, prompts):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    expected = generate_samples(make_model(), tiny_tokenizer, prompts, GREEDY)
    assert generate_samples(make_model(), tokenizer, prompts, GREEDY) == expected


@pytest.mark.parametrize("wrap", ["peft", "compile"])
def test_wrapped_models(make_model, tiny_tokenizer, prompts, wrap):
    model = make_model()
    expected = generate_samples(model, tiny_tokenizer, prompts, SHORT)
    if wrap == "peft":
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    else:
        wrapped = torch.compile(model, backend="eager")
    assert generate_samples(wrapped, tiny_tokenizer, prompts, SHORT) == expected


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ({}, ValueError, "No prompts given"),
        ({"en": ["a"], "ru": []}, ValueError, "No prompts for the source language 'ru'"),
        ({"en": ["a", ""]}, ValueError, "Prompt 1 of 'en' is empty"),
        ({"en": "a"}, TypeError, "list of prompts; got one string"),
        ({"en": ["word " * 600]}, ValueError, r"exceeds the 512 positions"),
    ],
)
def test_wrong_prompts(make_model, tiny_tokenizer, prompts, error, message):
    with pytest.raises(error, match=message):
        generate_samples(make_model(), tiny_tokenizer, prompts, SHORT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": -1}, "batch_size"),
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": 0}, "same response every time"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**fields)


class TestChatTemplates:
    """What a prompt says to its chat template is used."""

    @pytest.fixture
    def tokenizer(self, tiny_tokenizer):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = (
            "{% if tools %}{{ tools | tojson }}{% endif %}{{ style }}"
            "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('begins with a tool') }}{% endif %}"
            + tokenizer.chat_template
        )
        return tokenizer

    def test_columns_of_a_row_as_trl_reads_them(self, tokenizer):
        from trl.data_utils import apply_chat_template

        tools = [{"type": "function", "function": {"name": "clock", "description": "Time.", "parameters": {}}}]
        user = {"role": "user", "content": "When?"}
        rows = [
            {"prompt": [user]},
            {"prompt": [user], "tools": tools},
            {"prompt": [user], "chat_template_kwargs": {"style": "terse"}},
            {"prompt": [user, {"role": "assistant", "content": "At"}], "tools": tools},
        ]
        found = encode_prompts(tokenizer, rows)
        for row, ids in zip(rows, found, strict=True):
            text = apply_chat_template(row, tokenizer, tools=row.get("tools"))["prompt"]
            assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len({tuple(ids) for ids in found}) == 4
        assert encode_prompts(tokenizer, [{**rows[1], "tools": json.dumps(tools)}]) == [found[1]]
        assert encode_prompts(tokenizer, [[user]], chat_template_options={"style": "terse"}) == [found[2]]
        asked = {"prompt": "When?", "chat_template_kwargs": {"style": "terse"}}
        assert encode_prompts(tokenizer, [asked], chat=True) == [found[2]]

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ({"prompt": "When?", "tools": [{}]}, "Prompt 1 is text to continue, which has no use for 'tools'"),
            ([{"role": "tool", "content": "noon"}], "Prompt 1: the chat template refuses it: begins with a tool"),
            ("The boat \ud83d", "Prompt 1 is damaged: character 9 is half of a surrogate pair"),
            ([{"role": "user", "content": "\ude00"}], "Prompt 1 is damaged"),
        ],
    )
    def test_refused_by_number(self, tokenizer, prompt, message):
        with pytest.raises(ValueError, match=message):
            encode_prompts(tokenizer, ["The boat", prompt])
