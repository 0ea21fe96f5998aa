"""Packed rows are token by token what `SFTTrainer` makes, for every kind of data set, column and option."""

from __future__ import annotations

import copy
import json

import pytest
from datasets import Dataset, IterableDataset
from sft.cases import case_model
from trl import SFTConfig, SFTTrainer

from qscope_posttrain.sft.data.packing import pack_with_languages
from qscope_posttrain.sft.data.preparation import trained_tokenizer

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] or '' }}"
    "{% for call in m['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% if style is defined %} {{ style }}.{% endif %}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "clock", "description": "Time.", "parameters": {"type": "object", "properties": {}}},
    }
]
KINDS = ["text", "prompt", "chat prompt", "messages", "conversations", "tool calls", "labels", "masks", "assistant"]
CHATS = ["chat prompt", "messages", "conversations", "tool calls"]


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    made = copy.deepcopy(tiny_tokenizer)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def rows_of(texts, tokenizer):
    def make(kind, **columns):
        rows = []
        for code in ("en", "zh"):
            for number, text in enumerate(texts[code]):
                asked, answer = text[:6], text[6:] * (1 + number)
                user, reply = {"role": "user", "content": asked}, {"role": "assistant", "content": answer}
                ids = tokenizer(answer)["input_ids"]
                mask = [0] * 2 + [1] * (len(ids) - 2)
                call = {**reply, "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": "{}"}}]}
                row = {
                    "text": {"text": text},
                    "prompt": {"prompt": asked, "completion": answer},
                    "chat prompt": {"prompt": [user], "completion": [reply]},
                    "messages": {"messages": [user, reply, user, reply]},
                    "conversations": {
                        "conversations": [{"from": "user", "value": asked}, {"from": "assistant", "value": answer}]
                    },
                    "tool calls": {"messages": [user, call, {"role": "tool", "content": "noon"}, reply]},
                    "labels": {"input_ids": ids, "labels": [-100, *ids[1:]]},
                    "masks": {"input_ids": ids, "completion_mask": mask},
                    "assistant": {"input_ids": ids, "assistant_masks": mask},
                }[kind]  # fmt: skip
                rows.append({**row, "language": code, **columns})
        return Dataset.from_list(rows)

    return make


@pytest.fixture(scope="module")
def by_trl(make_model, tokenizer):
    """The training rows that a stock trainer makes."""
    model = case_model(make_model)

    def make(dataset, **options):
        args = SFTConfig(output_dir="/tmp/unused", use_cpu=True, bf16=False, report_to="none", **options)
        trainer = SFTTrainer(
            copy.deepcopy(model), args, train_dataset=dataset, processing_class=copy.deepcopy(tokenizer)
        )
        return trainer.train_dataset

    return make


def assert_same(dataset, tokenizer, by_trl, max_length=24, strategy="bfd", **options):
    before = tokenizer.chat_template, tokenizer.eos_token, len(tokenizer)
    seed = {"shuffle_seed": options.pop("seed")} if "seed" in options else {}
    shuffled = {"shuffle_dataset": True, "seed": seed["shuffle_seed"]} if seed else {}
    packed = pack_with_languages(dataset, tokenizer, max_length=max_length, strategy=strategy, **options, **seed)
    expected = by_trl(dataset, packing=True, packing_strategy=strategy, max_length=max_length, **options, **shuffled)
    for column in expected.column_names:
        assert packed[column][:] == expected[column][:], column
    lengths = [len(row) for row in packed["input_ids"]]
    assert [len(row) for row in packed["language_ids"]] == lengths
    assert (tokenizer.chat_template, tokenizer.eos_token, len(tokenizer)) == before
    return packed


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(rows_of, tokenizer, by_trl, kind):
    packed = assert_same(rows_of(kind), tokenizer, by_trl)
    assert {tuple(row) for row in packed["language_names"]} == {("en", "zh")}


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize(
    "columns",
    [{"tools": TOOLS}, {"tools": json.dumps(TOOLS)}, {"chat_template_kwargs": {"style": "terse"}}],
    ids=["tools", "tools as JSON", "template arguments"],
)
def test_every_column_for_the_template(rows_of, tokenizer, by_trl, kind, columns):
    plain = pack_with_languages(rows_of(kind), tokenizer, max_length=400)
    packed = assert_same(rows_of(kind, **columns), tokenizer, by_trl, max_length=400)
    assert sum(map(len, packed["input_ids"])) > sum(map(len, plain["input_ids"]))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[(kind, {"assistant_only_loss": True}) for kind in CHATS if kind != "conversations"],
        *[(kind, {"completion_only_loss": on}) for kind in ("prompt", "chat prompt", "masks") for on in (True, False)],
        ("chat prompt", {"assistant_only_loss": True, "completion_only_loss": True}),
        ("text", {"eos_token": "<|endoftext|>"}),
        ("prompt", {"eos_token": "<|endoftext|>"}),
        ("prompt", {"strategy": "bfd_split"}),
        ("prompt", {"strategy": "wrapped"}),
        ("messages", {"seed": 3}),
    ],
)  # fmt: skip
def test_every_option(rows_of, tokenizer, by_trl, kind, options):
    assert_same(rows_of(kind), tokenizer, by_trl, **options)


