"""A transformers model as a chat model: like `generate` by hand, whatever the batch; through the same cache."""

from __future__ import annotations

import pytest
import torch

from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.chat import ChatRequest, Message, Sampling
from qscope_posttrain.endpoint.local_model import LocalChatModel
from qscope_posttrain.endpoint.session import ChatSession

GREEDY = Sampling(temperature=0, max_tokens=8)


def ask(text, sampling=GREEDY, sample=0):
    return ChatRequest((Message("user", text),), sampling, sample)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


def test_greedy_answers_are_those_of_generate(model, tiny_tokenizer):
    prompts = ["The river", "She reads a book every evening", "Nobody knew"]
    found = LocalChatModel(model, tiny_tokenizer, name="tiny").complete([ask(prompt) for prompt in prompts])
    for prompt, completion in zip(prompts, found, strict=True):
        chat = tiny_tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        with torch.no_grad():
            whole = model.generate(chat, attention_mask=torch.ones_like(chat), max_new_tokens=8, do_sample=False)
        expected = tiny_tokenizer.decode(whole[0, chat.shape[1] :], skip_special_tokens=True)
        assert completion.text == expected
        assert completion.prompt_tokens == chat.shape[1]
        assert completion.finish_reason in ("stop", "length")


def test_sampling_is_repeatable_and_differs_by_sample(model, tiny_tokenizer):
    chat = LocalChatModel(model, tiny_tokenizer, name="tiny")
    drawn = Sampling(temperature=1.5, max_tokens=12)
    state = torch.random.get_rng_state()
    first, again, other = (chat.complete([ask("The", drawn, n)])[0].text for n in (0, 0, 1))
    assert first == again
    assert first != other
    assert torch.equal(state, torch.random.get_rng_state())


def test_mixed_settings_keep_their_order(model, tiny_tokenizer, tmp_path):
    chat = LocalChatModel(model, tiny_tokenizer, name="tiny", batch_size=2)
    requests = [ask("The river"), ask("She", Sampling(temperature=0, max_tokens=3)), ask("Nobody"), ask("We bought")]
    with CompletionCache(tmp_path / "answers.jsonl") as cache:
        session = ChatSession(chat, cache)
        found = session.complete(requests)
        assert session.usage.sent == 4
        alone = [chat.complete([request])[0].text for request in requests]
        assert [completion.text for completion in found] == alone
        assert found[1].completion_tokens <= 3
        assert session.complete(requests) == found
        assert session.usage.sent == 4


def test_needs_a_chat_template_and_a_name(model, tiny_tokenizer):
    with pytest.raises(ValueError, match="name="):
        LocalChatModel(model, tiny_tokenizer)
    with pytest.raises(ValueError, match="batch_size"):
        LocalChatModel(model, tiny_tokenizer, name="tiny", batch_size=0)
