"""A quarter of the matrix of bases (docs/bases.md): each type is made small, trained, merged and served."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.store import read_jsonl
from scripts.base_matrix.page import PAGE, passed, within_goal
from scripts.base_matrix.published import GROUPS, PUBLISHED, QUICK, group_of

REPOSITORY = Path(__file__).resolve().parents[2]
LAID_OUT = ("source", "class", "kinds", "experts", "ways", "logits")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return {row["type"]: row for row in read_jsonl(REPOSITORY / "scripts/base_matrix/results.jsonl")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("bases") / "rows.jsonl"
    command = [sys.executable, "-m", "scripts.base_matrix", "--quick", "--rows", str(file)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False
    )
    assert file.exists(), done.stderr[-3000:]
    return {row["type"]: row for row in read_jsonl(file)}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("model_type", QUICK)
def test_a_type_trains_and_is_served_as_the_page_says(rows: dict[str, Any], recorded: dict[str, Any], model_type: str) -> None:
    row, page = rows[model_type], recorded[model_type]
    if "refused" in page:
        assert row.get("refused") == page["refused"]
        return
    assert passed(row), row
    assert {key: row[key] for key in LAID_OUT} == {key: page[key] for key in LAID_OUT}
    assert within_goal(row) is not False, row["memory"]


def test_the_page_has_what_is_recorded(recorded: dict[str, Any]) -> None:
    assert set(recorded) == set(PUBLISHED)
    assert set(QUICK) <= set(recorded)
    assert sum(map(passed, recorded.values())) >= 90
    assert sum("refused" in row for row in recorded.values()) <= 5
    assert {group_of(name) for name in QUICK} == set(GROUPS)
    page = PAGE.read_text()
    assert all(f"| {name} |" in page for name in recorded)
