"""When a sweep that has come to its end is taken up again."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from orchestrator.run.records import read_finished_sweep
from orchestrator.runtime.prepare import Prepared
from orchestrator.store import write_json
from orchestrator.transfer.records import RefitRecord, SweepResult, TransferReport, TrialRecord

SWEEP = SweepResult(
    name="run",
    metric="loss",
    higher_is_better=False,
    max_forgetting=0.1,
    trials=tuple(
        TrialRecord(trial_id=f"t{number}", number=number, layers="last:1", tune="full", learning_rate=1e-3, state="finished")
        for number in range(2)
    ),
    winner_id="t0",
    promotion_reason="",
    finished_at=1.0,
    max_gpu_hours=2.0,
)
LEFT_OUT = RefitRecord(ran=False, reason="", to_step=6, left_out_for_hours=True)


@pytest.mark.parametrize(
    ("ended", "refit", "trials", "hours", "stands"),
    [
        ("", None, 2, 2.0, True),
        ("", None, 3, 2.0, False),
        ("", LEFT_OUT, 2, 2.0, True),
        ("", LEFT_OUT, 3, 2.0, False),
        ("", LEFT_OUT, 2, 3.0, False),
        ("after 2 of 4 trials", None, 4, 2.0, True),
        ("after 2 of 4 trials", None, 4, 3.0, False),
    ],
    ids=[
        "as it was",
        "more trials",
        "a refit without hours",
        "more trials, a refit without hours",
        "hours for the refit",
        "a search without hours",
        "hours for the search",
    ],
)
def test_more_trials_or_more_hours_take_a_sweep_up_again(
    submit: Callable[[], Prepared], ended: str, refit: RefitRecord | None, trials: int, hours: float, stands: bool
) -> None:
    run = submit().run
    write_json(run.path / "transfer.json", TransferReport(sentence="", refit=refit))
    write_json(run.path / "sweep.json", SWEEP.model_copy(update={"ended_by_hours": ended}))
    write_json(run.hours, {"used": 1.5})
    spec = SimpleNamespace(search=SimpleNamespace(num_trials=trials), resources=SimpleNamespace(max_gpu_hours=hours))
    assert (read_finished_sweep(run, spec) is not None) is stands  # type: ignore[arg-type]
