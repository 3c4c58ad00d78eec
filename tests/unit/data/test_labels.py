"""Classes: their order, and what is odd about them."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.data.splitting.labels import label_notices, sort_classes
from orchestrator.errors import DataError


def test_whole_numbers_are_sorted_as_numbers() -> None:
    assert sort_classes(["10", "9", "-1", "2"]) == ["-1", "2", "9", "10"]
    assert sort_classes(["10", "9", "b"]) == ["10", "9", "b"]
    assert sort_classes(["1", "01"]) == ["01", "1"]


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"good": 9, "Good": 8, " good": 7, "bad": 9}, "in case or blanks only: ' good' (7 rows) and 'Good' (8 rows) and 'good'"),
        ({"1": 9, "1.0": 8, "2": 7}, "in the way a number is written: '1' (9 rows) and '1.0' (8 rows)"),
        ({"caf\u00e9": 9, "cafe\u0301": 8}, "in case or blanks only"),
        ({"a": 1, "b": 20, "c": 20}, "1 of 3 classes have a single row, which train keeps: 'a'"),
        ({f"t{n}": 1 for n in range(30)} | {"x": 5}, "30 of 31 classes have a single row: 't0'"),
        ({str(n): 1 + n % 2 for n in range(40)}, "look like numbers to predict, not classes: 40 different numbers in 60 rows"),
        ({"a": 95, "b": 5}, "class 'a' has 95 of 100 rows (95%)"),
        ({"a\x1b[31m": 1, "b": 9}, r"'a\x1b[31m'"),
    ],
)
def test_what_is_odd_is_one_warning(counts: dict[str, int], told: str) -> None:
    notices = label_notices(counts)
    assert [told in notice.message for notice in notices] == [True]
    assert all(notice.level == "warning" and notice.remedy and "\x1b" not in notice.line for notice in notices)


def test_ordinary_classes_are_not_remarked_on() -> None:
    assert label_notices({str(n): 5 for n in range(200)}) == []
    assert label_notices({"a": 60, "b": 40, "a b": 2}) == []


def test_labels_that_are_measured_numbers_are_refused(prepare: Any) -> None:
    """L08"""
    lines = [f"text {n},{n % 60 / 7:.2f}\n" for n in range(90)]
    prepare.write("train.csv", "text,label\n" + "".join(lines))
    with pytest.raises(DataError, match=r"60 different values .* in 90 rows") as caught:
        prepare.run("classify", train="train.csv")
    assert "data.columns.label" in caught.value.remedy


def test_a_class_that_a_split_lacks_is_told(prepare: Any) -> None:
    rows = [{"text": f"sentence {n}", "label": n % 11 if n < 110 else 11} for n in range(112)]
    prepare.jsonl("train.jsonl", rows)
    summary = prepare.run("classify", eval=0.1, test=0.1)
    assert summary.classes == tuple(map(str, range(12)))
    lines = [notice.line for notice in summary.notices if notice.level == "warning"]
    assert any("1 of 12 classes have no row in eval: '11'" in line for line in lines)
