"""Pages of completions side by side."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from synthetic_rows import switching_row

from benchmarks.experiments.completions_page import write_completions_pages
from benchmarks.experiments.probes import Probes

PROMPTS = 30


def write_run(folder: Path, arm: str, prompt: str = "prompt") -> str:
    """Completions that name their arm; those to even English prompts hold Chinese."""
    folder.mkdir(parents=True)
    samples = [
        {
            "language": language,
            "prompt_index": index,
            "sample_index": 0,
            "prompt": f"{prompt} {language} {index}",
            "response": f"{arm} wrote {language} {index}" + (" 中文" if index % 2 == 0 and language == "en" else ""),
        }
        for language in ("en", "ru")
        for index in range(PROMPTS)
    ]
    (folder / "run.json").write_text(json.dumps({"samples": samples}), encoding="utf-8")
    return str(folder)


def switching(folder: Path, **others) -> list[dict]:
    rows = []
    for seed in (101, 102):
        for arm, weight in (("sft", 0.0), ("token_penalty", 10.0), ("token_penalty", 20.0), ("sasft_decoder", 0.2)):
            place = write_run(folder / f"{arm}-{weight}-{seed}", f"{arm} at {weight:g}, {seed},")
            cost = 0.5 if weight else 0.0
            rows.append(switching_row(arm, weight, cost, 1 - weight / 40, seed=seed, folder=place, **others))
    return rows


def shown(page: Path) -> list[str]:
    return re.findall(r'class="prompt">(base \d, seed \d+, .*?):\n', page.read_text(encoding="utf-8"))


def test_one_page_an_arm_beside_sft(tmp_path):
    pages = write_completions_pages(switching(tmp_path), tmp_path / "pages", per_page=12, seed=4)
    assert [page.name for page in pages] == ["zh-token_penalty.html", "zh-sasft_decoder.html"]
    text = pages[0].read_text(encoding="utf-8")
    assert "at weight 20, chosen on validation prompts" in text
    assert "12 of 120 prompts, drawn at random with seed 4" in text
    assert "<mark>中文</mark>" in text
    assert len(shown(pages[0])) == 12
    assert shown(pages[0]) == shown(pages[1])
    # The same prompt and seed on both sides.
    for seed, language, index in re.findall(r"seed (\d+), (\w\w) (\d+):", text):
        assert f"sft at 0, {seed}, wrote {language} {index}" in text
        assert f"token_penalty at 20, {seed}, wrote {language} {index}" in text
    assert "token_penalty at 10," not in text


def test_the_draw_depends_on_the_seed_alone(tmp_path):
    rows = switching(tmp_path)
    first = [shown(page) for page in write_completions_pages(rows, tmp_path / "a", per_page=12)]
    again = [shown(page) for page in write_completions_pages(rows[::-1], tmp_path / "b", per_page=12)]
    other = [shown(page) for page in write_completions_pages(rows, tmp_path / "c", per_page=12, seed=1)]
    assert first == again
    assert first != other


def test_small_runs_are_shown_whole(tmp_path):
    (page, _) = write_completions_pages(switching(tmp_path), tmp_path / "pages", per_page=1000)
    assert len(shown(page)) == 4 * PROMPTS


def test_lost_folders_are_said(tmp_path):
    rows = switching(tmp_path)
    for row in rows:
        if row["arm"] == "token_penalty" and row["seed"] == 101:
            row["folder"] = str(tmp_path / "gone")
        if row["arm"] == "sasft_decoder":
            row["folder"] = ""
    half, none = write_completions_pages(rows, tmp_path / "pages")
    assert "completions of 1 of 2 runs are not there any more" in half.read_text(encoding="utf-8")
    assert all("seed 102" in place for place in shown(half))
    assert "completions of 2 of 2 runs are not there any more" in none.read_text(encoding="utf-8")
    assert shown(none) == []


def test_words_mark_no_script(tmp_path):
    rows = switching(tmp_path, identify="words")
    (page, _) = write_completions_pages(rows, tmp_path / "pages")
    assert "<mark>" not in page.read_text(encoding="utf-8")


def test_other_prompts_are_refused(tmp_path):
    rows = switching(tmp_path)
    rows[1]["folder"] = rows[2]["folder"] = write_run(tmp_path / "odd", "token_penalty", "another prompt")
    with pytest.raises(ValueError, match="cannot be shown side by side"):
        write_completions_pages(rows, tmp_path / "pages")


def test_broken_files_and_numbers_are_refused(tmp_path):
    rows = switching(tmp_path)
    (Path(rows[2]["folder"]) / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="does not hold the completions"):
        write_completions_pages(rows, tmp_path / "pages")
    with pytest.raises(ValueError, match="per_page"):
        write_completions_pages(rows, tmp_path / "pages", per_page=0)


def test_names_that_collide_are_refused(tmp_path):
    rows = [switching_row(), switching_row("a b", 1.0), switching_row("a+b", 1.0)]
    with pytest.raises(ValueError, match="two arms"):
        write_completions_pages(rows, tmp_path / "pages")


def repetition(folder: Path) -> list[dict]:
    rows = []
    quality = {"samples": 100, "loops": 1, "unended": 1, "right": 90}
    probes = {field.name: 0.1 for field in fields(Probes)}
    assert set(asdict(Probes(**probes))) == set(probes)
    for arm in ("plain", "default"):
        place = folder / arm
        place.mkdir()
        lines = [
            {"problem": i, "prompt": f"{i} + 1 =", "completion": f"{arm} {i}", "loop": i == 3, "right": i != 3}
            for i in range(8)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (place / "samples.jsonl").write_text(text, encoding="utf-8")
        row = {"kind": "repetition", "cell": "rare", "base": 0, "arm": arm, "title": f"the {arm}", "weight": None}
        row |= {"seed": 3, "quality": quality, "benign": quality, "probes": {"0": probes}, "steered": None}
        rows.append(row | {"gradient_norm": 0.2, "seconds": 40.0, "folder": str(place)})
    return rows


def test_repetition_is_shown_beside_plain(tmp_path):
    (page,) = write_completions_pages(repetition(tmp_path), tmp_path / "pages", per_page=40)
    text = page.read_text(encoding="utf-8")
    assert page.name == "rare-default.html"
    assert len(shown(page)) == 8
    assert "base 0, seed 3, problem 3:" in text
    assert "the plain · endless · wrong" in text
    assert "the default · right" in text


def test_both_kinds_in_one_file(tmp_path):
    rows = [*switching(tmp_path), *repetition(tmp_path)]
    assert len(write_completions_pages(rows, tmp_path / "pages")) == 3
