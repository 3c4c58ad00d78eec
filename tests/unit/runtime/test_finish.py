"""What stands beside the bundle in the comparison, and what its plan is held against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.plan import repeat_control, shuffled_control
from orchestrator.plan.cost.estimate import CPU_FLOPS_PER_CORE, run_flops
from orchestrator.run.hours import HoursState
from orchestrator.run.ledger import Ledger
from orchestrator.run.records import judge_trials
from orchestrator.runtime.assignments import GangFigures
from orchestrator.runtime.finish import Controls, _inputs, controls_beside
from orchestrator.runtime.outcome import plan_against_measured, summarise
from orchestrator.runtime.prepare import Prepared
from orchestrator.transfer.records import RefitRecord
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

TRIAL = TrialSpec(
    trial_id="t000", number=0, layers="last:1", tune="full", learning_rate=1e-3, total_steps=9, total_tokens=900, seed=0
)
HEAD = TRIAL.model_copy(update={"trial_id": "head", "number": -2, "control": "head"})
SHUFFLED = {"controls": ["shuffled"]}
NONE = TRIAL.model_copy(update={"trial_id": "none", "number": -3, "control": "none"})


def add(ledger: Ledger, trial: TrialSpec, step: int, *, ends: bool = True, **fields: object) -> None:
    """A trial that ended there, unless another rung follows."""
    values = {"trial_id": trial.trial_id, "rung": 0, "step": step, "tokens": 300, "state": "done", "eval_loss": 1.5}
    ledger.register(trial, None if trial.control else 0)
    ledger.add(RungResult.model_validate({**values, "checkpoint": f"/{trial.trial_id}", **fields}))
    if ends:
        failed = fields.get("state") == "failed"
        ledger.end(trial.trial_id, "failed" if failed else "finished", str(fields.get("reason", "")))


def test_only_a_control_of_the_same_budget_is_compared(submit: Callable[..., Prepared], tmp_path: Path) -> None:
    prepared, ledger = submit(search={"repeats": 4, "controls": ["shuffled"], "scheduler": "none"}), Ledger(tmp_path)
    add(ledger, HEAD, 3)
    for control in (shuffled_control(TRIAL), repeat_control(TRIAL, 2)):
        add(ledger, control, 9)
    diverged = repeat_control(TRIAL, 3)
    add(ledger, diverged, 6, ends=False)
    add(ledger, diverged, 9, rung=1, state="failed", reason="the loss became NaN", checkpoint=None)
    same = controls_beside(prepared, ledger, TRIAL, bundled_step=9)
    assert same.artifacts == {"head": "/head", "shuffled": "/shuffled-t000", "repeat-2": "/repeat-2-t000"}
    never_begun = "repeat-4-t000 was not trained"
    assert same.left_out == ("repeat-3-t000 failed: the loss became NaN", never_begun), "none goes without a word"
    assert same.repeat_seeds == {"repeat-2": TRIAL.seed + 1}
    assert same.failed_seeds == 1
    shorter = controls_beside(prepared, ledger, TRIAL, bundled_step=3)
    assert shorter.artifacts == {"head": "/head"}
    assert shorter.left_out == (
        *(f"{name}-t000 was trained to 9 steps and what is bundled to 3" for name in ("shuffled", "repeat-2")),
        *same.left_out,
    )


def test_whoever_judges_hears_of_failed_seeds(submit: Callable[..., Prepared], tmp_path: Path) -> None:
    prepared, ledger = submit(search={"repeats": 3}), Ledger(tmp_path)
    add(ledger, TRIAL, 9)
    entry = ledger.get("t000")
    assert entry is not None
    controls = {"head": "/head", "repeat-2": "/repeat"}
    inputs = _inputs(prepared, entry, entry.results[0], Controls(controls, repeat_seeds={"repeat-2": 8}, failed_seeds=2))
    assert (inputs.failed_seeds, inputs.controls, inputs.repeat_seeds) == (2, controls, {"repeat-2": 8})


def test_with_early_stopping_a_control_stands_beside_the_bundle_as_it_was_best(
    submit: Callable[..., Prepared], tmp_path: Path
) -> None:
    prepared, ledger = submit(search={"repeats": 2, "controls": ["shuffled"]}), Ledger(tmp_path)
    assert prepared.scoring.patience == 2
    for trial in (HEAD, repeat_control(TRIAL, 2), shuffled_control(TRIAL)):
        for rung, loss in enumerate((2.0, 1.0, 1.5)):
            add(ledger, trial, 3 * rung + 3, rung=rung, eval_loss=loss, checkpoint=f"/{trial.trial_id}/{rung}")
    found = controls_beside(prepared, ledger, TRIAL, bundled_step=9)
    assert found.artifacts == {"head": "/head/1", "repeat-2": "/repeat-2-t000/1", "shuffled": "/shuffled-t000/2"}
    longer = controls_beside(prepared, ledger, TRIAL, bundled_step=12)
    assert longer.left_out == ("shuffled-t000 was trained to 9 steps and what is bundled to 12",)


def test_a_control_stands_beside_the_bundle_as_long_as_that_was_trained(submit: Callable[..., Prepared], tmp_path: Path) -> None:
    """A refit that forgets too much gives way to the trial's own rung: the control stopped there too."""
    prepared, ledger = submit(search=SHUFFLED), Ledger(tmp_path)
    for rung, step in enumerate((3, 9)):
        add(ledger, shuffled_control(TRIAL), step, rung=rung, checkpoint=f"/shuffled/{step}")
    for step in (3, 9):
        assert controls_beside(prepared, ledger, TRIAL, bundled_step=step).artifacts == {"shuffled": f"/shuffled/{step}"}


