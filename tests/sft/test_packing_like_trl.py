"""Packed rows are those of `SFTTrainer(packing=True)`, token by token, for all that TRL reads from a data set."""

from __future__ import annotations

import copy
import json

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from qscope_posttrain.sft import packing
from qscope_posttrain.sft.packing import Preparation, pack_with_languages, prepare_rows, training_tokenizer

MARKED_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% if style is defined %} Style: {{ style }}.{% endif %}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    made = copy.deepcopy(tiny_tokenizer)
    made.chat_template = MARKED_TEMPLATE
    return made


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("qwen3", num_hidden_layers=1)


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def _samples(kind: str, tokenizer) -> list[dict]:
    made = []
    pairs = [
        ("The river runs", " past the old mill."),
        ("河水流过", "旧磨坊。"),
        ("She reads", " a book."),
        ("她", "看书。"),
    ]
    for number, (question, answer) in enumerate(pairs):
        turns = _turns(question, answer)
        ids = tokenizer(question + answer)["input_ids"]
        flags = [i % 3 != 0 for i in range(len(ids))]
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
        columns = {
            "text": {"text": question + answer},
            "ended text": {"text": question + answer + "<|im_end|>"},
            "other field": {"body": question + answer},
            "messages": {"messages": turns},
            "conversations": {
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
            },
            "tools": {"messages": turns, "tools": [TOOL]},
            "tools as text": {"messages": turns, "tools": json.dumps([TOOL])},
            "tool calls": {"messages": [*turns[:2], call, {"role": "tool", "content": "a boat"}, turns[2]]},
            "template arguments": {"messages": turns, "chat_template_kwargs": {"style": "terse" if number else "long"}},
            "prompt": {"prompt": question, "completion": answer},
            "prompt of messages": {"prompt": turns[:2], "completion": turns[2:]},
            "prompt with tools": {
                "prompt": turns[:2],
                "completion": turns[2:],
                "tools": [TOOL],
                "chat_template_kwargs": {"style": "terse"},
            },
            "tokens": {"input_ids": ids},
            "labels": {"input_ids": ids, "labels": [i if f else -100 for i, f in zip(ids, flags, strict=True)]},
            "completion mask": {"input_ids": ids, "completion_mask": [int(flag) for flag in flags]},
            "assistant masks": {"input_ids": ids, "assistant_masks": [int(flag) for flag in flags]},
        }[kind]  # fmt: skip
        made.append({**columns, "language": ("en", "zh")[number % 2], "note": "kept out"})
    return made


KINDS = [
    "text", "ended text", "messages", "conversations", "tools", "tools as text", "tool calls", "template arguments",
    "prompt", "prompt of messages", "prompt with tools", "tokens", "labels", "completion mask", "assistant masks",
]  # fmt: skip
OPTIONS = [
    ("messages", {"assistant_only_loss": True}),
    ("tool calls", {"assistant_only_loss": True}),
    ("prompt of messages", {"assistant_only_loss": True}),
    ("prompt of messages", {"assistant_only_loss": True, "completion_only_loss": False}),
    ("prompt", {"completion_only_loss": False}),
    ("prompt with tools", {"completion_only_loss": False}),
    ("completion mask", {"completion_only_loss": True}),
    ("other field", {"dataset_text_field": "body"}),
    ("text", {"eos_token": "<|endoftext|>"}),
    ("prompt", {"eos_token": "<|endoftext|>"}),
    ("text", {"shuffle_dataset": True, "seed": 3}),
    ("text", {"packing_strategy": "bfd_split"}),
    ("text", {"packing_strategy": "wrapped"}),
    ("prompt", {"packing_strategy": "wrapped", "shuffle_dataset": True}),
    ("messages", {"chat_template_path": "{file}"}),
    ("messages", {"chat_template_path": "{folder}"}),
]


def _compared(model, tokenizer, samples, tmp_path, formatting_func=None, **options):
    """Rows of the trainer, and ours, for the same settings."""
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "packing": True}
    args = SFTConfig(**settings, max_length=24, **options)
    dataset = Dataset.from_list(samples)
    before = (tokenizer.chat_template, tokenizer.eos_token, len(tokenizer))
    ours = pack_with_languages(dataset, tokenizer, args=args, formatting_func=formatting_func)
    assert before == (tokenizer.chat_template, tokenizer.eos_token, len(tokenizer))
    trainer = SFTTrainer(
        model=copy.deepcopy(model),
        args=args,
        train_dataset=dataset,
        processing_class=copy.deepcopy(tokenizer),
        formatting_func=formatting_func,
    )
    return [dict(row) for row in trainer.train_dataset], [dict(row) for row in ours]


