from __future__ import annotations

import json
import re

import pytest

from qscope_posttrain.text.inputs import read_prompts, read_texts


def test_texts_by_line_with_limit(tmp_path):
    (tmp_path / "en.txt").write_text("one\n\n  two  \nthree\n", encoding="utf-8")
    (tmp_path / "zh.txt").write_text("一\u2028二\r\n三\n", encoding="utf-8")
    assert read_texts(tmp_path, limit=2) == {"en": ["one", "two"], "zh": ["一\u2028二", "三"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "line 2: expected strings"),
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected a JSON object"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "a", "language": "en"}}\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_texts(path)


def test_prompts_are_text_or_messages(tmp_path):
    path = tmp_path / "prompts.jsonl"
    messages = '[{"role": "user", "content": "a"}]'
    path.write_text(f'{{"prompt": "a", "language": "en"}}\n\n{{"prompt": {messages}, "language": "en"}}\n')
    assert read_prompts(path) == {"en": ["a", [{"role": "user", "content": "a"}]]}
    path.write_text('{"prompt": 3, "language": "en"}\n')
    with pytest.raises(ValueError, match="line 1: expected 'prompt'"):
        read_prompts(path)
    for label in ("null", '""', "3", '["en"]'):
        path.write_text(f'{{"prompt": "a", "language": "en"}}\n{{"prompt": "a", "language": {label}}}\n')
        shown = re.escape(repr(json.loads(label)))
        with pytest.raises(ValueError, match=f"line 2: expected .* got 'prompt': 'a' and 'language': {shown}"):
            read_prompts(path)
        path.write_text(path.read_text().replace("prompt", "text"))
        with pytest.raises(ValueError, match=f"line 2: expected .* got 'text': 'a' and 'language': {shown}"):
            read_texts(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(path)


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "en.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"en.txt' is not UTF-8"):
        read_texts(tmp_path)
