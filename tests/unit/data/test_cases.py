"""Inputs that went wrong once, where they lie beside the checkout: what becomes of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.data import DataSummary, prepare_data
from orchestrator.errors import DataError
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec import load_spec

TOLD = {
    "G01_group_empty_csv": (48, 6, 6, ""),
    "G03b_dominating_group": (56, 2, 2, "test has 2 rows where data.test asks for 6 of 60"),
    "G06_same_prompt_many_answers": (64, 8, 8, "20 prompts (80 rows) with more than one answer"),
    "L01_label_case_space": (
        52,
        6,
        6,
        "differ in case or blanks only: ' good' (8 rows) and 'Good' (8 rows) and 'good' (16 rows)",
    ),
    "L10_same_text_two_labels": (64, 8, 8, "40 texts (80 rows) with more than one label"),
    "M07_long_rows_default_drop": (9, 1, 1, "151 of 160 rows of train (94%) are dropped"),
    "W01_mix_0.7_0.3": (113, 110, 110, "69.9% a.jsonl (79 of 79 rows, weight 0.7), 30.1% b.jsonl (34 of 801 rows, weight 0.3)"),
    "D13b_empty_completions_skip": (30, 4, 4, "train: 2 left out, malformed: "),
}
"""Rows of train, eval and test, and what is told."""
REFUSED = {
    "L08_regression_csv": "look like numbers to predict, not classes: 100 different values",
    "S05_all_same_rows": "all 40 rows are equal",
    "D14_whitespace_completions": "cannot be used",
}


def prepared(real_data: Path, case: str, out: Path) -> DataSummary:
    folder = real_data / "cases" / "data" / case
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return prepare_data(load_spec(folder / "spec.yaml"), SAMPLE_BASE, out)


@pytest.mark.parametrize("case", TOLD)
def test_it_is_used_and_told(case: str, real_data: Path, tmp_path: Path) -> None:
    summary = prepared(real_data, case, tmp_path)
    *rows, told = TOLD[case]
    assert [summary.splits[name].documents for name in ("train", "eval", "test")] == rows
    assert told in "\n".join(notice.line for notice in summary.told)


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_the_reason(case: str, real_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepared(real_data, case, tmp_path)
    assert REFUSED[case] in str(caught.value)
    assert caught.value.exit_code == 2