def test_a_bundled_head_is_not_compared_with_itself(submit: Callable[..., Prepared], tmp_path: Path) -> None:
    prepared, ledger = submit(), Ledger(tmp_path)
    add(ledger, HEAD, 9)
    assert controls_beside(prepared, ledger, HEAD, bundled_step=9).artifacts == {}


def test_the_first_step_of_the_first_trial_is_counted_and_no_controls(submit: Callable[[], Prepared]) -> None:
    prepared = submit()
    ledger = Ledger(prepared.run.trials)
    add(ledger, NONE, 0, eval_loss=3.0, started_at=1001.0)
    add(ledger, HEAD, 9, eval_loss=2.9, started_at=1002.0)
    add(ledger, TRIAL.model_copy(update={"trial_id": "earlier", "number": 1}), 9, eval_loss=2.0, started_at=500.0)
    add(ledger, TRIAL, 4, started_at=1010.0, train_seconds=6.0)
    sweep = summarise(prepared, judge_trials(ledger, prepared.scoring), [GangFigures()], started_at=1000.0)
    assert sweep.first_trial_seconds == 10.0 + 6.0 / 4


def test_only_the_winners_own_shuffled_control_is_shown(submit: Callable[..., Prepared]) -> None:
    prepared = submit(search=SHUFFLED)
    ledger = Ledger(prepared.run.trials)
    other = TRIAL.model_copy(update={"trial_id": "other-t000", "number": 1})
    for trial, loss in ((NONE, 3.0), (TRIAL, 1.5), (other, 2.0), (shuffled_control(TRIAL), 2.5), (shuffled_control(other), 2.5)):
        add(ledger, trial, 9, eval_loss=loss)
    sweep = summarise(prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0)
    assert sweep.winner_id == "t000"
    assert [trial.trial_id for trial in sweep.trials if trial.control == "shuffled"] == ["shuffled-t000"]


@pytest.mark.parametrize(
    ("done", "search", "shuffled", "words"),
    [
        (1, {}, False, "the search was ended after 1 of 2 trials: the bound"),
        (2, {}, False, ""),
        (2, SHUFFLED, False, "all 2 trials were searched, but out of GPU-hours for the control shuffled: the bound"),
        (2, SHUFFLED, True, ""),
        (2, {"repeats": 2}, False, "all 2 trials were searched, but out of GPU-hours for the control repeat-2: the bound"),
    ],
    ids=["a trial was held back", "nothing was", "a control was", "the control was there", "another seed was"],
)
def test_it_is_said_what_was_held_back_for_want_of_hours(
    submit: Callable[..., Prepared], done: int, search: dict[str, Any], shuffled: bool, words: str
) -> None:
    prepared = submit(search=search)
    ledger = Ledger(prepared.run.trials)
    add(ledger, NONE, 0, eval_loss=3.0)
    add(ledger, HEAD, 9, eval_loss=2.9)
    for number in range(done):
        add(ledger, TRIAL.model_copy(update={"trial_id": f"t00{number}", "number": number}), 9, eval_loss=1.5 + number)
    if shuffled:
        add(ledger, shuffled_control(TRIAL), 9, eval_loss=2.5)
    sweep = summarise(
        prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0, hours=HoursState(used=2, spent="the bound")
    )
    assert sweep.winner_id == "t000"
    assert sweep.ended_by_hours == words


def test_a_peak_after_memory_ran_out_does_not_speak_for_the_plan(submit: Callable[[], Prepared]) -> None:
    prepared = submit()
    ledger = Ledger(prepared.run.trials)
    add(ledger, NONE, 0, eval_loss=3.0)
    add(ledger, TRIAL, 9, reduced_execution=prepared.plan.execution)
    sweep = summarise(prepared, judge_trials(ledger, prepared.scoring), [], started_at=0.0)
    row = plan_against_measured(prepared, sweep, None)[0]
    assert (row.name, row.planned) == ("peak memory of a rank (1 trial ran out of memory)", None)


def test_time_and_disk_are_held_against_the_same_of_the_plan(submit: Callable[[], Prepared]) -> None:
    prepared = submit()
    ledger = Ledger(prepared.run.trials)
    add(ledger, NONE, 0, eval_loss=3.0, eval_seconds=1.0)
    add(ledger, TRIAL, 9, train_seconds=6.0, eval_seconds=1.0)
    add(ledger, shuffled_control(TRIAL), 9, train_seconds=99.0)
    sweep = summarise(prepared, judge_trials(ledger, prepared.scoring), [GangFigures(base_loads=1)], started_at=0.0)
    plan = prepared.plan
    rows = {row.name: row for row in plan_against_measured(prepared, sweep, RefitRecord(ran=True, reason="", seconds=5.0))}
    time = rows["core time of training and scoring"]
    assert time.planned == run_flops(plan, prepared.anatomy) / CPU_FLOPS_PER_CORE
    searching, refitting = (e.ranks * e.threads_per_rank for e in (plan.execution, plan.refit_execution))
    assert time.measured == 8.0 * searching + 5.0 * refitting
    with_curve = sweep.model_copy(update={"learning_curve_seconds": 4.0})
    (longer,) = [row for row in plan_against_measured(prepared, with_curve, None) if row.name == time.name]
    assert longer.measured == 12.0 * searching, "the plan counts a learning curve, which is not among the trials"
    assert rows["disk, with the bundle"].planned == plan.disk_bytes
    assert rows["base loads in the last submission's search"].measured == 1
    assert not any("disk" in row.name for row in plan_against_measured(prepared, sweep, None)), "the plan counts a bundle"
