"""Prompts that TRL cannot read are refused before the first step, with their row."""

from __future__ import annotations

import copy

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from rl.cases import PROMPTS, make_args, make_trainer, small_model

from qscope_posttrain.cli.training.grpo import parse_recipe
from qscope_posttrain.cli.training.grpo_checks import check_prompts, check_recipe
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.rl.prompts import check_batch, check_dataset

TEXTS = [f"Text {i}" for i in range(200)]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
WRONG = [
    (None, "it is missing"),
    ("", "it is an empty text"),
    ([], "it is an empty list"),
    (7, "got '7', a int"),
    (["a", "b"], "message 0 has no 'role'"),
    ([{"from": "human", "value": "a"}], "message 0 has no 'role'"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": None}], "message 1 has no text"),
    ([{"role": None, "content": "a"}], "message 0 has no 'role'"),
]


@pytest.fixture(scope="module")
def model(make_model):
    return small_model(make_model)


def build(model, tokenizer, dataset, **more):
    return make_trainer(
        model, make_args(), tokenizer, reward=lambda completions, **_: [0.0] * len(completions), train_dataset=dataset,
        **more,
    )  # fmt: skip


@pytest.mark.parametrize(("prompt", "message"), WRONG)
def test_a_prompt_that_cannot_be_read(prompt, message):
    good = CHATS[:3] if isinstance(prompt, list) else TEXTS[:3]
    with pytest.raises(ValueError, match=f"row 3 of the batch: 'prompt' must be text or a list of messages; {message}"):
        check_batch([*good, prompt])


@pytest.mark.parametrize("stream", [False, True])
def test_messages_need_a_chat_template(model, tiny_tokenizer, stream):
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    chats = [{"prompt": chat} for chat in CHATS[:8]]
    rows = IterableDataset.from_generator(lambda: iter(chats)) if stream else Dataset.from_list(chats)
    act = build(model, bare, rows).train if stream else lambda: build(model, bare, rows)
    with pytest.raises(UserValueError, match="the tokenizer has no chat template"):
        act()


def test_what_is_a_prompt():
    check_batch(TEXTS)
    check_batch([*CHATS, [*CHATS[0], CALL], [{"role": "user", "content": [{"type": "text", "text": "a"}]}]])
    check_batch([""], empty_allowed=True)
    with pytest.raises(ValueError, match="row 2 of the batch: 'prompt' is messages, and row 0 has text"):
        check_batch([*TEXTS[:2], CHATS[0]])


@pytest.mark.parametrize("bad", [None, ""])
def test_the_last_row_of_many_is_looked_at(model, tiny_tokenizer, bad):
    rows = Dataset.from_dict({"prompt": [*TEXTS, bad]})
    with pytest.raises(ValueError, match="row 200 of the training data: 'prompt'"):
        build(model, tiny_tokenizer, rows)
    good = Dataset.from_dict({"prompt": TEXTS})
    with pytest.raises(ValueError, match="row 200 of the evaluation data 'b': 'prompt'"):
        build(model, tiny_tokenizer, good, eval_dataset={"a": good, "b": rows})


def test_missing_columns_and_rows():
    with pytest.raises(ValueError, match=r"GRPO needs a column 'prompt'.*has question"):
        check_dataset(Dataset.from_dict({"question": TEXTS}))
    with pytest.raises(ValueError, match="has no rows"):
        check_dataset(Dataset.from_dict({"prompt": []}))


def test_formats_and_selections_do_not_matter():
    rows = Dataset.from_dict({"prompt": [*TEXTS, None], "answer": range(201)})
    check_dataset(rows.select(range(200)).with_format("torch"))
    with pytest.raises(ValueError, match="row 0 of"):
        check_dataset(rows.select([200]).with_format("numpy", columns=["answer"]))


def test_an_empty_text_is_a_prompt_where_the_tokenizer_begins_with_a_token(model, tiny_tokenizer):
    """As in plain TRL."""
    from transformers import PreTrainedTokenizerFast

    begun = PreTrainedTokenizerFast(tokenizer_object=_beginning(tiny_tokenizer), eos_token="<|im_end|>",
                                    pad_token=tiny_tokenizer.pad_token)  # fmt: skip
    assert len(begun("")["input_ids"]) == 1
    build(model, begun, Dataset.from_dict({"prompt": [*PROMPTS, ""]}))


def _beginning(tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    made = deepcopy(tokenizer.backend_tokenizer)
    made.post_processor = TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", 2)])
    return made


@pytest.mark.parametrize("kind", ["stream", "transform"])
def test_what_shows_its_rows_one_by_one_is_looked_at_batch_by_batch(model, tiny_tokenizer, kind):
    rows = [{"prompt": text} for text in [PROMPTS[0], ""]]
    data = IterableDataset.from_generator(lambda: iter(rows))
    if kind == "transform":
        data = Dataset.from_dict({"number": [0, 1]})
        data.set_transform(lambda batch: {"prompt": [rows[i]["prompt"] for i in batch["number"]]})
    trainer = build(model, tiny_tokenizer, data)
    with pytest.raises(ValueError, match="row 4 of the batch: 'prompt' must be text"):
        trainer.train()


def recipe_of(tmp_path, rows, *words):
    Dataset.from_dict({"prompt": rows}).to_json(tmp_path / "rows.jsonl")
    settings = ["--model_name_or_path", "none", "--dataset_name", str(tmp_path / "rows.jsonl"), "--rewards",
                "repetition_penalty", "--output_dir", str(tmp_path / "out"), "--use_cpu", "True"]  # fmt: skip
    return parse_recipe([*settings, *words])


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_command_line_looks_at_every_row(tiny_tokenizer, tmp_path, dry_run):
    rows = Dataset.from_dict({"prompt": TEXTS})
    recipe = recipe_of(tmp_path, TEXTS, *(["--dry_run"] if dry_run else []))
    assert len(check_prompts(recipe, rows, tiny_tokenizer)) == (200 if dry_run else 64)
    with pytest.raises(ValueError, match="row 200 of the data: 'prompt'"):
        check_prompts(recipe, Dataset.from_dict({"prompt": [*TEXTS, ""]}), tiny_tokenizer)
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": ""}]))
    with pytest.raises(ValueError, match="row 0 of the data: 'prompt'"):
        check_prompts(recipe, stream, tiny_tokenizer)


def test_a_dry_run_looks_at_the_evaluation_data_too(model, tiny_tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    rows = {"train": Dataset.from_dict({"prompt": TEXTS}), "test": Dataset.from_dict({"prompt": [*TEXTS, ""]})}
    DatasetDict(rows).save_to_disk(tmp_path / "rows")
    words = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows"), "--rewards",
             "repetition_penalty", "--output_dir", str(tmp_path / "out"), "--use_cpu", "True", "--eval_strategy",
             "steps", "--max_completion_length", "16", "--num_generations", "4", "--dry_run"]  # fmt: skip
    found = {what: (result, detail) for what, result, detail in check_recipe(parse_recipe(words)).findings}
    assert found["prompts"][0] == "ok"
    assert found["evaluation prompts"] == (
        "failed", "row 200 of the data: 'prompt' must be text or a list of messages; it is an empty text.",
    )  # fmt: skip
