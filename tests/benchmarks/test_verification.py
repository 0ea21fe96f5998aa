"""The table of promises: read from the marks in the source, and from the Makefile."""

from __future__ import annotations

import pytest

from benchmarks import verification
from benchmarks.verification import Proof

SOURCE = """
import pytest
pytestmark = [pytest.mark.slow, pytest.mark.promise("Of the file.")]
@pytest.mark.promise("Its "
                     "own")
def test_one(): ...
class TestSome:
    @pytest.mark.parametrize("a", [1])
    def test_two(self): ...
def helper(): ...
"""


def test_marks_of_file_class_and_test(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "TESTS", tmp_path)
    (tmp_path / "test_a.py").write_text(SOURCE)
    found = [(one.promise, one.function, "slow" in one.marks) for one in verification.find()]
    assert found == [
        ("Of the file", "test_one", True),
        ("Its own", "test_one", True),
        ("Of the file", "test_two", True),
    ]
    (tmp_path / "test_a.py").write_text("import pytest\n@pytest.mark.promise(WORDS)\ndef test_one(): ...\n")
    with pytest.raises(ValueError, match=r"test_a\.py, line 2: a promise is one sentence"):
        list(verification.find())


@pytest.mark.parametrize(
    ("file", "marks", "where"),
    [
        ("sft/test_masks.py", (), ["test", "test-oldest"]),
        ("sft/test_masks.py", ("slow",), ["test-all"]),
        ("sae/test_rows.py", (), ["test"]),
        ("sae/test_rows.py", ("cuda",), [verification.NEVER]),
        ("peers/test_sparsify_formats.py", (), ["test-peers"]),
        ("integrations/verl/test_verl_sft.py", ("slow",), ["test-verl"]),
        ("integrations/transformers/test_plain_gradients.py", (), ["test"]),
        ("sft/test_loss_settings.py", (), ["test", "test-oldest", "test-swift"]),
    ],
)
def test_what_runs_a_test_follows_from_the_makefile(file, marks, where):
    assert (verification.TESTS / file).exists()
    assert verification.runs(Proof("", file, "", frozenset(marks)), verification.make_targets()) == where


def test_every_promise_has_a_heading():
    assert {proof.heading for proof in verification.find()} <= set(verification.SECTIONS)
