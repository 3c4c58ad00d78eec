"""A run whose records were damaged since: each is named and set aside, and what is whole is gone on with."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from orchestrator.errors import IntegrityError, OrchestratorError, RunConflictError
from orchestrator.plan import make_trial, none_control
from orchestrator.report.page import write_report
from orchestrator.report.terminal import LogView
from orchestrator.run.hours import read_hours
from orchestrator.run.ledger import Ledger
from orchestrator.run.reader import read_run
from orchestrator.run.records import read_outcome
from orchestrator.runtime.merging import merge_trial
from orchestrator.runtime.prepare import Prepared, open_run, reopen
from orchestrator.spec import load_spec
from orchestrator.store import append_jsonl, commit_folder, read_jsonl, write_json
from orchestrator.transfer.records import SweepResult, TransferReport, TrialRecord
from orchestrator.work.assignment import ownership
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "noise": lambda whole: bytes(np.random.default_rng(7).integers(0, 256, len(whole), dtype=np.uint8)),
    "a list": lambda _: b"[1, 2, 3]",
    "a number": lambda _: b"7",
    "null": lambda _: b"null",
    "no keys": lambda _: b"{}",
    "NaN": lambda _: b'{"used": NaN, "trial": NaN, "trial_id": NaN, "state": NaN}',
    "deep": lambda _: b"[" * 100_000,
}
RECORDS = [
    "plan.json",
    "base.json",
    "run.json",
    "hours.json",
    "sweep.json",
    "transfer.json",
    "layer_scores.json",
    "compile.json",
    "domain_shift.json",
    "data/summary.json",
    "events.jsonl",
    "trials/none/trial.json",
    "trials/none/result-0.json",
    "trials/none/eval.npz",
    "trials/none/end.json",
    "trials/t0000/trial.json",
    "trials/t0000/result-0.json",
    "trials/t0000/result-1.json",
    "trials/t0000/end.json",
    "trials/t0000/steps.jsonl",
    "trials/t0000/rung-0/manifest.json",
    "trials/t0000/rung-1/state.json",
    "trials/t0000/rung-1/eval.npz",
    "trials/t0000/rung-1/adapter/adapter_model.safetensors",
    "refit/trial.json",
    "refit/result.json",
    "refit/stepped-down.json",
]
TOLD_OTHERWISE = {"data/summary.json", "events.jsonl", "trials/t0000/steps.jsonl"}
"""Made again, or read line by line: no record is set aside."""


PROVEN_BY_PLAN = {"run.json", "plan.json", "base.json", "trials/t0000/result-1.json"}
"""Prepared again in full, too."""


def open_only(run: Path) -> None:
    loaded = load_spec(run.parent.parent / "spec.yaml")
    open_run(loaded, "sweep", run.parent, LogView(io.StringIO())).close()


def write_rung(folder: Path, trial: TrialSpec, number: int, *, of: TrialSpec | None = None) -> Path:
    with commit_folder(folder / f"rung-{number}", about=ownership(of or trial)) as rung:
        (rung / "adapter").mkdir()
        (rung / "adapter" / "adapter_model.safetensors").write_bytes(b"weights" * 99)
        write_json(rung / "state.json", {"step": number + 1, "has_optimizer": True})
        np.savez(rung / "eval.npz", loss_sums=np.ones(4), num_tokens=np.ones(4))
    return folder / f"rung-{number}"


def fill(prepared: Prepared, *, finished: bool) -> None:
    """What gangs and exchange would have left: the base scored, one trial at its second rung."""
    run = prepared.run
    none, _ = none_control(prepared.plan, prepared.anatomy, 0)
    trial = make_trial(prepared.plan, prepared.plan.search.options[0], 1e-3, 0, 0).model_copy(update={"trial_id": "t0000"})
    ledger = Ledger(run.trials)
    for each, option in ((none, None), (trial, 0)):
        ledger.register(each, option)
    ledger.add(RungResult(trial_id="none", rung=0, step=0, tokens=0, state="done", eval_loss=2.0))
    np.savez(run.trials / "none" / "eval.npz", loss_sums=np.ones(4), num_tokens=np.ones(4))
    for number in (0, 1):
        checkpoint = write_rung(run.trials / "t0000", trial, number)
        done = {"step": number + 1, "tokens": 9, "state": "done", "eval_loss": 1.0, "train_seconds": 1800.0}
        ledger.add(RungResult(trial_id="t0000", rung=number, checkpoint=str(checkpoint), **done))
        append_jsonl(run.trials / "t0000" / "steps.jsonl", {"step": number + 1})
    for trial_id in ("none", "t0000"):
        ledger.end(trial_id, "finished")
    write_json(run.hours, {"used": 2.5})
    for path in (run.layer_scores, run.compile_choice, run.domain_shift):
        path.write_text('{"no": "such value"}')  # damaged in any case
    run.refit.mkdir()
    write_json(run.refit / "trial.json", {"trial_id": "t0000"})
    write_json(run.refit / "result.json", RungResult(trial_id="t0000", rung=0, step=2, tokens=9, state="done"))
    write_json(run.refit / "stepped-down.json", {"execution": None, "notes": [], "reason": "x"})
    records = [TrialRecord(trial_id="t0000", number=0, layers="last:1", tune="lora", learning_rate=1e-3, state="finished")]
    sweep = SweepResult(
        name="run",
        metric="loss",
        higher_is_better=False,
        max_forgetting=0.1,
        trials=tuple(records),
        winner_id="t0000",
        promotion_reason="",
        finished_at=1.0 if finished else None,
        gpu_hours_used=2.0,
    )
    write_json(run.sweep, sweep)
    write_json(run.transfer, TransferReport(sentence="well"))


@pytest.fixture
def at(submit: Callable[[], Prepared], tmp_path: Path) -> Callable[[bool], Path]:
    def begun(finished: bool) -> Path:
        fill(submit(), finished=finished)
        run = tmp_path / "runs" / "run"
        submit()  # what never stood is told now, and not again
        (run / "events.jsonl").unlink()
        return run

    return begun


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
def test_every_record_may_be_damaged(at: Callable[[bool], Path], submit: Callable[[], Prepared], finished: bool) -> None:
    """Every record file x every kind of damage: a typed error that says what to do, or an event and the rest gone on with."""
    run = at(finished)
    whole = run.with_name("whole")
    shutil.copytree(run, whole)
    for number, place in enumerate(RECORDS):
        for kind, name in enumerate(DAMAGES):
            always = name == "half" or (name == "a list" and not finished)
            if not always and (finished or kind % 3 != number % 3):
                continue  # each record meets a third of the other damages; of a finished run "half" alone
            shutil.rmtree(run)
            shutil.copytree(whole, run)
            file = run / place
            if not file.exists():
                continue
            if (place, name) == ("transfer.json", "no keys"):
                continue  # a report without a word is one
            file.write_bytes(DAMAGES[name](file.read_bytes()))
            where = f"{place}: {name}"
            read_run(run)
            if name == "half":
                write_report(run)
            Ledger(run / "trials")
            if name == "half":
                with pytest.raises(OrchestratorError):
                    merge_trial(run, "t9", view=None)  # type: ignore[arg-type]
            if place in PROVEN_BY_PLAN and name == "half":
                submit()
            open_only(run)
            told = [event for event in read_jsonl(run / "events.jsonl") if event["kind"] == "record_damaged"]
            checkpoint = "rung-" in place or place.endswith(".npz")
            expected = place not in TOLD_OTHERWISE and not (checkpoint and finished)
            assert bool(told) == expected, where
            if expected:
                aside = run / told[0]["path"]
                assert aside.with_name(told[0]["aside"]).exists(), where
                assert aside.name in told[0]["message"], where
                assert place.startswith(told[0]["path"]), where
            Ledger(run / "trials").entries()
            read_hours(run / "hours.json")
            read_outcome(run)
            open_only(run)
            again = [event for event in read_jsonl(run / "events.jsonl") if event["kind"] == "record_damaged"]
            assert len(again) == len(told), f"{where} is told once"
    shutil.rmtree(run)
    shutil.copytree(whole, run)
    (run / "data" / "summary.json").write_bytes(b"[")
    submit()
    json.loads((run / "data" / "summary.json").read_bytes())


def test_a_damaged_rung_takes_what_came_after_it_along(at: Callable[[bool], Path], submit: Callable[[], Prepared]) -> None:
    run = at(False)
    file = run / "trials" / "t0000" / "rung-0" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(b"Weights" + file.read_bytes()[7:])
    submit()
    entry = Ledger(run / "trials").get("t0000")
    assert entry is not None
    assert (entry.results, entry.end) == ((), None)
    assert (run / "trials" / "t0000" / "rung-0.damaged-1").is_dir()
    none = Ledger(run / "trials").get("none")
    assert none is not None
    assert none.results, "other trials are as they were"


def test_a_rung_of_another_trial_is_set_aside(at: Callable[[bool], Path], submit: Callable[[], Prepared]) -> None:
    run = at(False)
    entry = Ledger(run / "trials").get("t0000")
    assert entry is not None
    shutil.rmtree(run / "trials" / "t0000" / "rung-1")
    other = entry.trial.model_copy(update={"trial_id": "t0001"})
    write_rung(run / "trials" / "t0000", entry.trial, 1, of=other)
    submit()
    entry = Ledger(run / "trials").get("t0000")
    assert entry is not None
    assert [result.rung for result in entry.results] == [0], "it goes on from the rung before"
    (event,) = [event for event in read_jsonl(run / "events.jsonl") if event["kind"] == "record_damaged"]
    assert "that of trial t0001" in event["message"]


def test_hours_are_counted_again_and_never_less_than_was_known(
    at: Callable[[bool], Path], submit: Callable[[], Prepared]
) -> None:
    run = at(False)
    (run / "hours.json").write_text("{")
    submit()
    assert read_hours(run / "hours.json") == 2.0, "what sweep.json says; the results say 1.0"


def test_a_run_whose_plan_was_set_aside_still_refuses_another_spec_and_base(
    at: Callable[[bool], Path], submit: Callable[..., Prepared], base: Path
) -> None:
    run = at(False)
    (run / "plan.json").rename(run / "plan.json.damaged-1")
    with pytest.raises(RunConflictError, match="another run"):
        submit(search={"layers": ["last:2"]})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(RunConflictError, match="folder differs from when"):
        submit()


@pytest.mark.parametrize("place", ["plan.json", "run.json", "sweep.json", "data/summary.json"])
def test_a_merge_names_the_damaged_record_and_changes_nothing(at: Callable[[bool], Path], place: str) -> None:
    run = at(True)
    (run / place).write_bytes((run / place).read_bytes()[:40])
    before = sorted(path.name for path in run.rglob("*"))
    with pytest.raises((IntegrityError, RunConflictError)) as caught:
        merge_trial(run, None, view=None)  # type: ignore[arg-type]
    assert place in str(caught.value)
    assert "submit" in caught.value.remedy or "restore" in caught.value.remedy
    assert [name for name in before if name != ".lock"] == sorted(p.name for p in run.rglob("*") if p.name != ".lock")


def test_a_run_without_a_plan_that_tells_whose_it_is_is_not_taken_over(
    at: Callable[[bool], Path], submit: Callable[[], Prepared]
) -> None:
    run = at(False)
    for name in ("run.json", "plan.json"):
        (run / name).write_text("{")
    with pytest.raises(IntegrityError, match=r"run\.json"):
        submit()


def test_a_run_that_is_reopened_reads_what_it_wrote(at: Callable[[bool], Path]) -> None:
    reopen(at(True)).run.close()
