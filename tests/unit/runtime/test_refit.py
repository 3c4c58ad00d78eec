"""A refit that ran out of memory inside its worker group and was killed goes on by the smaller way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.errors import RankOutOfMemoryError
from orchestrator.plan import make_trial
from orchestrator.runtime.prepare import Prepared
from orchestrator.runtime.refit import _run, refit_assignment
from orchestrator.store import commit_folder, write_json
from orchestrator.train.ranks import Ranks
from orchestrator.work.assignment import TrainRung
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.failure import Failure
from orchestrator.work.results import RungResult

HALVED = "out of memory: started again with fewer rows"


class KilledError(Exception):
    pass


class ScriptedHost:
    """A rank that saves a checkpoint at 4, steps down, saves one at `saves` and ends by `end`; without one, it trains."""

    ranks = Ranks()

    def __init__(self, saves: int | None, end: Exception | None) -> None:
        self._saves, self._end = saves, end
        self.ran: list[TrainRung] = []

    def run_trial(self, assignment: TrainRung, *, on_reduced: Callable[[ExecutionPlan, str], None]) -> RungResult:
        self.ran.append(assignment)
        notes: tuple[str, ...] = ()
        if self._end is not None:
            save(Path(assignment.folder), 4)
            smaller = assignment.execution.model_copy(update={"micro_batch_rows": assignment.execution.micro_batch_rows // 2})
            on_reduced(smaller, HALVED)
            if self._saves is not None:
                save(Path(assignment.folder), self._saves)
            raise self._end
        return RungResult(trial_id=assignment.trial.trial_id, rung=0, step=9, tokens=1, state="done", notes=notes)


def save(folder: Path, step: int) -> None:
    with commit_folder(folder / f"checkpoint-{step}") as made:
        write_json(made / "state.json", {"step": step, "has_optimizer": True})


@pytest.fixture
def assignment(submit: Callable[[], Prepared]) -> TrainRung:
    prepared = submit()
    option = prepared.plan.search.options[0]
    execution = prepared.plan.refit_execution.model_copy(update={"micro_batch_rows": 8})
    made = refit_assignment(prepared, make_trial(prepared.plan, option, 1e-3, 0, seed=0), option.selection)
    return made.model_copy(update={"execution": execution})


@pytest.mark.parametrize("saves", [None, 2])
def test_what_was_done_by_the_larger_way_is_dropped_and_the_smaller_way_is_kept(assignment: TrainRung, saves: int | None) -> None:
    with pytest.raises(KilledError):
        _run(ScriptedHost(saves, KilledError()), assignment)  # type: ignore[arg-type]
    after = ScriptedHost(None, None)
    result = _run(after, assignment)  # type: ignore[arg-type]
    (ran,) = after.ran
    assert ran.execution.micro_batch_rows == 4
    assert ran.start == (f"{assignment.folder}/checkpoint-{saves}" if saves else None), "not from the larger way's checkpoint"
    assert result.notes == (HALVED,)
    assert result.reduced_execution is not None


def test_a_rank_alone_that_runs_out_goes_down_from_where_its_group_had_come(assignment: TrainRung) -> None:
    with pytest.raises(RankOutOfMemoryError):
        _run(ScriptedHost(None, RankOutOfMemoryError("out of memory on rank 1")), assignment)  # type: ignore[arg-type]
    after = ScriptedHost(None, None)
    result = _run(after, assignment)  # type: ignore[arg-type]
    assert after.ran[0].execution.micro_batch_rows == 2
    assert [note.startswith("out of memory") for note in result.notes] == [True, True]


def test_the_worker_group_after_the_last_step_down_answers_with_the_failure(assignment: TrainRung) -> None:
    smallest = assignment.execution.model_copy(update={"micro_batch_rows": 1, "checkpointing": True, "zero_stage": 2})
    at_the_end = assignment.model_copy(update={"execution": smallest})
    Path(assignment.folder).mkdir(parents=True)
    ended = RankOutOfMemoryError("out of memory on rank 1")

    class LastHost(ScriptedHost):
        def run_trial(self, assignment: TrainRung, *, on_reduced: Callable[[ExecutionPlan, str], None]) -> RungResult:
            raise ended

    with pytest.raises(RankOutOfMemoryError):
        _run(LastHost(None, ended), at_the_end)  # type: ignore[arg-type]
    after = ScriptedHost(None, None)
    result = _run(after, at_the_end)  # type: ignore[arg-type]
    assert after.ran == []
    assert result.failed_for_memory
    assert result.reason.startswith("out of memory on rank 1; memory use cannot be reduced further")


def test_a_refit_that_failed_for_memory_is_tried_again_as_planned(assignment: TrainRung) -> None:
    class FullHost(ScriptedHost):
        def run_trial(self, assignment: TrainRung, *, on_reduced: Callable[[ExecutionPlan, str], None]) -> RungResult:
            with suppress(KilledError):
                super().run_trial(assignment, on_reduced=on_reduced)
            return assignment.failed(Failure(kind="out_of_memory", message="out of memory"))

    assert _run(FullHost(None, KilledError()), assignment).state == "failed"  # type: ignore[arg-type]
    after = ScriptedHost(None, None)
    _run(after, assignment)  # type: ignore[arg-type]
    assert after.ran[0].execution == assignment.execution
