"""A transformers model as a chat model: like `generate` by hand, whatever the batch; through the same cache."""

from __future__ import annotations

import copy

import pytest
import torch

from qscope_posttrain.endpoint.cache import CompletionCache
from qscope_posttrain.endpoint.chat import ChatRequest, Message, RequestRefused, Sampling
from qscope_posttrain.endpoint.models import LocalChatModel, with_user
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


def test_answers_are_drawn_as_asked_and_not_as_the_model_s_own_defaults_say(make_model, tiny_tokenizer):
    """Greedy and sampled answers of a model whose configuration would have penalties and filters."""
    shaped, plain = make_model(), make_model()
    own = shaped.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.bad_words_ids = 5.0, 1, [[3], [4]]
    own.min_p, own.top_k, own.typical_p = 0.9, 1, 0.2
    requests = [ask("The river"), ask("She reads"), ask("The river", Sampling(temperature=2.0, max_tokens=12))]
    found, expected = (
        [completion.text for completion in LocalChatModel(model, tiny_tokenizer, name="tiny").complete(requests)]
        for model in (shaped, plain)
    )
    assert found == expected
    assert shaped.generation_config is own
    assert (own.repetition_penalty, own.top_k) == (5.0, 1)


WRITES = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{% if thinking is defined %}think{% endif %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + WRITES
LEAVES_OUT = "{% for m in messages if m.role == 'user' %}user: {{ m.content }} {% endfor %}"


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize("template", [REFUSES, LEAVES_OUT])
def test_a_system_message_without_a_place_goes_before_the_user_s(model, tiny_tokenizer, template):
    system = ChatRequest((Message("system", "Be brief."), Message("user", "The river")), GREEDY)
    merged = ChatRequest((Message("user", "Be brief.\n\nThe river"),), GREEDY)
    chat = LocalChatModel(model, with_template(tiny_tokenizer, template), name="tiny")
    found, expected = (chat.complete([request])[0] for request in (system, merged))
    assert (found.text, found.prompt_tokens) == (expected.text, expected.prompt_tokens)
    kept = LocalChatModel(model, with_template(tiny_tokenizer, WRITES), name="tiny")
    assert kept.complete([system])[0].prompt_tokens != kept.complete([merged])[0].prompt_tokens


def test_system_messages_are_merged_in_order():
    system, user, answer = Message("system", "s"), Message("user", "u"), Message("assistant", "a")
    assert with_user((system, user, answer, user)) == (Message("user", "s\n\nu"), answer, user)
    assert with_user((system, system, user)) == (Message("user", "s\n\ns\n\nu"),)
    assert with_user((system,)) == (Message("user", "s"),)
    assert with_user((user, answer)) == (user, answer)


def test_a_chat_that_the_template_refuses_is_a_mistake_that_is_named(model, tiny_tokenizer):
    strict = with_template(tiny_tokenizer, "{{ raise_exception('only in pairs') }}")
    with pytest.raises(ValueError, match="refuses a chat of user: only in pairs"):
        LocalChatModel(model, strict, name="tiny").complete([ask("The river")])


def test_template_options_reach_the_template_and_the_identity(model, tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, WRITES)
    plain = LocalChatModel(model, tokenizer, name="tiny")
    thinking = LocalChatModel(model, tokenizer, name="tiny", template_options={"thinking": True})
    counts = [chat.complete([ask("The river")])[0].prompt_tokens for chat in (plain, thinking)]
    assert counts[0] < counts[1]
    assert ask("a").key(plain.identity) != ask("a").key(thinking.identity)


def test_what_the_model_has_no_room_for_is_refused_and_the_others_are_answered(model, tiny_tokenizer, tmp_path):
    room = model.config.max_position_embeddings
    chat = LocalChatModel(model, tiny_tokenizer, name="tiny")
    long = ask("the river " * room)
    with pytest.raises(RequestRefused, match=f"{room} positions"):
        chat.complete([long])
    with CompletionCache(tmp_path / "answers.jsonl") as cache:
        found = ChatSession(chat, cache).complete([ask("The river"), long, ask("She")])
        assert [bool(completion.refusal) for completion in found] == [False, True, False]


def test_needs_a_chat_template_and_a_name(model, tiny_tokenizer):
    with pytest.raises(ValueError, match="name="):
        LocalChatModel(model, tiny_tokenizer)
    with pytest.raises(ValueError, match="batch_size"):
        LocalChatModel(model, tiny_tokenizer, name="tiny", batch_size=0)
