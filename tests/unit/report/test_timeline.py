"""The gangs' time: what each did, from a run's records of any age and in any state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.report.page import render_page
from orchestrator.report.timeline import gang_times, seconds_by_kind, shares_sentence, side_by_side, submissions_of
from orchestrator.run.reader import RunRecords, read_run
from orchestrator.work.results import RungResult
from tests.unit.fake_run import trial_spec, write_trial

START = 1_790_000_000.0


def rung(trial: str, gang: int, start: float, end: float, train: float = 0.0, score: float = 0.0) -> RungResult:
    """Seconds from the first submission."""
    return RungResult(
        trial_id=trial,
        rung=0,
        step=1,
        tokens=1,
        state="done",
        train_seconds=train,
        eval_seconds=score,
        started_at=START + start,
        finished_at=START + end,
        gang=gang,
    )


def ready(gang: int, at: float, seconds: float) -> dict[str, Any]:
    return {"time": START + at, "kind": "gang_ready", "gang": gang, "seconds": seconds, "message": "gang ready"}


def died(gang: int, at: float) -> dict[str, Any]:
    return {"time": START + at, "kind": "gang_died", "gang": gang, "message": "gang broke"}


def run_of(
    results: list[RungResult], events: list[dict[str, Any]], *, submitted: tuple[float, ...] = (0.0,), complete: bool = True
) -> RunRecords:
    return RunRecords(
        folder=Path("run"),
        name="run",
        spec_text="",
        plan=None,
        sweep=None,
        transfer=None,
        complete=complete,
        events=tuple(events),
        results=tuple(results),
        submissions=tuple(START + time for time in submitted),
    )


def seconds(run: RunRecords) -> dict[str, float]:
    return {kind: round(value, 6) for kind, value in seconds_by_kind(submissions_of(run)).items()}


TWO_GANGS = [
    rung("t000-aaaaaa", 0, 10, 20, train=8, score=1),
    rung("t001-bbbbbb", 0, 22, 30, train=6, score=1),
    rung("t002-cccccc", 1, 11, 40, train=25, score=3),
]
STARTS = [ready(0, 10, 9), ready(1, 11, 10)]


def test_every_second_of_a_gang_is_told() -> None:
    run = run_of(TWO_GANGS, STARTS)
    assert seconds(run) == {"training": 39, "scoring": 5, "keeping": 3, "idle": 2 + 10, "starting": 19}, (
        "gang 0 waits two seconds between its trials, and ten for gang 1 to end"
    )
    (part,) = submissions_of(run)
    assert (part.start, part.end) == (START, START + 40)


def test_the_sentence_gives_training_scoring_and_idle_first() -> None:
    said = shares_sentence(submissions_of(run_of(TWO_GANGS, STARTS)))
    assert said.startswith("Of the 2 gangs' 1m18s, 50% was training, 6% scoring, 15% idle, ")
    assert said.endswith("4% opening and saving trials and 24% starting and loading the base model.")
    alone = shares_sentence(submissions_of(run_of([rung("t000-aaaaaa", 0, 0, 10, train=10)], [])))
    assert alone == "Of the gang's 10.0s, 100% was training, 0% scoring and 0% idle."


def test_a_gang_that_died_is_replaced_and_what_it_did_is_lost() -> None:
    results = [rung("t000-aaaaaa", 0, 10, 20, train=10), rung("t001-bbbbbb", 0, 40, 50, train=10)]
    run = run_of(results, [ready(0, 10, 10), died(0, 27), ready(0, 39, 11)])
    assert seconds(run) == {"training": 20, "lost": 7, "starting": 10 + 12, "idle": 1}, "a second until it was placed again"


def test_a_replacement_whose_reason_was_not_recorded_leaves_a_gap() -> None:
    results = [rung("t000-aaaaaa", 0, 10, 20, train=10), rung("t001-bbbbbb", 0, 40, 50, train=10)]
    assert seconds(run_of(results, [ready(0, 40, 8)])) == {"training": 20, "starting": 8}


def test_a_gang_that_died_last_is_not_idle_afterwards() -> None:
    results = [rung("t000-aaaaaa", 0, 0, 20, train=20), rung("t001-bbbbbb", 1, 0, 50, train=50)]
    assert seconds(run_of(results, [died(0, 24)])) == {"training": 70, "lost": 4}


def test_a_resumed_run_leaves_out_the_time_between_its_submissions() -> None:
    results = [rung("t000-aaaaaa", 0, 10, 20, train=10), rung("t001-bbbbbb", 0, 5010, 5030, train=20)]
    run = run_of(results, [ready(0, 10, 10), ready(0, 5010, 10)], submitted=(0.0, 5000.0))
    assert seconds(run) == {"training": 30, "starting": 20}
    assert [part.end - part.start for part in submissions_of(run)] == [20, 30]
    assert "over 2 submissions" in shares_sentence(submissions_of(run))
    assert "submitted again" in gang_times(run)


def test_what_a_broken_off_run_did_last_is_not_called_idle() -> None:
    results = [rung("t000-aaaaaa", 0, 0, 20, train=20), rung("t001-bbbbbb", 1, 0, 50, train=50)]
    assert seconds(run_of(results, [], complete=False)) == {"training": 70}
    assert seconds(run_of(results, [])) == {"training": 70, "idle": 30}


def test_what_a_submission_before_the_last_did_last_is_not_called_idle_either() -> None:
    first = [rung("t000-aaaaaa", 0, 0, 20, train=20), rung("t001-bbbbbb", 1, 0, 50, train=50)]
    second = [rung("t000-aaaaaa", 0, 100, 120, train=20), rung("t001-bbbbbb", 1, 100, 125, train=25)]
    assert seconds(run_of([*first, *second], [], submitted=(0.0, 100.0))) == {"training": 115, "idle": 5}


def test_older_runs_say_a_start_in_words_alone_and_submissions_not_at_all() -> None:
    start = {"time": START + 9.9, "kind": "gang_ready", "gang": 0, "message": "gang 0 ready in 7.5 s"}
    run = run_of([rung("t000-aaaaaa", 0, 10, 20, train=10)], [start], submitted=())
    assert seconds(run) == {"training": 10}, "without a submission's time nothing is known from before the first work"
    assert seconds(run_of([rung("t000-aaaaaa", 0, 10, 20, train=10)], [start])) == {"training": 10, "starting": 7.5, "idle": 0.1}


def test_an_event_that_is_written_late_does_not_overlap_the_first_work() -> None:
    assert seconds(run_of([rung("t000-aaaaaa", 0, 10, 20, train=10)], [ready(0, 10.3, 5)])) == {"training": 10, "starting": 4.7}


@pytest.mark.parametrize(
    "result",
    [
        rung("t000-aaaaaa", 0, 10, 20).model_copy(update={"started_at": 0.0, "finished_at": 0.0}),
        rung("t000-aaaaaa", -1, 10, 20),
    ],
    ids=["without times", "without a gang"],
)
def test_results_without_times_draw_nothing(result: RungResult) -> None:
    run = run_of([result], [])
    assert submissions_of(run) == ()
    assert "No times were recorded" in gang_times(run)


def test_a_run_with_some_results_of_an_older_version_begins_with_the_others() -> None:
    older = rung("t000-aaaaaa", 0, 0, 0).model_copy(update={"started_at": 0.0, "finished_at": 0.0})
    (part,) = submissions_of(run_of([older, rung("t001-bbbbbb", 0, 10, 20, train=10)], [], submitted=()))
    assert (part.start, part.end) == (START + 10, START + 20)


def test_the_page_shows_a_row_for_every_gang(fake_run: Callable[..., Path]) -> None:
    folder = fake_run(events=STARTS)
    (folder / "run.json").write_text(json.dumps({"submissions": [START]}))
    for number, result in enumerate(TWO_GANGS):
        write_trial(folder, trial_spec(number).model_copy(update={"trial_id": result.trial_id}), results=[result])
    page = render_page(read_run(folder))
    assert "Worker groups (gangs) over time" in page
    assert "50% was training" in page
    for words in ("gang 0<", "gang 1<", "seconds since the run was submitted"):
        assert words in page


def test_a_run_without_results_has_no_such_section(fake_run: Callable[..., Path]) -> None:
    assert "gangs) over time" not in render_page(read_run(fake_run()))


def test_trials_that_shared_batches_have_an_even_part_of_their_time_each() -> None:
    """Two trained 4 s and were scored 2 s together; a third came alone."""
    together = [rung(trial, 0, 0, 8, train=2, score=1) for trial in ("t000-a", "t001-b")]
    first, second, third = side_by_side([*together, rung("t002-c", 0, 8, 9)])
    assert [first.started_at - START, first.finished_at - START] == [0, 4]
    assert [second.started_at - START, second.finished_at - START] == [4, 8]
    assert [third.started_at - START, third.finished_at - START] == [8, 9]
