"""Which of the promoted trial's results is bundled, and what an earlier submission's refit is worth."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestrator.errors import TrainingError
from orchestrator.plan import make_trial
from orchestrator.report.terminal import LogView
from orchestrator.run.ledger import TrialEntry
from orchestrator.run.records import judge_trial
from orchestrator.runtime import refit as budget
from orchestrator.runtime.prepare import Prepared
from orchestrator.runtime.refit import full_budget, refit_assignment, run_refit
from orchestrator.store import read_jsonl, write_json
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.failure import Failure
from orchestrator.work.memory_ladder import MemoryLadder
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

TOTAL_STEPS = 54
ALONE = ExecutionPlan(
    device="cpu", ranks=1, threads_per_rank=1, executor="torch", dtype="float32", row_tokens=32, micro_batch_rows=1
)


def result(trial_id: str, step: int, retain_loss: float | None, **fields: object) -> RungResult:
    values = {"rung": 0, "tokens": 300, "state": "done", "eval_loss": 1.5, "checkpoint": f"/{trial_id}/{step}"}
    return RungResult.model_validate({"trial_id": trial_id, "step": step, "retain_loss": retain_loss, **values, **fields})


BASE = result("none", 0, 4.0)


@pytest.fixture
def prepared(submit: Callable[..., Prepared]) -> Prepared:
    """Judged by its last rung, in steps of many rows."""
    return submit(search={"scheduler": "none"}, train={"tokens_per_step": 8192})


@pytest.fixture
def trial(prepared: Prepared) -> TrialSpec:
    """One that the scheduler may have stopped before its last step."""
    drawn = make_trial(prepared.plan, prepared.plan.search.options[0], 1e-3, 0, seed=0)
    return drawn.model_copy(update={"total_steps": TOTAL_STEPS})


def with_patience(prepared: Prepared) -> Prepared:
    """The same run with early stopping."""
    search = prepared.plan.search.model_copy(update={"patience": 2})
    return replace(prepared, plan=prepared.plan.model_copy(update={"search": search}))


def rungs(trial: TrialSpec, **losses: float) -> TrialEntry:
    """A trial by its held-out loss at steps."""
    steps = [(int(step.removeprefix("at_")), loss) for step, loss in losses.items()]
    results = (result(trial.trial_id, step, None, rung=rung, eval_loss=loss) for rung, (step, loss) in enumerate(steps))
    return TrialEntry(trial=trial, option=0, results=tuple(results))


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ({"at_6": 2.0, "at_12": 1.0, "at_18": 1.1, "at_24": 1.2}, 12),
        ({"at_24": 2.0, "at_54": 2.1}, 24),
        ({"at_24": 2.0, "at_54": 1.9}, 54),
    ],
    ids=["it stalled", "the full budget was worse", "the full budget was best"],
)
def test_with_early_stopping_the_best_rung_is_bundled(
    prepared: Prepared, trial: TrialSpec, losses: dict[str, float], step: int
) -> None:
    entry = rungs(trial, **losses)
    found, record = full_budget(with_patience(prepared), entry, BASE, LogView(io.StringIO()))
    assert (found.step, record.ran, record.to_step) == (step, False, step)
    expected = "the promoted trial had the full budget"
    if step < TOTAL_STEPS:
        expected = f"the promoted trial was best on the eval set after {step} of 54 steps"
    assert record.reason == expected
    assert judge_trial(entry, with_patience(prepared).scoring, BASE, prepared.run.ledger).bundled_steps == (step,)


@pytest.mark.parametrize(("refitted", "step"), [(0.9, TOTAL_STEPS), (1.1, 12)])
def test_a_refit_that_is_worse_gives_way_with_early_stopping(
    prepared: Prepared, trial: TrialSpec, refitted: float, step: int
) -> None:
    """The scheduler stopped it, still getting better: it is trained again, and what came of that is looked at."""
    entry = rungs(trial, at_6=2.0, at_12=1.0)
    patient = with_patience(prepared)
    assert judge_trial(entry, patient.scoring, BASE, prepared.run.ledger).bundled_steps == (12, TOTAL_STEPS), (
        "either may be bundled"
    )
    store_refit(prepared, result(trial.trial_id, TOTAL_STEPS, None, eval_loss=refitted))
    found, record = full_budget(patient, entry, BASE, LogView(io.StringIO()))
    assert (found.step, record.ran) == (step, True)
    if step < TOTAL_STEPS:
        assert record.reason.endswith(
            "the refit to 54 steps is worse on the eval set than the trial's own rung at step 12 (loss 1.1 against 1), "
            "which is bundled instead"
        )
    assert full_budget(prepared, entry, BASE, LogView(io.StringIO()))[0].step == TOTAL_STEPS, "without patience it is taken"


def store_refit(prepared: Prepared, stored: RungResult) -> None:
    """As an earlier submission left it."""
    prepared.run.refit.mkdir()
    write_json(prepared.run.refit / "trial.json", {"trial_id": stored.trial_id})
    write_json(prepared.run.refit / "result.json", stored)


def chosen(prepared: Prepared, trial: TrialSpec, *, rung: float | None, refitted: float | None) -> tuple[int, str, str]:
    """Step of what is bundled after a rung at step 6 and a refit, by their retention losses; the reason; what was said."""
    store_refit(prepared, result(trial.trial_id, TOTAL_STEPS, refitted))
    said = io.StringIO()
    entry = TrialEntry(trial=trial, option=0, results=(result(trial.trial_id, 6, rung),))
    bundled, record = full_budget(prepared, entry, BASE, LogView(said))
    assert (record.ran, record.to_step) == (True, TOTAL_STEPS)
    assert record.reason.startswith("the promoted trial had 6 of 54 steps")
    return bundled.step, record.reason, said.getvalue()


def test_a_refit_beyond_the_bound_gives_way_to_the_rung_that_was_promoted(prepared: Prepared, trial: TrialSpec) -> None:
    step, reason, said = chosen(prepared, trial, rung=4.04, refitted=4.15)
    assert step == 6
    assert "forgot +0.150 nats per token, more than the bound of 0.1" in reason
    assert "the trial's own rung at step 6, at +0.040, is bundled instead" in reason
    assert "refit_passed_over: the refit to 54 steps forgot +0.150" in said
    (event,) = [event for event in read_jsonl(prepared.run.path / "events.jsonl") if event["kind"] == "refit_passed_over"]
    assert event["trial_id"] == trial.trial_id
    assert event["message"] in reason


@pytest.mark.parametrize(
    ("rung", "refitted"), [(4.04, 4.09), (None, None), (4.2, 4.3)], ids=["within", "not measured", "promoted by hand"]
)
def test_any_other_refit_is_bundled(prepared: Prepared, trial: TrialSpec, rung: float | None, refitted: float | None) -> None:
    step, reason, said = chosen(prepared, trial, rung=rung, refitted=refitted)
    assert (step, reason) == (TOTAL_STEPS, "the promoted trial had 6 of 54 steps")
    assert "refit_passed_over" not in said


def test_a_refit_that_broke_is_not_a_number_within_the_bound(prepared: Prepared, trial: TrialSpec) -> None:
    assert chosen(prepared, trial, rung=4.04, refitted=float("nan"))[0] == 6


def test_a_refit_that_failed_is_tried_again_by_the_next_submission(
    prepared: Prepared, trial: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assignment = refit_assignment(prepared, trial, prepared.plan.search.options[0].selection)
    answers = [
        result(trial.trial_id, 3, None, state="failed", reason="the loss became nan", checkpoint=None),
        result(trial.trial_id, TOTAL_STEPS, 4.0),
    ]

    def train(*_: object) -> list[RungResult]:
        write_json(prepared.run.refit / "result.json", answers[0])
        return [answers.pop(0)]

    monkeypatch.setattr(budget, "refit", train)
    with pytest.raises(TrainingError, match="the loss became nan"):
        run_refit(prepared, [assignment])
    assert [found.state for found in run_refit(prepared, [assignment])] == ["done"]
    assert [found.step for found in run_refit(prepared, [assignment])] == [TOTAL_STEPS], "what is done is not done again"
    assert answers == []


def with_bound(prepared: Prepared, hours: float) -> Prepared:
    resources = prepared.spec.resources.model_copy(update={"max_gpu_hours": hours})
    return replace(prepared, spec=prepared.spec.model_copy(update={"resources": resources}))


@pytest.mark.parametrize(
    ("bound", "used", "begun", "left_out"),
    [
        (17, 1, 0, "would take about 9 of max_gpu_hours: 17"),
        (18, 1, 0, ""),
        (18, 10, 0, ""),
        (18, 10.1, 0, "would take about 9 more, and 10.1 of max_gpu_hours: 18 are used"),
        (18, 13, 27, ""),
    ],
    ids=["more than its share", "room", "a rung's slack", "more than is left", "half of it is done"],
)
def test_a_refit_that_the_hours_are_not_enough_for_is_left_out(
    prepared: Prepared,
    trial: TrialSpec,
    monkeypatch: pytest.MonkeyPatch,
    bound: float,
    used: float,
    begun: int,
    left_out: str,
) -> None:
    """An hour for six of 54 steps: nine for the refit."""
    one_gang = prepared.plan.model_copy(update={"num_gangs": 1})
    bounded = with_bound(replace(prepared, plan=one_gang), bound)
    entry = TrialEntry(trial=trial, option=0, results=(result(trial.trial_id, 6, 4.0, train_seconds=3600),))
    write_json(prepared.run.hours, {"used": used})
    if begun:
        prepared.run.refit.mkdir()
        write_json(prepared.run.refit / "trial.json", {"trial_id": trial.trial_id})
        (prepared.run.refit / f"checkpoint-{begun}").mkdir()
    monkeypatch.setattr(budget, "refit", lambda *_: [result(trial.trial_id, TOTAL_STEPS, 4.0)])
    said = io.StringIO()
    found, record = full_budget(bounded, entry, BASE, LogView(said))
    assert found.step == (6 if left_out else TOTAL_STEPS)
    assert record.left_out_for_hours is bool(left_out)
    assert ("refit_left_out" in said.getvalue()) is bool(left_out)
    assert left_out in said.getvalue()
    events = [event for event in read_jsonl(prepared.run.path / "events.jsonl") if event["kind"] == "refit_left_out"]
    assert len(events) == bool(left_out)


def test_a_refit_that_has_come_to_its_end_is_used_whatever_hours_are_left(prepared: Prepared, trial: TrialSpec) -> None:
    entry = TrialEntry(trial=trial, option=0, results=(result(trial.trial_id, 6, 4.0, train_seconds=3600),))
    store_refit(prepared, result(trial.trial_id, TOTAL_STEPS, 4.0))
    write_json(prepared.run.hours, {"used": 99})
    assert full_budget(with_bound(prepared, 1), entry, BASE, LogView(io.StringIO()))[0].step == TOTAL_STEPS


@pytest.mark.parametrize(
    ("failure", "lower_rate"),
    [
        (Failure(kind="non_finite", message="the loss became nan"), True),
        (MemoryLadder().step(ALONE.model_copy(update={"checkpointing": True}), "out of memory"), False),
    ],
    ids=["diverged", "out of memory"],
)
def test_a_lower_learning_rate_is_no_cure_for_want_of_memory(
    prepared: Prepared, trial: TrialSpec, monkeypatch: pytest.MonkeyPatch, failure: Failure, lower_rate: bool
) -> None:
    failed = result(trial.trial_id, 3, None, state="failed", failure=failure, checkpoint=None)
    monkeypatch.setattr(budget, "refit", lambda *_: [failed])
    with pytest.raises(TrainingError) as raised:
        run_refit(prepared, [refit_assignment(prepared, trial, prepared.plan.search.options[0].selection)])
    assert ("learning rate" in str(raised.value)) is lower_rate
    assert ("ranks_per_gang" in str(raised.value)) is not lower_rate


def test_a_refit_starts_as_small_as_its_trial_had_to_become(prepared: Prepared, trial: TrialSpec) -> None:
    planned = prepared.plan.refit_execution
    assert planned.micro_batch_rows > 1
    selection = prepared.plan.search.options[0].selection
    reduced = planned.model_copy(update={"micro_batch_rows": 1, "checkpointing": True})
    assert refit_assignment(prepared, trial, selection).execution == planned
    assert refit_assignment(prepared, trial, selection, reduced).execution == reduced
    elsewhere = reduced.model_copy(update={"ranks": planned.ranks + 1})
    assert refit_assignment(prepared, trial, selection, elsewhere).execution == planned
