"""Every label of a data set in memory is looked at as the callback attaches; of a stream, as its batch comes."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from sft.cases import LANGUAGES, case_model, make_features, make_rows, make_trainer

from qscope_posttrain.models.scoring import find_target_tokens
from qscope_posttrain.sft.callback import SASFTCallback
from qscope_posttrain.sft.data.language_ids import NO_LANGUAGE, SampleLanguage
from qscope_posttrain.sft.data.packing import pack_with_languages
from qscope_posttrain.sft.data.train_data import count_languages

BAD = {
    "None": (None, "gave None"),
    "empty": ("", "gave ''"),
    "blank": ("  ", "gave '  '"),
    "unknown": ("ko", "language 'ko'"),
    **{label: (label, r"Did you mean 'zh'\?") for label in ("zh-CN", "zh_Hans", "zho_Hans", "ZH", "cmn", "Chinese")},
    **{label: (label, r"Did you mean 'en'\?") for label in ("en-US", "eng_Latn", "English")},
}  # fmt: skip


def trained_on(dataset, make_model, tokenizer, language="language", steps=0):
    """The trainer, made with the callback; a step is taken where asked."""
    model = case_model(make_model)
    callback = SASFTCallback(make_features(model), language=language)
    trainer = make_trainer(model, dataset, [callback], processing_class=tokenizer, gradient_accumulation_steps=1)
    if steps:
        trainer.train()
    return trainer


def rows_with(label, column="language", count=7):
    rows = make_rows(count)
    rows[5][column] = label
    return rows


@pytest.mark.parametrize("rule", ["column", "callable"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_label_is_found_before_the_first_step(make_model, tiny_tokenizer, case, rule):
    label, message = BAD[case]
    language = "language" if rule == "column" else lambda example: example["language"]
    with pytest.raises(ValueError, match=f"Row 5 of the training data: .*{message}"):
        trained_on(Dataset.from_list(rows_with(label)), make_model, tiny_tokenizer, language)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([math.nan] * 3, "Row 0 .*gave nan"),
        ([0, 1, 2], "Row 0 .*gave 0.*ClassLabel"),
        ([True, False, True], "Row 0 .*gave True"),
        ([None] * 3, "Row 0 .*gave None"),
        ([["en"], ["zh"], ["en"]], r"Row 0 .*gave \['en'\]"),
        ([{"code": "en"}] * 3, "Row 0 .*gave {'code': 'en'}"),
    ],
)
def test_columns_that_hold_no_names(values, message):
    with pytest.raises(ValueError, match=message):
        count_languages(Dataset.from_dict({"language": values}), SampleLanguage("language", LANGUAGES))


def test_the_message_says_how_to_rename_and_how_to_leave_out():
    with pytest.raises(ValueError, match=r'\{"lang": \{\'zh-CN\': \'zh\'\}\.get\(row.*ignore_languages=\(\'zh-CN\',\)'):
        SampleLanguage("lang", LANGUAGES).id("zh-CN")
    assert SampleLanguage("lang", LANGUAGES, ignore=("zh-CN",)).id("zh-CN") == -1
    assert SampleLanguage("lang", ("zh-CN", "en")).id("zh-CN") == 0
    assert SampleLanguage("lang", LANGUAGES).id(NO_LANGUAGE) == -1


@pytest.mark.parametrize("rule", ["column", "callable"])
def test_a_stream_names_the_sample_of_the_batch_that_holds_it(make_model, tiny_tokenizer, rule):
    rows = rows_with("zh-CN")
    for row in rows:
        row["own"] = row["language"]
    language = "own" if rule == "column" else lambda example: example["own"]
    model = case_model(make_model)
    trainer = make_trainer(
        model, make_rows(7), processing_class=tiny_tokenizer, gradient_accumulation_steps=1, shuffle_dataset=False
    )
    trainer.train_dataset = Dataset.from_list(rows).to_iterable_dataset()
    trainer.args.max_steps = 4
    SASFTCallback(make_features(model), language=language).attach(trainer)
    with pytest.raises(ValueError, match=r"Did you mean 'zh'\?.*sample 1 of the batch, number 5"):
        trainer.train()


def test_class_labels_are_read_by_their_names(make_model, tiny_tokenizer):
    names = ["fr", "ko", "zh", "en"]
    dataset = Dataset.from_list(make_rows(6)).cast_column("language", ClassLabel(names=names))
    trainer = trained_on(dataset, make_model, tiny_tokenizer)
    for batch in trainer.get_train_dataloader():
        for ids, found in zip(batch["input_ids"], batch["sasft_language_ids"], strict=True):
            real = int((found >= 0).sum())
            row = next(row for row in make_rows(6) if row["input_ids"] == ids[:real].tolist())
            assert set(found[:real].tolist()) == {LANGUAGES.index(row["language"])}
    packed = pack_with_languages(dataset, tiny_tokenizer, max_length=64)
    assert packed[0]["language_names"] == ["en", "fr", "zh"]
    rows = Dataset.from_list(rows_with("ko")).cast_column("language", ClassLabel(names=names))
    with pytest.raises(ValueError, match=r"Row 5 .*language 'ko'"):
        trained_on(rows, make_model, tiny_tokenizer)


def test_packed_rows_are_checked_too(make_model, tiny_tokenizer):
    packed = pack_with_languages(Dataset.from_list(rows_with("zh-CN")), tiny_tokenizer, max_length=32)
    with pytest.raises(ValueError, match=r"Row 0 .*Did you mean 'zh'"):
        trained_on(packed, make_model, tiny_tokenizer)
    with pytest.raises(ValueError, match=r"Row 5 .*gave None"):
        pack_with_languages(Dataset.from_list(rows_with(None)), tiny_tokenizer, max_length=32)


def test_counts_of_a_column_a_rule_and_a_transform():
    rows = make_rows(7)
    counts = {"en": 3, "zh": 2, "fr": 2}
    dataset = Dataset.from_list(rows)
    assert count_languages(dataset, SampleLanguage("language", LANGUAGES)) == counts
    assert count_languages(rows, SampleLanguage("language", LANGUAGES)) == counts
    assert count_languages(dataset, SampleLanguage(lambda row: row["language"], LANGUAGES)) == counts
    renamed = Dataset.from_list(rows_with("zh-CN", count=7))
    renamed.set_transform(lambda batch: {**batch, "language": [name[:2] for name in batch["language"]]})
    assert count_languages(renamed, SampleLanguage("language", LANGUAGES)).total() == 7


def test_a_sample_without_letters_takes_no_part(make_model, tiny_tokenizer):
    """Not one of many rows may end a run because it holds a number only."""
    text = "没有人知道钟停了。"
    rows = [{"input_ids": tiny_tokenizer(entry)["input_ids"]} for entry in (text, "42", "7 * 6 = 42", text)]
    dataset = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
    decide = SampleLanguage("script", LANGUAGES, decode=tiny_tokenizer.decode)
    assert count_languages(dataset, decide) == {"zh": 2, NO_LANGUAGE: 2}
    with pytest.warns(UserWarning, match="All 4 rows are in zh, zxx; .* so it would do nothing"):
        trainer = trained_on(dataset, make_model, tiny_tokenizer, "script", steps=1)
    assert trainer.state.global_step == 1


def test_class_labels_in_a_format_of_tensors():
    names = Features({"language": ClassLabel(names=["en", "zh"])})
    rows = Dataset.from_dict({"language": [0, 1, 1]}, features=names).with_format("torch")
    decide = SampleLanguage("language", LANGUAGES, classes=("en", "zh"))
    assert [decide(row) for row in rows] == ["en", "zh", "zh"]


def test_tokens_of_a_target_under_the_name_that_the_features_have(make_model, tiny_tokenizer):
    trainer = make_trainer(case_model(make_model), make_rows(4), processing_class=tiny_tokenizer)
    han = find_target_tokens(trainer, "zh", None, required=True)
    assert torch.equal(find_target_tokens(trainer, "zh-CN", None, required=True), han)
    with pytest.raises(ValueError, match=r"Unknown language 'harmful'.*target_token_ids"):
        find_target_tokens(trainer, "harmful", None, required=True)
    with pytest.raises(ValueError, match=r"Expected tokens of 'ja'.*got none"):  # this vocabulary has no kana
        find_target_tokens(trainer, "ja", None, required=True)


def test_a_target_that_the_features_name_otherwise(make_model):
    with pytest.raises(ValueError, match=r"it has en, zh, fr\. Did you mean 'zh'\?"):
        SASFTCallback(make_features(case_model(make_model)), target="zh-CN")
