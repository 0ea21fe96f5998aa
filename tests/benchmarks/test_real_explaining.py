"""Study 7: what stands in for a chat model reads the package's templates, and answers begin as they are asked for."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from benchmarks.real.stand_ins import Begun, Tokens, beginning, fits, whole
from benchmarks.real.studies import explaining
from qscope_posttrain.endpoint.chat import ChatRequest, Sampling
from qscope_posttrain.features.explain.ask import explain_templates
from qscope_posttrain.synthesis.pipeline import synthesis_templates

FOLDERS = (None, explaining.TEMPLATES)


def ask(template, folder, **content):
    content = {"others": [], "passages": [], "topic": "fruit"} | content
    made = explain_templates if template in ("explain", "detection", "fuzzing") else synthesis_templates
    return ChatRequest(made(folder).messages(template, **content), Sampling(0.0, max_tokens=8))


def answered(request):
    return json.loads(Tokens().complete([request])[0].text)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_list_of_tokens_explains_and_judges_by_the_templates(folder):
    texts = ["my<< Dog>> and a<< dog>>", "the<< cat>> sleeps"]
    found = answered(ask("explain", folder, strongest=[{"text": text, "peak": 1.0} for text in texts]))
    assert found == {"explanation": "one of ' dog', ' cat'"}
    words = found["explanation"]
    passages = ["a dog barks", "a dogma", "Cat!", "none"]
    assert answered(ask("detection", folder, explanation=words, passages=passages)) == [1, 0, 1, 0]
    passages = ["a<< dog>> barks", "a dog<< barks>>", "<<the>><< cat>> and<< dog>>"]
    assert answered(ask("fuzzing", folder, explanation=words, passages=passages)) == [1, 0, 1]


@pytest.mark.parametrize("folder", FOLDERS)
def test_answers_begin_as_they_are_asked_for(folder):
    beginnings = {
        name: beginning(ask(name, folder, explanation="x", strongest=[], kind="benign").messages[-1].content)
        for name in ("explain", "detection", "fuzzing", "relevance", "vanilla")
    }
    assert beginnings == {
        "explain": '{"explanation": "', "detection": "[", "fuzzing": "[", "relevance": '{"relevance": ',
        "vanilla": '{"prompt": "',
    }  # fmt: skip
    assert beginning("How are you?") == ""


def test_a_begun_answer_is_read_by_the_model_and_given_back_whole(make_model, tiny_tokenizer):
    tokenizer = copy.copy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    chat = Begun(make_model(), tokenizer, name="tiny begun")
    request = ask("detection", explaining.TEMPLATES, explanation="x", passages=["a"])
    assert chat._written(request.messages).endswith("numbers\n[")
    assert chat.complete([request])[0].text.startswith("[")


def test_a_text_that_was_begun_is_closed_and_what_is_no_text_is_left():
    assert whole('{"prompt": "', 'He has 3 apples.\nAnswer: 3"}') == '{"prompt": "He has 3 apples."}'
    assert whole('{"prompt": "', 'Say it"} and more') == '{"prompt": "Say it"}'
    assert whole("[", "1, 2]") == "[1, 2]"
    assert whole('{"relevance": ', "0.5}") == '{"relevance": 0.5}'


def test_marks_decide_where_there_are_any():
    assert fits("a dog", ["dog"])
    assert not fits("a<< cat>> and a dog", ["dog"])


def test_a_token_with_a_space_before_it_is_a_whole_word():
    assert not fits("they are going", [" in"])
    assert fits("they are going", ["in"])
    assert fits("In Paris", [" in"])


def test_what_was_not_explained_has_no_scores_and_is_in_the_table():
    tested = {"rows": [["detection", 1, "0.70 [0.60, 0.80]", "0.50", "+0.20", "0 of 8"]]}
    runs = {
        "as it comes": {"features": 8, "said": "none of 8 features"},
        "tokens": {"table": {"rows": [[15, 3]]}, "tested": tested, "skipped": {"layer 15 #4": "no readable"}},
    }
    assert [row[:4] for row in explaining.score_table(runs).rows] == [
        ("as it comes", "0 of 8", None, None),
        ("tokens", "1 of 2", "detection", "0.70 [0.60, 0.80]"),
    ]


def test_area_under_the_curve():
    assert explaining.above(np.array([0.9, 0.5]), np.array([0.5, 0.1])) == 0.875