def test_another_column_of_text(rows_of, tokenizer, by_trl):
    assert_same(rows_of("text").rename_column("text", "body"), tokenizer, by_trl, dataset_text_field="body")


def test_a_template_of_trl_for_training(rows_of, tokenizer, by_trl):
    """A known template without markers gets them from TRL."""
    from trl.chat_template_utils import qwen3_chat_template

    known = copy.deepcopy(tokenizer)
    known.chat_template = qwen3_chat_template
    packed = pack_with_languages(rows_of("messages"), known, max_length=400, assistant_only_loss=True)
    labels = [label for row in packed["labels"] for label in row]
    assert -100 in labels
    assert set(labels) != {-100}


@pytest.mark.parametrize("source", ["file", "model"])
def test_the_chat_template_of_a_file_and_of_a_model(rows_of, tokenizer, by_trl, tmp_path, source):
    other = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    path = tmp_path / "chat.jinja"
    if source == "file":
        path.write_text(other)
    else:
        model = copy.deepcopy(tokenizer)
        model.add_tokens(["<|turn|>"], special_tokens=True)
        model.chat_template, model.eos_token = other, "<|endoftext|>"
        path = tmp_path / "model"
        model.save_pretrained(path)
    packed = assert_same(rows_of("messages"), tokenizer, by_trl, chat_template_path=str(path))
    added = trained_tokenizer(tokenizer, chat_template_path=str(path)).convert_tokens_to_ids("<|turn|>")
    assert (added in packed["input_ids"][0]) == (source == "model")


class TestRefusals:
    @pytest.mark.parametrize(
        ("row", "options", "message"),
        [
            ({"image": 1, "messages": [{"role": "user", "content": "a"}]}, {}, "column 'image'"),
            ({"text": "a"}, {"assistant_only_loss": True}, "needs conversations"),
            ({"prompt": "a"}, {}, r"columns prompt, language.*'completion' is missing"),
            ({"text": "a"}, {"eos_token": "<nothing>"}, "not in the vocabulary"),
            ({"text": "a"}, {"chat_template_path": "nowhere"}, "template file .* or a model"),
            ({"text": "a"}, {"strategy": "best"}, "one of bfd, bfd_split, wrapped"),
            ({"text": "a"}, {"max_length": 0}, "at least 1"),
            ({"input_ids": [5, 6], "labels": [5]}, {}, "2 tokens but 1 labels"),
            ({"input_ids": [5], "labels": [5], "language_ids": [0]}, {}, "packed already"),
        ],
    )
    def test_named(self, tokenizer, row, options, message):
        dataset = Dataset.from_list([{**row, "language": "en"}])
        with pytest.raises(ValueError, match=message):
            pack_with_languages(dataset, tokenizer, **{"max_length": 8, **options})

    def test_the_row_that_cannot_be_prepared(self, tokenizer):
        dataset = Dataset.from_list([{"text": "a" if i != 5 else None, "language": "en"} for i in range(9)])
        with pytest.raises(ValueError, match="Row 5 of the data cannot be prepared"):
            pack_with_languages(dataset, tokenizer, max_length=8)

    def test_a_template_without_markers(self, tiny_tokenizer, rows_of):
        with pytest.raises(ValueError, match="generation"):
            pack_with_languages(rows_of("messages"), tiny_tokenizer, max_length=8, assistant_only_loss=True)

    def test_a_stream(self, tokenizer):
        with pytest.raises(TypeError, match="load the whole data set"):
            pack_with_languages(IterableDataset.from_generator(lambda: iter([])), tokenizer, max_length=8)

    def test_a_damaged_template_file(self, tokenizer, tmp_path):
        (tmp_path / "chat.jinja").write_bytes(b"caf\xe9")
        with pytest.raises(ValueError, match=r"chat\.jinja.*UTF-8"):
            trained_tokenizer(tokenizer, chat_template_path=str(tmp_path / "chat.jinja"))

    def test_a_byte_order_mark_is_no_token_of_a_template(self, tokenizer, tmp_path):
        (tmp_path / "chat.jinja").write_bytes(b"\xef\xbb\xbfa")
        assert trained_tokenizer(tokenizer, chat_template_path=str(tmp_path / "chat.jinja")).chat_template == "a"

    def test_a_trainer_that_prepares_by_something_else(self, monkeypatch, tokenizer):
        """Another version of TRL is stopped, not taken for a mistake in the data."""
        monkeypatch.setattr(SFTTrainer, "_prepare_dataset", lambda self, *_: self.new_option)
        with pytest.raises(NotImplementedError, match="'new_option', which qscope_posttrain does not know"):
            pack_with_languages(Dataset.from_list([{"text": "a", "language": "en"}]), tokenizer, max_length=8)
