"""How often the test set was read."""

from __future__ import annotations

from pathlib import Path

from orchestrator.runtime.bundling import count_reading


def test_every_reading_of_the_test_set_counts_also_of_an_earlier_process(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "test"
    assert [count_reading(folder, "t000"), count_reading(folder, "t000"), count_reading(folder, "t001")] == [1, 2, 3]
    assert count_reading(tmp_path / "other" / "test", "t000") == 1
