"""Reading run directories that are whole, unfinished, or damaged."""

from __future__ import annotations

import json

import pytest

from orchestrator.run.ledger import Ledger
from orchestrator.run.reader import read_run
from orchestrator.run.records import judge_trials
from orchestrator.run.scoring import scoring_of
from orchestrator.spec.models import SearchSpec
from orchestrator.work.memory_ladder import MemoryLadder
from tests.unit.fake_run import rung_result, trial_spec, write_trial


def test_everything_of_a_finished_run(fake_run):
    run = read_run(fake_run())
    assert run.complete
    assert run.gaps == ()
    assert run.plan is not None
    assert run.transfer is not None
    winner = run.sweep.winner
    assert len(run.steps[winner.trial_id]) == 54
    assert [event["kind"] for event in run.events] == ["micro_batch_halved", "gang_replaced"]


def test_a_killed_sweep_is_put_together_from_its_trials(fake_run):
    folder = fake_run(sweep=None, transfer=None)
    write_trial(
        folder, trial_spec(-2, "none"), results=[rung_result("none", 0, 3.9, 4.0)], end={"state": "finished", "reason": ""}
    )
    write_trial(folder, trial_spec(0), results=[rung_result("t000", 1, 2.2, 4.07), rung_result("t000", 0, 2.9, 4.02)])
    failed = rung_result("t001", 0, None, None, state="failed", reason="NaN at step 3", metrics={})
    write_trial(folder, trial_spec(1), results=[failed])
    stopped = {"state": "stopped", "reason": "below the best third"}
    write_trial(folder, trial_spec(2), results=[rung_result("t002", 0, 3.1, 4.0)], end=stopped)
    run = read_run(folder)
    assert not run.complete
    assert run.gaps == ()
    by_id = {trial.trial_id: trial for trial in run.sweep.trials}
    assert [trial.state for trial in by_id.values()] == ["finished", "running", "failed", "stopped"]
    assert [rung.step for rung in by_id["t000"].rungs] == [6, 18]
    assert by_id["t000"].metric == 2.2
    assert abs(by_id["t000"].forgetting - 0.07) < 1e-9
    assert by_id["t000"].engine.zero_stage == 2
    assert by_id["t000"].trainable_parameters == 4242
    assert by_id["t001"].reason == "NaN at step 3"
    assert by_id["t001"].rungs == ()


def test_the_metric_comes_from_the_spec(fake_run):
    folder = fake_run(sweep=None, transfer=None, spec_text="name: x\nsearch:\n  metric: accuracy\n  max_forgetting: 0.3\n")
    write_trial(folder, trial_spec(0), results=[rung_result("t000", 0, 2.9, 4.0, metrics={"loss": 2.9, "accuracy": 0.61})])
    sweep = read_run(folder).sweep
    assert (sweep.metric, sweep.higher_is_better, sweep.max_forgetting) == ("accuracy", True, 0.3)
    assert sweep.trials[0].metric == 0.61


def test_a_running_sweep_on_few_examples_is_judged_by_its_best_rungs(fake_run, make):
    """As the runtime judges a trial: by the score, so that what was forgotten beyond the bound counts."""
    plan = make.plan()
    few = plan.model_copy(update={"search": plan.search.model_copy(update={"patience": 2})})
    for number, (made, metric, step) in enumerate(((few, 2.4, 18), (plan, 2.5, 54))):
        folder = fake_run(plan=made, sweep=None, transfer=None, spec_text=f"name: x{number}\n")
        if not number:
            write_trial(folder, trial_spec(-2, "none"), results=[rung_result("none", 0, 3.9, 4.0)])
            losses = ((2.9, 4.02), (2.4, 4.05), (2.5, 4.06))
            write_trial(folder, trial_spec(0), results=[rung_result("t000", rung, *both) for rung, both in enumerate(losses)])
            forgets = [rung_result("t001", 0, 2.9, 4.02), rung_result("t001", 1, 2.3, 4.5)]
            write_trial(folder, trial_spec(1), results=forgets)
        by_id = {trial.trial_id: trial for trial in read_run(folder).sweep.trials}
        assert (by_id["t000"].metric, by_id["t000"].judged.step) == (metric, step)
        assert by_id["t001"].judged.step == (18 if number else 6)
        assert by_id["t001"].rungs[1].score == pytest.approx(2.3 + 10 * (0.5 - 0.1))


def test_a_torn_last_line_is_left_out_without_a_word(fake_run):
    folder = fake_run()
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"time": 17, "ki')
    run = read_run(folder)
    assert len(run.events) == 2
    assert run.gaps == ()


def test_damage_is_named(fake_run):
    folder = fake_run()
    (folder / "plan.json").write_text('{"name": "x"}')
    (folder / "transfer.json").write_text("{")
    (folder / "data" / "summary.json").write_text("not json")
    (folder / "events.jsonl").write_text('{"kind": "a"}\nrubbish\n{"kind": "b"}\n')
    run = read_run(folder)
    assert run.plan is None
    assert run.transfer is None
    assert run.data_summary == {}
    assert len(run.events) == 2
    assert [gap.split(":")[0] for gap in run.gaps] == [
        f"{folder.name}/plan.json",
        f"{folder.name}/transfer.json",
        f"{folder.name}/events.jsonl",
        "data/summary.json",
    ]


def test_a_step_written_twice_counts_once(fake_run, make):
    folder = fake_run()
    winner = make.sweep().winner
    path = folder / "trials" / winner.trial_id / "steps.jsonl"
    again = make.steps(winner)[10].model_copy(update={"loss": 9.0})
    with path.open("a") as file:
        file.write(again.model_dump_json() + "\n")
    steps = read_run(folder).steps[winner.trial_id]
    assert [step.step for step in steps] == list(range(1, 55))
    assert steps[10].loss == 9.0


