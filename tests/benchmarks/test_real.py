"""The studies on pretrained models: what is learned from stays apart from what is tested, and a step runs once."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.real import steps, texts
from benchmarks.real.__main__ import STUDIES
from benchmarks.real.pretrained import MODELS
from benchmarks.real.studies import hate_speech, loops, switching
from qscope_posttrain.errors import UserValueError
from qscope_posttrain.evaluation.code_switching import switching_ratio
from qscope_posttrain.evaluation.repetition import repeat_ratio
from qscope_posttrain.models.generation import Sample

with_data = pytest.mark.skipif(not texts.DATA.is_dir(), reason=f"real text is not at {texts.DATA}")


@with_data
class TestHateCheck:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_no_template_is_in_both_parts_in_any_language(self, seed):
        parts = [texts.split_by_template(texts.hate_cases(language), seed) for language in texts.HATECHECK]
        learned, tested = ({case.template for part in parts for case in part[which]} for which in (0, 1))
        assert learned
        assert tested
        assert not learned & tested

    @pytest.mark.parametrize("language", texts.HATECHECK)
    def test_both_classes_are_equally_frequent(self, language):
        for part, count in zip(hate_speech.draw(language, 0), (hate_speech.DISCOVERY, hate_speech.TEST), strict=True):
            assert [case.hateful for case in part].count(True) == len(part) / 2 == count
            assert len(set(part)) == len(part)


@with_data
def test_saes_learn_from_other_text_than_is_studied():
    studied = set(texts.paragraphs("en", held_out=True)) | {
        case.text for language in texts.HATECHECK for case in texts.split_by_template(texts.hate_cases(language), 0)[1]
    }
    repeated = [text for text in texts.sae_texts("gemma3") if text in studied]
    assert len(repeated) < 60  # some sentences of the documentation stand there twice


@pytest.mark.parametrize(
    ("text", "source", "switched"),
    [("A plain sentence.", "en", False), ("A plain предложение.", "en", True), ("Слово React.", "ru", False)],
)
def test_another_script(text, source, switched):
    assert switching.AnotherScript()(text, source) is switched


def test_a_response_cut_shorter_did_not_end():
    sample = Sample("en", 0, 0, "a", "b c d", ended=True, tokens=(1, 2, 3))
    assert loops.cut(sample, 3) == sample
    shorter = loops.cut(sample, 2)
    assert (shorter.tokens, shorter.ended) == ((1, 2), False)


def test_the_table_of_loops_has_a_row_per_temperature_and_length():
    samples = [
        Sample(
            "en",
            prompt,
            0,
            "a",
            "b " * 80 if prompt == 0 else "end",
            ended=prompt > 0,
            tokens=(7,) * (80 if prompt == 0 else 3),
        )
        for prompt in range(4)
    ]
    rates = {length: repeat_ratio([loops.cut(sample, length) for sample in samples]).to_dict() for length in (2, 80)}
    shown = loops.table({"0.3": rates})
    assert [row[:3] for row in shown.rows] == [(0.3, 2, 4), (0.3, 80, 4)]
    assert [str(row[3]).split()[0] for row in shown.rows] == ["0.0", "25.0"]


def test_the_table_of_switching_stands_beside_its_controls():
    samples = [
        Sample(language, prompt, 0, "a", text, ended=True)
        for language, prompt, text in (
            ("en", 0, "A plain sentence."),
            ("en", 1, "A plain предложение."),
            ("de", 0, "Ein Satz."),
            ("de", 1, "Wort."),
        )
    ]
    found = {
        name: switching_ratio(samples, "another", {}, switching.AnotherScript()).to_dict()
        for name in ("script", "words")
    }
    controls = {name: {"en": {"clean": 0.01, "planted": 0.9}} for name in ("script", "words")}
    rows = switching.table({**found, "controls": controls}).rows
    assert rows[0][:2] == ("en", 2)
    assert str(rows[0][2]).startswith("50.0 (")
    assert rows[0][4:] == (1.0, 1.0, 90.0, 90.0)
    assert rows[1][4:] == (None, None, None, None)
    assert rows[2][:2] == ("all", 4)
    assert str(rows[2][3]).startswith("25.0 (")


class TestStep:
    def test_it_runs_once_on_the_same_files(self, tmp_path):
        read = tmp_path / "read.json"
        read.write_text("{}")
        command = ["json.tool", str(read), str(tmp_path / "written.json")]
        first = steps.run_step("copy", command, [read], tmp_path)
        (tmp_path / "written.json").unlink()
        assert steps.run_step("copy", command, [read], tmp_path) == first
        assert not (tmp_path / "written.json").exists()
        read.write_text("[1]")
        steps.run_step("copy", command, [read], tmp_path)
        assert json.loads((tmp_path / "written.json").read_text()) == [1]

    def test_a_failure_shows_the_end_of_its_log(self, tmp_path):
        with pytest.raises(UserValueError, match="no-such-option"):
            steps.run_step("fails", ["json.tool", "--no-such-option"], [], tmp_path)
        assert not (tmp_path / "steps").exists()

    def test_compiled_files_do_not_count(self, tmp_path):
        (tmp_path / "module.py").write_text("x = 1")
        before = steps.checksum(tmp_path)
        (tmp_path / "__pycache__").mkdir()
        (tmp_path / "__pycache__" / "module.pyc").write_bytes(b"x")
        assert steps.checksum(tmp_path) == before
        (tmp_path / "module.py").write_text("x = 2")
        assert steps.checksum(tmp_path) != before


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_a_module_with_its_files(name):
    assert callable(importlib.import_module(f"benchmarks.real.studies.{name}").run)
    assert set(STUDIES[name].models) <= set(MODELS)
    assert all((Path(steps.__file__).parent / file).exists() for file in STUDIES[name].code)
