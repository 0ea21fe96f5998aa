"""Tables of texts and labels: labels that say nothing are refused, files that cannot be read are named."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, Features

from qscope_posttrain.text.inputs import labels_of, read_table

CLASSES = Features({"label": ClassLabel(names=["clean", "toxic"])})


@pytest.mark.parametrize(
    ("values", "features", "message"),
    [
        ([0, 1, -1], CLASSES, r"no label in 1 rows, for example row 2 \(-1\)"),
        (["toxic", None, "clean"], None, r"row 1 \(None\)"),
        ([1.0, float("nan"), 0.0], None, "row 1"),
    ],
)
def test_rows_without_a_label_belong_to_no_class(values, features, message):
    table = Dataset.from_dict({"label": values}, features=features)
    with pytest.raises(ValueError, match=message):
        labels_of(table, "label", "toxic", "rows")


def test_labels_by_name_number_and_truth():
    table = Dataset.from_dict({"label": [0, 1, 1]}, features=CLASSES)
    assert labels_of(table, "label", "toxic", "rows") == labels_of(table, "label", "1", "rows") == [False, True, True]
    minus = Dataset.from_dict({"label": [-1, 1]})  # plain numbers may be negative
    assert labels_of(minus, "label", "-1", "rows") == [True, False]
    assert labels_of(Dataset.from_dict({"label": [True, False]}), "label", None, "rows") == [True, False]


def test_a_file_that_is_no_jsonl_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": oops\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl cannot be read: .*line 2: not JSON"):
        read_table(str(path))
