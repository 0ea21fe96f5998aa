"""`language="script"` goes by the response, in every type of data and wherever text in another language stands."""

from __future__ import annotations

import copy

import pytest
from datasets import Dataset
from sft.cases import LANGUAGES, case_model, make_features
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.data.language_ids import NO_LANGUAGE, SampleLanguage, response_texts
from qscope_posttrain.sft.data.packing import pack_with_languages
from qscope_posttrain.sft.data.train_data import LanguageCollator

KNOWN = ("zh", "ru", "en")
SYSTEM = "You are a helpful assistant. Think before you answer, and always be polite to the person who asks you."
CODE = "\n```python\ndef total(values):\n    return sum(value for value in values if value is not None)\n```\n"
RESPONSES = {
    "zh": "没有人知道钟停了。",
    "ru": "Никто не знал.",
    "en": "Nobody knew.",
}
REQUESTS = {
    "zh": "Why did the clock stop at noon, and who noticed it first?",
    "en": "钟为什么在中午停了下来？是谁先发现的？",
}
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversations():
    """(turns, language of the response): foreign text in the system prompt, the request, an earlier turn, code."""
    for language, response in RESPONSES.items():
        request = REQUESTS.get(language, REQUESTS["zh"])
        system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": request}
        if language == "en":
            system = {"role": "system", "content": "你是一个乐于助人的助手。回答之前请先思考，对提问的人要有礼貌。" * 2}
        yield [user, {"role": "assistant", "content": response}], language
        yield [system, user, {"role": "assistant", "content": response}], language
        yield [system, user, {"role": "assistant", "content": response + CODE}], language


def data(kind, tokenizer):
    made = []
    for turns, language in conversations():
        *prompt, answer = turns
        head = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        ids, start = tokenizer(whole)["input_ids"], len(tokenizer(head)["input_ids"])
        row = {
            "messages": {"messages": turns},
            "assistant turns": {"messages": turns},
            "conversations": {"conversations": [{"from": t["role"], "value": t["content"]} for t in turns]},
            "prompt": {"prompt": head, "completion": answer["content"]},
            "whole prompt": {"prompt": head, "completion": answer["content"]},
            "conversation": {"prompt": prompt, "completion": [answer]},
            "text": {"text": whole},
            "tokens": {"input_ids": ids, "labels": [-100] * start + ids[start:]},
            "masks": {"input_ids": ids, "completion_mask": [0] * start + [1] * (len(ids) - start)},
            "unlabelled tokens": {"input_ids": ids},
        }[kind]
        made.append(row | {"expected": language})
    return Dataset.from_list(made)


KINDS = ("messages", "assistant turns", "conversations", "prompt", "whole prompt", "conversation", "text", "tokens")
KINDS += ("masks", "unlabelled tokens")


