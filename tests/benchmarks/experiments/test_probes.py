"""Probes against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.experiments.probes import Case, ProbeSet, clean_cases, measure_probes, own_cases
from benchmarks.testbed.models import LanguageModel
from benchmarks.testbed.repetition.language_model import prompt_ids
from benchmarks.testbed.repetition.task import decode_words, draw_problems


def log_probability(language_model: LanguageModel, before: list[int], tokens: list[int]) -> float:
    """log P(tokens | before), one forward a token."""
    total = 0.0
    for token in tokens:
        with torch.no_grad():
            logits = language_model.model(torch.tensor([before])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        before = [*before, token]
    return total


def q(language_model: LanguageModel, case: Case, k: int) -> float:
    return log_probability(language_model, [*case.prefix, *case.body * (k - 1)], list(case.body))


def test_all_probes_equal_sums_by_hand(tiny: LanguageModel) -> None:
    prompts = prompt_ids(tiny, draw_problems(2, (1, 2), 0, held_out=None))
    completions = [[4, 13, 5, 17, 6, 18] * 6, [7, 8, *[9, 10, 11, 12, 13] * 7]]
    own = own_cases(prompts, completions, 40)
    clean = clean_cases(tiny, (1, 3), 40, solutions=3, seed=1)
    measured = measure_probes(tiny.model, ProbeSet(own, clean, 3))

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def to_the_end(case: Case, first: int) -> float:
        return math.exp(sum(q(tiny, case, k) for k in range(first, case.copies + 1)))

    close = {"rel": 1e-4, "abs": 1e-30}
    assert measured.oh == pytest.approx(mean([math.exp(q(tiny, case, 1)) for case in own]), **close)
    assert measured.oc1 == pytest.approx(mean([math.exp(q(tiny, case, 2)) for case in own]), **close)
    assert measured.oend == pytest.approx(mean([to_the_end(case, 1) for case in own]), **close)
    assert measured.h == pytest.approx(sum(math.exp(q(tiny, case, 1)) for case in clean) / 3, **close)
    assert measured.c1 == pytest.approx(mean([math.exp(q(tiny, case, 2)) for case in clean]), **close)
    assert measured.c5 == pytest.approx(mean([math.exp(q(tiny, case, 6)) for case in clean]), **close)
    assert measured.cend == pytest.approx(mean([to_the_end(case, 2) for case in clean]), **close)
    assert measured.end == pytest.approx(sum(case.weight * to_the_end(case, 1) for case in clean) / 3, **close)


def test_an_own_loop_is_cut_after_its_first_copy(tiny: LanguageModel) -> None:
    prompt, body = [1, 5, 3], [4, 5, 6, 7, 8]
    case = own_cases([prompt], [[9, 9, *body * 6, 4, 5]], 40)[0]
    assert case.prefix == (*prompt, 9, 9, *body)
    assert case.body == tuple(body)
    assert case.copies == (40 - 7) // 5
    with pytest.raises(ValueError, match="three copies"):
        own_cases([prompt], [[4, 5, 6, 7]], 40)


def test_clean_cases_are_true_solutions_up_to_a_step(tiny: LanguageModel) -> None:
    cases = clean_cases(tiny, (2, 4), 120, solutions=40, seed=0)
    assert cases == clean_cases(tiny, (2, 4), 120, solutions=40, seed=0)
    assert 40 < len(cases) < 80
    for case in cases:
        words = decode_words(tiny.tokenizer, case.prefix)
        body = decode_words(tiny.tokenizer, case.body)
        assert words[-len(body) :] == body
        assert body[-1] == ";"
        assert body.count(";") in (1, 2)
        operations = (words.index("<sep>") - 2) // 2
        assert case.weight == operations
        written = words[words.index("<sep>") + 1 :]
        assert case.copies == max(2, (120 - len(written)) // len(body))


def test_probes_need_both_kinds_of_cases(tiny: LanguageModel) -> None:
    with pytest.raises(ValueError, match="0 and 0"):
        measure_probes(tiny.model, ProbeSet((), (), 0))
