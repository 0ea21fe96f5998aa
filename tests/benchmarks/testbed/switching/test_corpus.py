"""Reading, filtering and splitting a folder of texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.testbed.switching.corpus import SPLITS, Corpus, generate_corpus, load_corpus


def write(folder: Path, **texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for language, lines in texts.items():
        (folder / f"{language}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def english(count: int) -> list[str]:
    return [f"This is the English paragraph number {number} of the test." for number in range(count)]


def chinese(count: int) -> list[str]:
    return [f"这是测试用的第{number}段中文文字，内容各不相同。" for number in range(count)]


def test_splits_are_disjoint_complete_and_sized_as_stated(corpus: Corpus) -> None:
    for language in corpus.languages:
        parts = [corpus.splits[split][language] for split in SPLITS]
        everything = [paragraph for part in parts for paragraph in part]
        assert len(set(everything)) == len(everything)
        shares = [len(part) / len(everything) for part in parts]
        assert shares == pytest.approx([0.65, 0.15, 0.08, 0.12], abs=0.03)
    assert corpus.languages[-1] == corpus.target == "zh"
    assert corpus.languages == ("en", "ru", "zh")


def test_the_same_folder_gives_the_same_corpus_and_another_seed_another_split(corpus_folder: Path) -> None:
    first, again, other = load_corpus(corpus_folder), load_corpus(corpus_folder), load_corpus(corpus_folder, seed=8)
    assert first == again
    assert first.fingerprint != other.fingerprint
    assert set(first.splits["test"]["en"]) != set(other.splits["test"]["en"])


def test_filters(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        en=[*english(70), english(1)[0], "Too short.", "This English paragraph holds 汉字 and must therefore go."],
        zh=[*chinese(70), "短文", "This paragraph in the Chinese file has only one 字 of Chinese in it."],
    )
    corpus = load_corpus(folder)
    assert corpus.dropped == {"en": 3, "zh": 2}
    kept = [paragraph for split in SPLITS for paragraph in corpus.splits[split]["en"]]
    assert sorted(kept) == sorted(english(70))


def test_the_generated_corpus_loads_whole(tmp_path: Path) -> None:
    generate_corpus(tmp_path / "generated", scale=0.15)
    corpus = load_corpus(tmp_path / "generated")
    assert corpus.languages == ("en", "fr", "ko", "ru", "zh")
    assert sum(corpus.dropped.values()) < 20


@pytest.mark.parametrize(
    ("texts", "languages", "message"),
    [
        ({"en": english(80)}, None, "the target language 'zh'"),
        ({"zh": chinese(80)}, None, "at least one other language"),
        ({"en": english(80), "zh": chinese(20)}, None, "leaves 20 of 20 paragraphs"),
        ({"en": english(80), "zh": chinese(80)}, ["zh"], "at least one other language"),
    ],
)
def test_what_cannot_work_is_explained(
    tmp_path: Path, texts: dict[str, list[str]], languages: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(write(tmp_path, **texts), languages)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_corpus(tmp_path / "nowhere")
    folder = write(tmp_path, en=english(80), zh=chinese(80))
    with pytest.raises(FileNotFoundError, match=r"ko\.txt"):
        load_corpus(folder, ["en", "ko", "zh"])