def test_an_unfinished_run_shows_which_trials_ran_out_of_memory(fake_run, make):
    folder = fake_run(sweep=None, transfer=None)
    smaller = make.plan().execution.model_copy(update={"micro_batch_rows": 2})
    smallest = smaller.model_copy(update={"micro_batch_rows": 1, "checkpointing": True, "zero_stage": 2})
    nowhere = {"state": "failed", "failure": MemoryLadder().step(smallest, "out of memory"), "metrics": {}, "eval_loss": None}
    write_trial(folder, trial_spec(0), results=[rung_result("t000", 0, 2.9, 4.02, reduced_execution=smaller)])
    write_trial(folder, trial_spec(1), results=[rung_result("t001", 0, None, None, **nowhere)])
    write_trial(folder, trial_spec(2), results=[rung_result("t002", 0, 2.8, 4.02)])
    assert [trial.out_of_memory for trial in read_run(folder).sweep.trials] == [True, True, False]


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_an_unfinished_run_reads_as_the_search_saw_it(fake_run, make, metric):
    """The resolved spec in run.json counts: spec.yaml knows neither `--set` nor the defaults."""
    plan = make.plan()
    plan = plan.model_copy(update={"execution": plan.execution.model_copy(update={"ranks": 2})})
    folder = fake_run(plan=plan, sweep=None, transfer=None, spec_text="name: x\n")
    asked = SearchSpec(metric=metric, max_forgetting=0.02)
    (folder / "run.json").write_text(json.dumps({"values": {"search": asked.model_dump(mode="json")}}))
    figures = {"loss": 2.9, "accuracy": 0.61}
    write_trial(folder, trial_spec(-2, "none"), results=[rung_result("none", 0, 3.9, 4.0, metrics={"accuracy": 0.5})])
    write_trial(folder, trial_spec(0), results=[rung_result("t000", 0, 2.9, 4.05, metrics=figures)])
    sweep, scoring = read_run(folder).sweep, scoring_of(asked, plan)
    assert sweep.trials == tuple(trial.record for trial in judge_trials(Ledger(folder / "trials"), scoring).values())
    assert (sweep.metric, sweep.higher_is_better) == (metric, metric == "accuracy")
    assert sweep.max_forgetting == 0.02
    assert sweep.trials[1].score == pytest.approx((1 - 0.61 if metric == "accuracy" else 2.9) + 10 * (0.05 - 0.02))
    assert sweep.ranks_per_gang == 2


@pytest.mark.parametrize("spec_text", ["name: x\n", "name: x\nsearch: {trials: 4, key_of_another_version: 1}\n", "search: [", ""])
def test_a_spec_without_the_bound_gets_the_default_of_the_spec(fake_run, spec_text):
    default = SearchSpec().max_forgetting
    folder = fake_run(sweep=None, transfer=None, spec_text=spec_text)
    assert read_run(folder).sweep.max_forgetting == default


def test_rungs_after_a_damaged_one_do_not_count(fake_run):
    """As for the runtime, which trains them again."""
    folder = fake_run(sweep=None, transfer=None)
    write_trial(folder, trial_spec(0), results=[rung_result("t000", rung, 2.9 - rung, 4.0) for rung in range(3)])
    (folder / "trials" / "t000" / "result-1.json").write_text("{")
    run = read_run(folder)
    assert [rung.rung for rung in run.sweep.trials[0].rungs] == [0]
    assert run.sweep.trials == tuple(
        trial.record for trial in judge_trials(Ledger(folder / "trials"), scoring_of(SearchSpec(), run.plan)).values()
    )
    assert len(run.gaps) == 1
    assert run.gaps[0].startswith("t000/result-1.json: not valid JSON")


def test_an_unreadable_record_is_a_gap_for_a_reader_and_an_error_for_a_driver(fake_run):
    folder = fake_run(sweep=None, transfer=None)
    write_trial(folder, trial_spec(0), results=[])
    (folder / "trials" / "t000" / "result-0.json").mkdir()
    run = read_run(folder)
    assert run.sweep.trials[0].rungs == ()
    assert run.gaps[0].startswith("t000/result-0.json: ")
    with pytest.raises(IsADirectoryError):
        Ledger(folder / "trials")


def test_the_base_model_of_a_one_trial_job_counts_before_the_job_ends(fake_run, make):
    """Its worker group writes result.json; the ledger gets the result when the training has ended."""
    folder = fake_run(plan=make.plan(search=False), sweep=None, transfer=None)
    write_trial(folder, trial_spec(-2, "none"), results=[])
    (folder / "trials" / "none" / "result.json").write_text(rung_result("none", 0, 3.9, 4.0).model_dump_json())
    write_trial(folder, trial_spec(0), results=[])
    sweep = read_run(folder).sweep
    assert (sweep.job, sweep.control("none").metric) == ("finetune", 3.9)
    assert sweep.max_forgetting == float("inf")


def test_a_trial_that_failed_just_before_its_driver_was_killed_has_failed(fake_run):
    folder = fake_run(sweep=None, transfer=None)
    broken = rung_result("t000", 1, None, None, state="failed", reason="NaN at step 9", metrics={})
    write_trial(folder, trial_spec(0), results=[rung_result("t000", 0, 2.9, 4.0), broken])
    trial = read_run(folder).sweep.trials[0]
    assert (trial.state, trial.reason, trial.metric) == ("failed", "NaN at step 9", 2.9)