def config(kind, **options):
    return SFTConfig(
        output_dir="/tmp/unused", use_cpu=True, bf16=False, report_to="none", max_length=None,
        assistant_only_loss=kind == "assistant turns", completion_only_loss=False if kind == "whole prompt" else None,
        **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def marked(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = GENERATION
    tokenizer.model_max_length = 10_000
    return tokenizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_in_the_trainers_batches(make_model, marked, kind, padding_free):
    """The known languages tell the rows apart by script, and the callback looks at every row as it attaches."""
    dataset = data(kind, marked)
    model = case_model(make_model, max_position_embeddings=2048)
    trainer = SFTTrainer(
        model=model,
        args=config(kind, padding_free=padding_free, per_device_train_batch_size=4, remove_unused_columns=True),
        train_dataset=dataset,
        processing_class=marked,
    )
    rows = {tuple(row["input_ids"]): row["expected"] for row in trainer.train_dataset}
    found = {}
    with SASFTCallback(make_features(model, languages=KNOWN), language="script").attach(trainer):
        for batch in trainer.get_train_dataloader():
            ids, languages = batch["input_ids"].flatten().tolist(), batch["sasft_language_ids"].flatten().tolist()
            for tokens, language in rows.items():
                starts = [i for i in range(len(ids)) if tuple(ids[i : i + len(tokens)]) == tokens]
                for start in starts:
                    found[tokens] = {KNOWN[i] for i in languages[start : start + len(tokens)]}
                    assert found[tokens] == {language}, marked.decode(tokens)
    assert found.keys() == rows.keys()


@pytest.mark.parametrize("kind", ["messages", "prompt", "conversation", "text", "tokens"])
def test_packed(marked, kind):
    dataset = data(kind, marked)
    packed = pack_with_languages(dataset, marked, max_length=4000, language="script", languages=KNOWN)
    found = []
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            found.append(row["language_names"][row["language_ids"][start]])
            start += length
    assert sorted(found) == sorted(dataset["expected"])


def turn(content, role="assistant"):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("example", "language"),
    [
        # A few names in Latin letters
        ({"completion": "小船 iPhone Pro Max"}, "zh"),
        ({"completion": "我买了 iPhone 15 Pro Max 和 MacBook Pro。"}, "zh"),
        ({"completion": "저는 Samsung Galaxy Note 를 샀어요"}, "ko"),
        ({"completion": "Я работаю в Google и Microsoft."}, "ru"),
        ({"completion": "The character 小船 means boat."}, "en"),
        ({"completion": "Apple's CEO Tim Cook visited 北京大学"}, "en"),
        # What is no prose
        ({"completion": "<think>\n\n</think>\n\n是的。"}, "zh"),
        ({"completion": "<think>\nThe user asks for three rivers.\n</think>\n\n长江、黄河和珠江。"}, "zh"),
        ({"completion": "用户问的是三条河流。\n</think>\n\nYangtze, Yellow River, Pearl River."}, "en"),
        ({"prompt": "多少？", "completion": "<think>\nSix times seven is needed here.\n</think>\n\n42"}, "en"),
        ({"completion": "<think>\nThe thought was cut off before 答案"}, "en"),
        ({"completion": "\\begin{align*} v &= \\text{distance over time} \\end{align*} 是公式。"}, "zh"),
        ({"completion": "请写信到some.long.name@example-company.com，或见 www.example.com/a/long/path。"}, "zh"),
        ({"completion": "见 https://example.com/some/long/address/of/a/page 。"}, "zh"),
        ({"completion": "解：$\\text{distance} = \\frac{a+b}{c}$，所以是五。"}, "zh"),
        ({"completion": "运行 `pip install transformers accelerate datasets` 即可。"}, "zh"),
        ({"completion": "代码：\n```python\nprint('never closed'"}, "zh"),
        ({"completion": '好<tool_call>\n{"name": "search", "arguments": {"query": "weather"}}\n</tool_call>'}, "zh"),
        ({"completion": "这样安装：\n\n    pip install transformers accelerate datasets\n\n然后运行。"}, "zh"),
        ({"prompt": "μ 是什么？", "completion": "α = 5, β = 3"}, "zh"),
        ({"completion": "def total(values): return values"}, "en"),
        # Without letters of its own the response has the language of the sample
        ({"prompt": "一共有多少个苹果？", "completion": "42"}, "zh"),
        ({"prompt": "一共有多少个苹果？", "completion": "A"}, "zh"),
        ({"prompt": "用代码回答", "completion": "```python\nprint(1)\n```"}, "zh"),
        ({"prompt": "How many apples?", "completion": [turn("42 🍎")]}, "en"),
        ({"prompt": "7 * 6 =", "completion": "42"}, NO_LANGUAGE),
        ({"prompt": "", "completion": ""}, NO_LANGUAGE),
        ({"text": "42"}, NO_LANGUAGE),
        # Turns of others and of tools; parts; earlier turns that are learned as well
        ({"messages": [turn("hello there, my friend", "user"), turn("你好"), turn("and a result", "tool")]}, "zh"),
        ({"messages": [turn([{"type": "text", "text": "你好"}, {"type": "image"}])]}, "zh"),
        ({"messages": [turn("Why is that so?", "user"), turn(None), turn("因为今天下雨。")]}, "zh"),
        ({"prompt": [turn("why", "user")], "completion": [turn("因为下雨"), turn("and then what?", "user")]}, "zh"),
        # Conversations in the text
        ({"text": "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant"
          "<|end_header_id|>\n\n雨<|eot_id|>"}, "zh"),
        ({"text": "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n雨<end_of_turn>\n"}, "zh"),
        ({"text": "<|system|>\nBe polite.</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n雨</s>"}, "zh"),
    ],
)  # fmt: skip
def test_of_one_sample(example, language):
    assert SampleLanguage("script", (*KNOWN, "ko"))(example) == language


def test_only_the_labelled_turn_counts(marked):
    """Masks are the truth also among turns of the assistant: of an English and a Chinese turn one is learned."""
    english, chinese = marked("Nobody knew why the clock had stopped.")["input_ids"], marked("雨停了。")["input_ids"]
    decide = SampleLanguage("script", KNOWN, decode=marked.decode)
    ids = english + chinese
    turns = [turn("Nobody knew why the clock had stopped."), turn("雨停了。")]
    for first, language in ((0, "en"), (len(english), "zh")):
        learned = range(len(english)) if first == 0 else range(first, len(ids))
        labels = [token if place in learned else -100 for place, token in enumerate(ids)]
        mask = [int(place in learned) for place in range(len(ids))]
        assert decide({"messages": turns, "input_ids": ids, "labels": labels}) == language
        assert decide({"messages": turns, "input_ids": ids, "assistant_masks": mask}) == language
        both = {"assistant_masks": mask, "completion_mask": [1] * len(ids)}
        assert decide({"messages": turns, "input_ids": ids, **both}) == language


def test_labels_that_only_the_collator_makes(marked):
    """A collator of the user's own masks the prompt: its labels decide, row by row, padded or not."""

    class AnswerOnly(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            made = [
                {"input_ids": e["input_ids"], "labels": [-100] * e["start"] + e["input_ids"][e["start"] :]}
                for e in examples
            ]
            return super().torch_call(made)

    prompt = marked(SYSTEM)["input_ids"]
    rows = [{"input_ids": prompt + marked(RESPONSES[code])["input_ids"], "start": len(prompt)} for code in KNOWN]
    for padding_free in (False, True):
        collator = LanguageCollator(
            AnswerOnly(0, padding_free=padding_free), SampleLanguage("script", KNOWN, decode=marked.decode), "ids"
        )
        batch = collator(rows)
        assert set(batch["ids"][batch["labels"] != -100].tolist()) == {0, 1, 2}
        found = batch["ids"].flatten().tolist()
        expected = [i for i, row in enumerate(rows) for _ in row["input_ids"]]
        assert [i for i in found if i >= 0] == expected


def test_a_response_that_scripts_do_not_tell_is_refused_with_its_row(make_model, tiny_tokenizer):
    model = case_model(make_model)
    rows = [{"prompt": "为什么", "completion": "因为下雨"}, {"prompt": "为什么", "completion": "Because it rained"}]
    trainer = SFTTrainer(
        model=model, args=config("prompt"), train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer
    )
    with pytest.raises(ValueError, match=r"Row 1 of the training data: The script of 'Because it rained' \(Latin\)"):
        SASFTCallback(make_features(model, languages=LANGUAGES), language="script").attach(trainer)


def test_a_column_that_is_called_script():
    with pytest.raises(ValueError, match="also has a column 'script'"):
        SampleLanguage("script", KNOWN)({"text": "雨", "script": "Han"})


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_rows_in_a_format_of_datasets(tiny_tokenizer, texts, form):
    """Their columns are tensors or arrays, which have no truth value."""
    ids = [tiny_tokenizer(texts[language][0])["input_ids"] for language in ("en", "zh")]
    row = {"input_ids": ids[0] + ids[1], "labels": [-100] * len(ids[0]) + ids[1]}
    (given,) = Dataset.from_list([row]).with_format(form)
    assert SampleLanguage("script", ("en", "zh"), decode=tiny_tokenizer.decode)(given) == "zh"
    del given["labels"]
    assert next(response_texts(given, tiny_tokenizer.decode)).startswith(texts["en"][0][:20])