def _check(theirs, ours):
    extra = [{name: row.pop(name) for name in ("language_ids", "language_names")} for row in ours]
    assert ours == theirs
    assert all(len(names["language_ids"]) == len(row["labels"]) for names, row in zip(extra, ours, strict=True))
    assert {name for names in extra for name in names["language_names"]} == {"en", "zh"}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_type_are_the_trainers(kind, model, tokenizer, tmp_path):
    _check(*_compared(model, tokenizer, _samples(kind, tokenizer), tmp_path))


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=[f"{kind}-{'-'.join(given)}" for kind, given in OPTIONS])
def test_rows_for_every_option_are_the_trainers(kind, options, model, tokenizer, tmp_path):
    options = dict(options)
    if options.get("chat_template_path") == "{file}":
        path = tmp_path / "own.jinja"
        path.write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}", encoding="utf-8")
        options["chat_template_path"] = str(path)
    elif options.get("chat_template_path") == "{folder}":
        other = copy.deepcopy(tokenizer)
        other.add_special_tokens({"additional_special_tokens": ["<turn>"], "eos_token": "<stop>"})
        other.chat_template = "{% for m in messages %}<turn>{{ m['role'] }} {{ m['content'] }}<stop>{% endfor %}"
        other.save_pretrained(tmp_path / "other")
        options["chat_template_path"] = str(tmp_path / "other")
    _check(*_compared(model, tokenizer, _samples(kind, tokenizer), tmp_path, **options))


def test_a_formatting_function_is_applied(model, tokenizer, tmp_path):
    samples = [{**row, "body": row.pop("text")} for row in _samples("text", tokenizer)]
    _check(*_compared(model, tokenizer, samples, tmp_path, formatting_func=lambda row: f"# {row['body']}"))


def test_documents_of_one_packed_row_keep_their_own_language(tokenizer):
    dataset = Dataset.from_list(_samples("prompt of messages", tokenizer))
    (row,) = pack_with_languages(dataset, tokenizer, max_length=400)
    prepared = prepare_rows(dataset, tokenizer, Preparation())
    documents, start = [], 0
    for length in row["seq_lengths"]:
        part = slice(start, start + length)
        names = {row["language_names"][one] for one in row["language_ids"][part]}
        documents.append((row["input_ids"][part], *names))
        start += length
    assert sorted(documents) == sorted((one["input_ids"], one["language"]) for one in prepared)


@pytest.mark.parametrize("kind", ["prompt of messages", "labels", "text"])
def test_script_is_decided_by_what_is_learned(kind, tokenizer):
    """An English system prompt and template outweigh a short Chinese answer in every count of letters."""
    samples = _samples(kind, tokenizer)
    if kind == "labels":  # the tokens of a conversation, of which the last two are learned
        for row in samples:
            ids = tokenizer("Be brief and kind. " + ("旧磨坊" if row["language"] == "zh" else "a mill"))["input_ids"]
            learned = len(tokenizer("Be brief and kind. ")["input_ids"])
            row |= {"input_ids": ids, "labels": [-100] * learned + ids[learned:]}
    dataset = Dataset.from_list([{key: value for key, value in row.items() if key != "language"} for row in samples])
    packed = pack_with_languages(dataset, tokenizer, max_length=400, language="script", languages=("en", "zh"))
    found = [row["language_names"][one] for row in packed for one in row["language_ids"]]
    lengths = [len(one) for one in prepare_rows(dataset, tokenizer, Preparation())["input_ids"]]
    expected = {
        code: sum(n for n, row in zip(lengths, samples, strict=True) if row["language"] == code)
        for code in ("en", "zh")
    }
    assert {code: found.count(code) for code in ("en", "zh")} == expected


def test_mistakes_are_refused(tokenizer, tmp_path, monkeypatch):
    text = Dataset.from_list([{"text": "a", "language": "en"}])
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=8)
    for options, error, message in (
        ({"args": args, "strategy": "wrapped"}, TypeError, "packing_strategy: part of args"),
        ({}, ValueError, "needs max_length"),
        ({"max_length": 8, "assistant_only_loss": True}, ValueError, "needs conversations"),
    ):
        with pytest.raises(error, match=message):
            pack_with_languages(text, tokenizer, **options)
    with pytest.raises(ValueError, match="images"):
        pack_with_languages(Dataset.from_list([{"messages": [], "images": []}]), tokenizer, max_length=8)
    unmarked = copy.deepcopy(tokenizer)
    unmarked.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{# {% generation %} #}"
    turns = Dataset.from_list([{"messages": _turns("a", "b"), "language": "en"}])
    with pytest.raises(ValueError, match="without assistant tokens"):
        pack_with_languages(turns, unmarked, max_length=8, assistant_only_loss=True)
    with pytest.raises(ValueError, match="not in the vocabulary"):
        training_tokenizer(tokenizer, Preparation(eos_token="<nothing>"))
    monkeypatch.setattr(packing, "_PREPARE_ARGUMENTS", ("self", "dataset"))
    with pytest.raises(TypeError, match="another way"):
        pack_with_languages(text, tokenizer, max_length=8)
