"""Own loops, activations and counts, without training anything."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.testbed.models import LanguageModel, collect_activations
from benchmarks.testbed.repetition.experiment import ArmResult, Quality, _sample
from benchmarks.testbed.repetition.language_model import document_rows, load_loops
from benchmarks.testbed.repetition.task import DocumentSettings, Problem, encode_words
from qscope_posttrain.models.capture import LayerCapture
from qscope_posttrain.models.generation import Response


def test_activations_are_the_layers_outputs_on_every_token_but_the_first(tiny: LanguageModel) -> None:
    rows = document_rows(tiny.tokenizer, DocumentSettings((1, 2), loops=0.3, answer_tokens=40), 9, "a")
    found = collect_activations(tiny.model, [row.tokens for row in rows], [0, 1])
    expected: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for row in sorted(rows, key=lambda row: len(row.tokens)):
        with torch.no_grad(), LayerCapture(tiny.model, [0, 1]) as capture:
            tiny.model(input_ids=torch.tensor([row.tokens]))
            for layer, hidden in capture.require().items():
                expected[layer].append(hidden[0, 1:])
    for layer in (0, 1):
        assert torch.allclose(found[layer], torch.cat(expected[layer]), atol=1e-4)


def test_counts_of_loops_and_right_answers(tiny: LanguageModel) -> None:
    step = ["3", "+", "4", "=", "7", ";"]
    texts = [
        ([*step, "ans", "7"], True),
        ([*step, "ans", "8"], True),
        (step * 5, False),
        (step * 5, True),
        ([*step, "ans", "7"], False),
    ]
    completions = [Response(encode_words(tiny.tokenizer, words), ended) for words, ended in texts]
    problem = Problem(3, (("+", 4),))
    samples = [_sample(tiny, index, (problem, completion)) for index, completion in enumerate(completions)]
    assert [sample["loop"] for sample in samples] == [False, False, True, False, False]
    assert [sample["right"] for sample in samples] == [True, False, False, False, False]
    result = ArmResult("x", "X", (SimpleNamespace(quality=Quality(5, 1, 2, 1)),))  # type: ignore[arg-type]
    assert result.loop_rate.estimate == pytest.approx(0.2)
    assert result.accuracy.low < 0.2 < result.accuracy.high


def test_loops_are_read_back_and_what_is_no_loop_is_refused(tmp_path: Path) -> None:
    entry = {"prompt": [1, 5, 3], "completion": [4, 5, 6] * 6}
    normal = {"prompt": [1, 5, 3], "completion": [4, 5, 6]}
    content = {"samples": 10, "settings": {}, "loops": [entry], "normal": [normal]}
    (tmp_path / "loops.json").write_text(json.dumps(content), encoding="utf-8")
    loops = load_loops(tmp_path, "key").collection
    assert (loops.samples, len(loops.loops), len(loops.normal)) == (10, 1, 1)
    assert loops.loops[0].tail.period == 3
    assert loops.rate is not None
    assert loops.rate.estimate == pytest.approx(0.1)
    (tmp_path / "loops.json").write_text(json.dumps({**content, "loops": [normal]}), encoding="utf-8")
    with pytest.raises(ValueError, match="no loop"):
        load_loops(tmp_path, "key")
