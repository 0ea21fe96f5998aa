"""Every real token carries the language of its document, in every kind of batch."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from sft.cases import LANGUAGES, case_model, make_features, make_rows, make_trainer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qscope_posttrain.kernels.penalty import feature_penalty
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.data.language_ids import SampleLanguage
from qscope_posttrain.sft.data.packing import pack_with_languages
from qscope_posttrain.sft.data.train_data import LanguageCollator


@pytest.fixture(scope="module")
def rows():
    """Rows whose every token id tells its row, so that a batch can be read back."""
    made = make_rows(9)
    for i, row in enumerate(made):
        row["input_ids"] = [10 + i] * len(row["input_ids"])
        row["labels"] = [-100 if label == -100 else 10 + i for label in row["labels"]]
    return made


def languages_of(input_ids, rows):
    """What every token's language id should be."""
    return [LANGUAGES.index(rows[int(token) - 10]["language"]) if token >= 10 else -1 for token in input_ids.flatten()]


@pytest.mark.parametrize("batches", ["padded", "padding-free", "bfd", "bfd_split", "wrapped"])
def test_ids_in_the_trainers_own_batches(make_model, tiny_tokenizer, rows, batches):
    model = case_model(make_model)
    dataset = Dataset.from_list(rows)
    if batches not in ("padded", "padding-free"):
        dataset = pack_with_languages(dataset, tiny_tokenizer, max_length=16, strategy=batches)
    trainer = make_trainer(
        copy.deepcopy(model),
        dataset,
        padding_free=batches not in ("padded", "wrapped"),
        processing_class=tiny_tokenizer,
    )
    tokens = 0
    with SASFTCallback(make_features(model)).attach(trainer):
        for batch in trainer.get_train_dataloader():
            assert batch["sasft_language_ids"].flatten().tolist() == languages_of(batch["input_ids"], rows)
            assert batch["sasft_language_ids"].shape == batch["input_ids"].shape
            tokens += int((batch["input_ids"] >= 10).sum())
    dropped = sum(max(len(row["input_ids"]) - 16, 0) for row in rows) if batches == "bfd" else 0
    assert tokens == sum(len(row["input_ids"]) for row in rows) - dropped


def test_packed_data_does_not_depend_on_the_order_of_the_features_languages(make_model, tiny_tokenizer, rows):
    model = case_model(make_model)
    packed = pack_with_languages(Dataset.from_list(rows), tiny_tokenizer, max_length=32)
    trainer = make_trainer(copy.deepcopy(model), packed, padding_free=True, processing_class=tiny_tokenizer)
    reordered = ("fr", "zh", "en")
    with SASFTCallback(make_features(model, languages=reordered)).attach(trainer):
        batch = next(iter(trainer.get_train_dataloader()))
    found = [reordered[i] for i in batch["sasft_language_ids"].flatten().tolist()]
    assert found == [rows[int(token) - 10]["language"] for token in batch["input_ids"].flatten()]


def test_left_padding_and_multiples_are_followed(rows):
    class PadLeft(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            return {key: value.flip(1) for key, value in super().torch_call(examples).items()}

    collator = LanguageCollator(
        PadLeft(0, pad_to_multiple_of=8), SampleLanguage("language", LANGUAGES), "ids", drop=["language"]
    )
    batch = collator(rows[:3])
    assert batch["ids"].flatten().tolist() == languages_of(batch["input_ids"], rows)
    flat = LanguageCollator(
        DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=8),
        SampleLanguage("language", LANGUAGES),
        "ids",
    )(rows[:3])
    assert flat["ids"].flatten().tolist() == languages_of(flat["input_ids"], rows)


def test_script_and_callable_rules(make_model, tiny_tokenizer, texts):
    model = case_model(make_model)
    features = make_features(model, languages=("zh", "ru", "ko"))
    samples = [
        {"prompt": text[:6], "completion": text[6:], "code": code} for code in ("ru", "zh") for text in texts[code]
    ]
    for rule in ("script", lambda example: example["code"]):
        trainer = SFTTrainer(
            model=copy.deepcopy(model),
            args=SFTConfig(output_dir="/tmp/unused", use_cpu=True, bf16=False, report_to="none", max_length=64),
            train_dataset=Dataset.from_list(samples),
            processing_class=tiny_tokenizer,
        )
        with SASFTCallback(features, language=rule).attach(trainer):
            for batch in trainer.get_train_dataloader():
                for ids, row in zip(batch["input_ids"], batch["sasft_language_ids"], strict=True):
                    text = tiny_tokenizer.decode(ids, skip_special_tokens=True)
                    expected = "ru" if any("а" <= letter <= "я" for letter in text) else "zh"
                    real = ids != tiny_tokenizer.pad_token_id
                    assert set(row[real].tolist()) == {features.languages.index(expected)}


