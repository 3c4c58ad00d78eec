"""Whether a run compiles its blocks: settled once, recorded, and the same for whoever goes on with it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.errors import TrainingError
from orchestrator.plan import make_trial
from orchestrator.plan.values import RunPlan
from orchestrator.report.terminal import LogView
from orchestrator.run.ledger import Ledger
from orchestrator.runtime.measurements import CompiledBlocks, measure_once
from orchestrator.runtime.prepare import Prepared
from orchestrator.store import read_json, read_jsonl
from orchestrator.work.assignment import Measurement, TimeCompiling
from orchestrator.work.failure import Failure
from orchestrator.work.measurements import CompileChoice, CompilePlan, CompileTimes
from orchestrator.work.results import MeasurementResult

FAST = CompileTimes(eager_seconds=1.0, compiled_seconds=0.5, compile_seconds=10.0)
SLOW = CompileTimes(eager_seconds=1.0, compiled_seconds=1.1, compile_seconds=10.0)
LONG = CompilePlan(option=0, reason="it is long", num_kinds=1, gang_seconds=1e5)


class Measurer:
    """A stand-in for the gang; what it was asked, and what it answers."""

    def __init__(self, times: CompileTimes | None = None, reason: str = "") -> None:
        self.asked: list[Measurement] = []
        self.times, self.reason = times, reason

    def __call__(self, work: Measurement) -> MeasurementResult:
        self.asked.append(work)
        if self.times is None:
            return work.failed(Failure(kind="training", message=self.reason))
        return MeasurementResult(work_id=work.work_id, found=self.times, notes=("fewer rows",))


@pytest.fixture
def chosen(submit: Callable[..., Prepared], shown: io.StringIO) -> Callable[..., Prepared]:
    """Submit the small sweep, as if it were a long one where that is said, and have its choice made by a stand-in."""

    def go(measurer: Measurer, plan: CompilePlan | None = None, *, asked: str = "auto", **search: Any) -> Prepared:
        prepared = submit(search=search, resources={"compile": asked})
        if plan is not None and prepared.plan.compiling is not None:
            object.__setattr__(prepared, "plan", prepared.plan.model_copy(update={"compiling": plan}))
        return measure_once(CompiledBlocks(prepared), LogView(shown), measurer)

    return go


def kinds(prepared: Prepared) -> list[str]:
    return [line["kind"] for line in read_jsonl(prepared.run.path / "events.jsonl") if "compiled" in line["kind"]]


def choice_in(prepared: Prepared) -> CompileChoice:
    return CompileChoice.model_validate(read_json(prepared.run.compile_choice))


def test_what_pays_is_chosen_once_and_kept_by_a_second_submission(chosen: Callable[..., Prepared], shown: io.StringIO) -> None:
    measurer = Measurer(FAST)
    first = chosen(measurer, LONG)
    (asked,) = measurer.asked
    assert isinstance(asked, TimeCompiling)
    assert (asked.work_id, asked.plan, asked.trial.control) == ("compile", LONG, None)
    assert asked.selection == first.plan.search.options[0].selection
    assert first.plan.execution.compiled
    assert RunPlan.model_validate(read_json(first.run.plan)) == first.plan
    assert choice_in(first).times == FAST
    assert kinds(first) == ["blocks_compiled"]
    assert "0.50 of 1000.0 ms" in shown.getvalue()
    assert not (first.run.trials / "compile").exists(), "it is no trial"

    again = chosen(Measurer(reason="this must not be asked"), LONG, trials=5)
    assert again.plan.execution == first.plan.execution
    assert kinds(again) == ["blocks_compiled"]


def test_what_does_not_pay_stays_so(chosen: Callable[..., Prepared]) -> None:
    assert not chosen(Measurer(SLOW), LONG).plan.execution.compiled
    measurer = Measurer(FAST)
    again = chosen(measurer, LONG, trials=5)
    assert not measurer.asked
    assert not again.plan.execution.compiled
    assert kinds(again) == ["blocks_not_compiled"]


def test_a_search_that_grows_long_goes_on_as_it_began(chosen: Callable[..., Prepared]) -> None:
    first = chosen(Measurer(reason="this must not be asked"))
    assert "not compiled" in choice_in(first).reason
    measurer = Measurer(FAST)
    assert not chosen(measurer, LONG, trials=5).plan.execution.compiled
    assert not measurer.asked


def test_trials_of_an_older_version_are_not_left_alone(chosen: Callable[..., Prepared]) -> None:
    run = chosen(Measurer(), asked="off")
    run.run.compile_choice.unlink()
    trial = make_trial(run.plan, run.plan.search.options[0], 1e-3, 0, 0)
    Ledger(run.run.trials).register(trial, 0)
    measurer = Measurer(FAST)
    assert not chosen(measurer, LONG).plan.execution.compiled
    assert not measurer.asked


def test_who_asks_is_obeyed_also_later(chosen: Callable[..., Prepared]) -> None:
    required = LONG.model_copy(update={"required": True})
    assert not chosen(Measurer(), asked="off").plan.execution.compiled
    assert chosen(Measurer(SLOW), required, asked="on").plan.execution.compiled
    assert chosen(Measurer(), asked="auto").plan.execution.compiled
    assert not chosen(Measurer(), asked="off").plan.execution.compiled
    last = chosen(Measurer(), asked="auto")
    assert not last.plan.execution.compiled
    assert kinds(last) == ["blocks_not_compiled", "blocks_compiled", "blocks_not_compiled"]


def test_what_cannot_be_compiled_stops_a_run_that_asks_for_it_alone(chosen: Callable[..., Prepared]) -> None:
    required = LONG.model_copy(update={"required": True})
    missing = CompileTimes(failed="there is no C++ compiler (g++)")
    with pytest.raises(TrainingError, match=r"no C\+\+ compiler") as told:
        chosen(Measurer(missing), required, asked="on")
    assert "submit again" in told.value.remedy
    found = chosen(Measurer(reason="3 gangs died while running it"), LONG)
    assert not found.plan.execution.compiled
    assert "3 gangs died" in choice_in(found).reason
