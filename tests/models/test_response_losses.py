from __future__ import annotations

import pytest
import torch

from qscope_posttrain.models import scoring
from qscope_posttrain.models.scoring import response_losses, text_losses


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


def by_hand(model, ids, start):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logits[t - 1, ids[t]]) for t in range(start, len(ids)))


def test_losses_equal_one_forward_per_response(model):
    prompts, responses = [(5, 6, 7), (8,), (9, 10)], [(11, 12), (13, 14, 15, 16), ()]
    losses, tokens = response_losses(model, prompts, responses, tokens_per_batch=8)
    assert tokens.tolist() == [2, 4, 0]
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        assert float(losses[number]) == pytest.approx(by_hand(model, [*prompt, *response], len(prompt)), rel=1e-5)


def test_texts_predict_all_but_the_first_token(model, tiny_tokenizer, texts):
    losses, tokens = text_losses(model, tiny_tokenizer, texts["en"][:5], tokens_per_batch=64)
    for number, line in enumerate(texts["en"][:5]):
        ids = tiny_tokenizer(line)["input_ids"]
        assert int(tokens[number]) == len(ids) - 1
        assert float(losses[number]) == pytest.approx(by_hand(model, ids, 1), rel=1e-5)


def test_a_large_vocabulary_makes_the_batches_smaller(model, tiny_tokenizer, texts, monkeypatch):
    lines = texts["en"][:6]
    whole, _ = text_losses(model, tiny_tokenizer, lines)
    longest = max(len(tiny_tokenizer(line)["input_ids"]) for line in lines)
    monkeypatch.setattr(scoring, "LOGITS_OF_A_FORWARD", longest * model.config.vocab_size)
    sizes = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *call: sizes.append(call[2].numel()))
    parts, _ = text_losses(model, tiny_tokenizer, lines)
    handle.remove()
    assert len(sizes) > 1
    assert max(sizes) <= scoring.LOGITS_OF_A_FORWARD
    assert torch.allclose(parts, whole, rtol=1e-6)


@pytest.mark.parametrize(("prompts", "responses"), [([()], [(1,)]), ([(1,)], [])])
def test_refusals(model, prompts, responses):
    with pytest.raises(ValueError, match=r"empty prompt|1 prompts but 0"):
        response_losses(model, prompts, responses)
