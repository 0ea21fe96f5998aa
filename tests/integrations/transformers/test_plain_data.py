"""Languages in a plain trainer's batches, checked by themselves: a wrong one gives a right gradient of wrong rows."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from integrations.reference import (
    KeepGradients,
    make_features,
    make_rows,
    paper_callback,
    reference_gradients,
    relative_error,
    row_penalty,
    rows_read,
    watch,
)
from integrations.transformers.plain import make_plain
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    default_data_collator,
)

WEIGHT = 4.0
SCRIPTS = ("en", "zh", "ru")
SYSTEM = "You are a helpful assistant that answers questions as well as it can. Think before you answer."
ANSWERS = {"en": "At noon.", "zh": "中午。", "ru": "В полдень."}


@pytest.fixture
def chats(tiny_tokenizer, texts):
    """Short answers after a long English system prompt, in ChatML, tokenized, with labels on the answer alone."""
    rows = []
    for number in range(9):
        language = SCRIPTS[number % 3]
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": texts["en"][number % 4]}]
        prompt = tiny_tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        answer = tiny_tokenizer(ANSWERS[language] + "<|im_end|>\n")["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "language": language})
    return rows


@pytest.fixture
def run(model, tiny_tokenizer):
    """Train a step; what the callback read, the gradients, and the trainer."""

    def run(rows, languages=("en", "zh", "fr"), language="language", **arguments):
        features, keep = make_features(model, languages=languages), KeepGradients()
        batches = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
        trainer = make_plain(
            copy.deepcopy(model),
            rows,
            [paper_callback(features, weight=WEIGHT, language=language), keep],
            tokenizer=tiny_tokenizer,
            **{**batches, **arguments},
        )
        seen = watch(trainer)
        trainer.train()
        read = rows_read(seen, languages)
        expected, _, _ = reference_gradients(model, read, row_penalty(features), WEIGHT)
        without, _, _ = reference_gradients(model, read, row_penalty(features), 0.0)
        assert relative_error(without, expected) > 0.5
        assert relative_error(keep.gradients, expected) <= 1e-6
        return read, trainer

    return run


def told(rows):
    """The language of every row, by its tokens."""
    return {tuple(row["input_ids"]): row["language"] for row in rows}


@pytest.fixture
def collators(tiny_tokenizer):
    return {
        "seq2seq": DataCollatorForSeq2Seq(tiny_tokenizer),
        "flattening": DataCollatorWithFlattening(),
        "language modeling": DataCollatorForLanguageModeling(tiny_tokenizer, mlm=False),
    }


def columns_for(collator, rows, *more):
    """Rows with the columns that a collator takes: that for language modeling labels all tokens itself."""
    taken = ("input_ids", *more) if collator == "language modeling" else ("input_ids", "labels", *more)
    return [{name: row[name] for name in taken} for row in rows]


@pytest.mark.parametrize("rule", ["column", "function"])
@pytest.mark.parametrize("collator", ["seq2seq", "flattening", "language modeling"])
def test_a_column_that_the_trainer_would_remove(run, collators, collator, rule):
    """It decides the language and never reaches the trainer's collator or the model."""
    seen = set()

    def collate(rows):
        seen.update(*rows)
        return collators[collator](rows)

    rows = columns_for(collator, make_rows(9), "language")
    language = "language" if rule == "column" else lambda example: example["language"]
    read, trainer = run(rows, language=language, collator=collate)
    assert told(read) == told(rows)
    assert seen == rows[0].keys() - {"language"}
    assert trainer.data_collator is collate
    assert "language" not in trainer._signature_columns


@pytest.mark.parametrize("collator", ["seq2seq", "flattening", "language modeling"])
def test_a_system_prompt_does_not_outweigh_a_short_answer(run, collators, chats, collator):
    read, _ = run(columns_for(collator, chats), SCRIPTS, "script", collator=collators[collator])
    assert told(read) == told(chats)
    if collator == "language modeling":
        assert all(row["labels"] == row["input_ids"] for row in read)


def test_documents_of_a_row_that_is_packed_with_position_ids(run, chats):
    """A row of several documents, as packing makes it, whose end is padding: each has its own language."""
    packed = []
    for group in (chats[:3], chats[3:6], chats[6:]):
        row = {name: [token for chat in group for token in chat[name]] for name in ("input_ids", "labels")}
        row["position_ids"] = [place for chat in group for place in range(len(chat["input_ids"]))]
        fill = 360 - len(row["input_ids"])
        row["input_ids"] += [0] * fill
        row["labels"] += [-100] * fill
        row["position_ids"] += [0] * fill
        packed.append(row)
    arguments = {"per_device_train_batch_size": 1, "collator": default_data_collator}
    read, _ = run(packed, SCRIPTS, "script", **arguments)
    assert told(read) == told(chats)


def test_blocks_of_one_length_without_an_attention_mask(run):
    rows = [{name: (row[name] * 4)[:20] for name in ("input_ids", "labels")} | {"language": row["language"]}
            for row in make_rows(9)]  # fmt: skip
    for row in rows:
        row["labels"] = list(row["input_ids"])
    read, _ = run(rows, collator=lambda rows: default_data_collator([dict(row) for row in rows]))
    assert told(read) == told(rows)


@pytest.mark.parametrize("rule", ["column", "script"])
def test_streams_and_data_sets_of_torch(run, chats, rule):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(chats)

        def __getitem__(self, index):
            return chats[index]

    language = "language" if rule == "column" else "script"
    for rows in (Dataset.from_list(chats).to_iterable_dataset(), Rows()):
        read, _ = run(rows, SCRIPTS, language)
        assert told(read) == told(chats)


def test_texts_that_the_collator_tokenizes(run, tiny_tokenizer, texts):
    rows = [{"text": texts[language][number]} for number in range(3) for language in SCRIPTS]

    def collate(rows):
        batch = tiny_tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

    read, _ = run(rows, SCRIPTS, "script", collator=collate, remove_unused_columns=False)
    expected = [tiny_tokenizer(row["text"])["input_ids"] for row in rows]
    assert told(read) == {tuple(ids): SCRIPTS[place % 3] for place, ids in enumerate(expected)}


def test_a_trainer_with_a_data_loader_of_its_own(run, chats, tiny_tokenizer):
    """By script the batch itself tells, so that it does not matter who made it."""
    collator = DataCollatorForSeq2Seq(tiny_tokenizer)

    class OwnLoader(Trainer):
        def get_train_dataloader(self):
            rows = [{name: row[name] for name in ("input_ids", "labels")} for row in self.train_dataset]
            return self.accelerator.prepare(torch.utils.data.DataLoader(rows, 3, collate_fn=collator))

    read, _ = run(chats, SCRIPTS, "script", kind=OwnLoader)
    assert told(read) == told(chats)
    with pytest.raises(ValueError, match=r"no 'sasft_language_ids'.*get_train_dataloader"):
        run(chats, SCRIPTS, kind=OwnLoader)
