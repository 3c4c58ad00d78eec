"""How often the test set was read, and what a verdict adds."""

from __future__ import annotations

from pathlib import Path

from orchestrator.runtime.bundling import beyond_bound, count_reading
from orchestrator.transfer.records import ModelScores


def test_every_reading_of_the_test_set_counts_also_of_an_earlier_process(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "test"
    assert [count_reading(folder, "t000"), count_reading(folder, "t000"), count_reading(folder, "t001")] == [1, 2, 3]
    assert count_reading(tmp_path / "other" / "test", "t000") == 1


def test_a_bundle_that_forgot_more_than_allowed_is_told() -> None:
    def scores(forgetting: float | None) -> list[ModelScores]:
        other = ModelScores(model="head", metrics={}, num_documents=1, forgetting=9.0)
        return [other, ModelScores(model="promoted", metrics={}, num_documents=1, forgetting=forgetting)]

    assert "it forgot +0.150 nats per token, more than the bound of 0.1" in beyond_bound(scores(0.15), 0.1)
    assert beyond_bound(scores(0.1), 0.1) == beyond_bound(scores(None), 0.1) == beyond_bound(scores(9.0), float("inf")) == ""