def test_script_falls_back_on_the_decoded_tokens(tiny_tokenizer, texts):
    decide = SampleLanguage("script", ("zh", "ru"), decode=tiny_tokenizer.decode)
    assert decide({"input_ids": tiny_tokenizer(texts["ru"][0])["input_ids"]}) == "ru"
    with pytest.raises(ValueError, match="does not decide between en, fr"):
        SampleLanguage("script", ("en", "fr"))({"text": texts["en"][0]})


def test_a_sample_in_an_unknown_language():
    language = SampleLanguage("language", ("en", "zh"), ignore=("th",))
    assert language.id("th") == -1
    with pytest.raises(ValueError, match=r"language 'ko'.*known languages .*: en, zh.*ignore_languages=\('ko',\)"):
        language.id("ko")
    with pytest.raises(ValueError, match="must be a name such as 'en'"):
        language({"language": 3})


def test_truncation_that_leaves_ids_behind_is_noticed():
    collator = LanguageCollator(DataCollatorForLanguageModeling(0), SampleLanguage("language", LANGUAGES), "ids")
    row = {"input_ids": [5, 6], "labels": [5, 6], "language_ids": [0, 0, 0], "language_names": ["en"]}
    with pytest.raises(ValueError, match="2 tokens but 3 language ids"):
        collator([row])


class TestPacking:
    """`pack_with_languages` tokenises like the trainer."""

    @pytest.mark.promise("Packing with languages gives the tokens and labels of TRL's own preparation")
    @pytest.mark.parametrize("kind", ["text", "prompt", "messages", "conversation", "tokens"])
    def test_same_tokens_and_labels_as_the_trainers_preparation(self, make_model, tiny_tokenizer, texts, kind):
        pairs = [(text[:8], text[8:], code) for code in ("en", "zh") for text in texts[code]]

        def sample(prompt, completion, code):
            user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
            ids = tiny_tokenizer(prompt)["input_ids"]
            return {
                "text": {"text": prompt + completion},
                "prompt": {"prompt": prompt, "completion": completion},
                "messages": {"messages": [user, assistant]},
                "conversation": {"prompt": [user], "completion": [assistant]},
                "tokens": {"input_ids": ids, "labels": [-100, *ids[1:]]},
            }[kind] | {"language": code}

        dataset = Dataset.from_list([sample(*pair) for pair in pairs])
        trainer = SFTTrainer(
            model=case_model(make_model),
            args=SFTConfig(output_dir="/tmp/unused", use_cpu=True, bf16=False, report_to="none", max_length=None),
            train_dataset=dataset,
            processing_class=tiny_tokenizer,
        )
        longest = max(len(ids) for ids in trainer.train_dataset["input_ids"])
        packed = pack_with_languages(dataset, tiny_tokenizer, max_length=longest)
        documents = []
        for row in packed:
            start = 0
            for length in row["seq_lengths"]:
                part = slice(start, start + length)
                names = {row["language_names"][i] for i in row["language_ids"][part]}
                documents.append((row["input_ids"][part], row["labels"][part], *names))
                start += length
        expected = [(row["input_ids"], row["labels"], row["language"]) for row in trainer.train_dataset]
        assert sorted(documents) == sorted(expected)

    def test_errors(self, tiny_tokenizer):
        with pytest.raises(ValueError, match="empty"):
            pack_with_languages(Dataset.from_list([]), tiny_tokenizer, max_length=8)
        with pytest.raises(ValueError, match="no column 'language'"):
            pack_with_languages(Dataset.from_list([{"text": "a"}]), tiny_tokenizer, max_length=8)
        with pytest.raises(ValueError, match="Cannot tokenize"):
            pack_with_languages(Dataset.from_list([{"body": "a", "language": "en"}]), tiny_tokenizer, max_length=8)
        with pytest.raises(ValueError, match="needs languages="):
            pack_with_languages(Dataset.from_list([{"text": "a"}]), tiny_tokenizer, max_length=8, language="script")


def test_tokens_of_several_languages_in_one_row_get_their_own_threshold(make_model, tiny_tokenizer, rows):
    """Two documents of different languages in one packed row: the excess of each is over its own alpha."""
    model = case_model(make_model)
    features = make_features(model, layers=(1,), rows=2)
    layer = SASFTCallback(features).layers[0]
    hidden = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 0, 2, 2]])
    f = hidden @ layer.rows.T + layer.bias
    for token, language in ((1, 0), (2, 2)):
        alone = torch.zeros(1, 4, dtype=torch.bool)
        alone[0, token] = True
        expected = torch.relu(f[0, token] - layer.thresholds[language])
        assert torch.allclose(
            feature_penalty(hidden, layer.rows, layer.bias, layer.thresholds, alone, groups=ids).sums, expected
        )
