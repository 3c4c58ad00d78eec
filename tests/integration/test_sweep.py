"""Sweeps with real Ray on the sample base: what they record, and that they end alike whatever is killed on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ruamel.yaml import YAML

from orchestrator.data import TokenizedSet
from orchestrator.plan.schedule import PATIENCE, SHARES
from orchestrator.plan.values import RunPlan
from orchestrator.run.ledger import Ledger, base_result
from orchestrator.run.scoring import Scoring
from orchestrator.samples import SAMPLE_BASE
from orchestrator.store import check_folder, read_json

from .counter import open_counter
from .runs import (
    NOWHERE,
    TIMEOUT_S,
    ended_trials,
    events_of,
    kill_driver,
    kill_process,
    losses_in,
    losses_of,
    mapped_libraries,
    meanwhile,
    result_of,
    run_folder,
    snapshot,
    start,
    submit,
    sweep_of,
    training_trials,
    transfer_of,
    trials_of,
    wait_until,
    write_spec,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3 * TIMEOUT_S)]

NUM_TRIALS = 4
SEARCH: dict[str, Any] = {
    "layers": ["last:1", "last:2"],
    "tune": ["lora", "full"],
    "learning_rate": {"lora": [2e-3, 2e-2], "full": [1e-3, 1e-2]},
    "lora_rank": [4],
    "trials": NUM_TRIALS,
    "algorithm": "optuna",
    "scheduler": "none",
    "max_forgetting": 10,
}
TWO_GANGS = {"gangs": 2, "ranks_per_gang": 1}


# -- refused before anything starts: these come first, while this process has no Ray ----------------------------------


def missing_data(folder: Path) -> tuple[Path, str]:
    return write_spec(folder, "refused", search=SEARCH, data={"train": "nowhere.jsonl"}), "nowhere.jsonl"


def base_without_weights(folder: Path) -> tuple[Path, str]:
    base = folder / "base"
    shutil.copytree(SAMPLE_BASE, base, ignore=shutil.ignore_patterns("*.safetensors"))
    return write_spec(folder, "refused", search=SEARCH, base={"model": str(base)}), str(base)


@pytest.mark.parametrize("make", [missing_data, base_without_weights])
def test_bad_input_is_named_and_starts_no_ray(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not ray.is_initialized()
    monkeypatch.setenv("RAY_ADDRESS", NOWHERE)
    spec, named = make(tmp_path)
    assert submit("sweep", spec) == 2
    said = capfd.readouterr().err
    assert named in said
    assert NOWHERE not in said


# -- a gang of two ranks -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> Path:
    """The run of a sweep on one two-rank gang. This seed draws for trial 1 a rate near 10, at which nothing can learn."""
    spec = write_spec(
        tmp_path_factory.mktemp("two-ranks"),
        "two-ranks",
        base={"quantize": "none"},
        train={"seed": 87, "weight_decay": 1.0},
        search={**SEARCH, "layers": ["last:1"], "learning_rate": {"lora": [2e-3, 2e-2], "full": [1e-4, 10]}, "trials": 3}
        | {"algorithm": "random"},
        resources={"gangs": 1, "ranks_per_gang": 2, "zero": 2},
    )
    assert submit("sweep", spec) == 0
    return run_folder(spec)


def test_every_trial_was_served_by_a_deepspeed_engine(two_ranks: Path) -> None:
    for entry in trials_of(two_ranks):
        engine = entry.results[-1].engine
        assert engine is not None
        assert (engine.executor, engine.zero_stage, engine.ranks) == ("deepspeed", 2, 2)
        assert engine.partitioned_bytes > 0
        assert engine.live_engines == 1
        assert engine.base_loads == 1
    assert {entry.trial.tune for entry in trials_of(two_ranks)} == {"lora", "full"}


def test_the_memory_of_every_rank_stands_beside_the_plans(two_ranks: Path) -> None:
    plan = RunPlan.model_validate(read_json(two_ranks / "plan.json"))
    planned = {(option.layers, option.tune): option.memory.total_bytes for option in plan.search.options}
    for entry in trials_of(two_ranks):
        if entry.results[-1].state == "failed":
            continue
        engine = entry.results[-1].engine
        assert engine is not None
        assert engine.predicted_memory_bytes == planned[entry.trial.layers, entry.trial.tune]
        assert len(engine.rank_peak_memory_bytes) == 2
        assert max(engine.rank_peak_memory_bytes) == engine.peak_memory_bytes > 0
    rows = transfer_of(two_ranks).memory
    assert {row.label for row in rows} >= {"base model", "last:1 · lora r4"}
    assert all(row.ratio is None or 0.1 < row.ratio < 10 for row in rows)
    assert "by rank" in (two_ranks / "report.html").read_text()


def test_the_base_is_loaded_once_per_gang(two_ranks: Path) -> None:
    sweep = sweep_of(two_ranks)
    assert (sweep.num_gangs, sweep.ranks_per_gang, sweep.base_loads, sweep.gangs_replaced) == (1, 2, 1, 0)
    ordinals = [result_of(two_ranks, trial.trial_id).engine.ordinal for trial in sweep.trials]  # type: ignore[union-attr]
    assert sorted(ordinals) == [0, *range(2, len(sweep.trials) + 1)], "the second was the measurement of the domain shift"


def test_a_trial_that_diverges_fails_alone(two_ranks: Path) -> None:
    before, diverged, after = sweep_of(two_ranks).searched
    assert diverged.learning_rate > 8
    assert diverged.state == "failed"
    assert "became" in diverged.reason
    assert not (two_ranks / "trials" / diverged.trial_id / "rung-0").exists()
    assert (before.state, after.state) == ("finished", "finished")


def test_the_winner_of_two_ranks_is_bundled_and_verified(two_ranks: Path) -> None:
    transfer = transfer_of(two_ranks)
    assert transfer.verification is not None
    assert transfer.verification.passed
    check_folder(two_ranks / "bundle")


def test_a_gang_gives_the_same_numbers_to_the_first_and_to_the_fourth_trial(two_ranks: Path, tmp_path: Path) -> None:
    """After a `full` trial and a failed one, a trial has the same losses, bit for bit, in the same processes."""
    with open_counter(two_ranks, tmp_path) as counter:
        first = counter.trial("lora", 1e-2, number=0)
        assert counter.train(first).state == "done"
        pids = counter.pids()
        assert counter.train(counter.trial("full", 3e-3, number=1)).state == "done"
        failing = counter.trial("full", 1e30, number=2)
        assert counter.train(failing).state == "failed"
        again = first.model_copy(update={"trial_id": "again", "number": 3})
        assert counter.train(again).state == "done"
        assert counter.pids() == pids
        assert len(pids) == 2

    losses = losses_in(tmp_path / first.trial_id)
    assert len(losses) == first.total_steps
    assert losses_in(tmp_path / again.trial_id) == losses
    ledger = Ledger(tmp_path)
    results = {trial.trial_id: ledger.get(trial.trial_id).results[-1] for trial in (first, failing, again)}  # type: ignore[union-attr]
    assert results[again.trial_id].eval_loss == results[first.trial_id].eval_loss
    assert "became" in results[failing.trial_id].reason
    assert [results[trial.trial_id].engine.ordinal for trial in (first, again)] == [0, 3]  # type: ignore[union-attr]


# -- interrupted sweeps end like one that was not ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def libraries() -> dict[str, set[str]]:
    """The large libraries that each kind of process of the uninterrupted sweep had loaded."""
    return {}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, ray_here: None, libraries: dict[str, set[str]]) -> Path:
    """The spec of a sweep that ran to its end undisturbed."""
    spec = write_spec(tmp_path_factory.mktemp("whole"), "search", search=SEARCH, resources=TWO_GANGS)
    with mapped_libraries(("torch", "tokenizers")) as found:
        assert submit("sweep", spec) == 0
    libraries |= found
    return spec


def test_only_ranks_load_torch_and_transformers(uninterrupted: Path, libraries: dict[str, set[str]]) -> None:
    """transformers has no shared object of its own, but loads tokenizers' when it is imported."""
    assert libraries["ray::RankActor"] == {"torch", "tokenizers"}
    assert libraries["ray::ImplicitFunc"] == set(), "a Tune trial"
    assert libraries["ray::Exchange"] == set()


def one_has_ended_and_one_trains(run: Path) -> bool:
    return bool(ended_trials(run) and training_trials(run))


def test_a_killed_driver_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "search", search=SEARCH, resources=TWO_GANGS)
    run = run_folder(spec)
    driver = start("sweep", spec)
    wait_until(lambda: one_has_ended_and_one_trains(run), while_alive=driver)
    assert kill_driver(driver) == [], "processes outlived their driver"

    known = snapshot(*ended_trials(run))
    assert known
    assert not (run / "sweep.json").exists()
    assert submit("sweep", spec) == 0
    assert known.items() <= snapshot(run / "trials").items()
    assert_same_search(run, run_folder(uninterrupted))
    assert sweep_of(run).num_submissions == 2


@pytest.mark.slow
def test_a_killed_gang_is_replaced(uninterrupted: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "search", search=SEARCH, resources=TWO_GANGS)
    run = run_folder(spec)
    known: dict[str, int] = {}

    def kill_a_rank() -> None:
        wait_until(lambda: one_has_ended_and_one_trains(run))
        known.update(snapshot(*ended_trials(run)))
        kill_process(events_of(run, "gang_ready")[0]["pids"][0])

    with meanwhile(kill_a_rank):
        assert submit("sweep", spec) == 0
    assert known
    assert known.items() <= snapshot(run / "trials").items()
    assert_same_search(run, run_folder(uninterrupted))
    sweep = sweep_of(run)
    assert sweep.gangs_replaced == 1
    assert sweep.base_loads <= sweep.num_gangs + 1
    (died,) = events_of(run, "gang_died")
    assert died["trial_id"] in {trial.trial_id for trial in sweep.trials}


def assert_same_search(run: Path, other: Path) -> None:
    """The same trials with the same losses, bit for bit, and the same winner."""
    assert losses_of(run) == losses_of(other)
    assert len(losses_of(run)) == NUM_TRIALS
    assert sweep_of(run).winner_id == sweep_of(other).winner_id is not None
    assert transfer_of(run).verdict == transfer_of(other).verdict is not None


def test_another_spec_under_the_same_name_is_refused(uninterrupted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = run_folder(uninterrupted)
    before = snapshot(run)
    other = uninterrupted.with_name("other.yaml")
    values = json.loads(uninterrupted.read_text())
    other.write_text(json.dumps(values | {"train": {**values["train"], "epochs": 2}}))
    assert submit("sweep", other) == 2
    assert "train.epochs: 1.0 -> 2.0" in capfd.readouterr().err
    assert snapshot(run) == before


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, ray_here: None, capfd: pytest.CaptureFixture[str]) -> None:
    spec = write_spec(tmp_path, "gpu", search=SEARCH, resources={"accelerator": "gpu"})
    assert submit("sweep", spec) == 3
    assert "GPU" in capfd.readouterr().err
    assert not (run_folder(spec) / "trials").exists()


@pytest.mark.slow
def test_more_trials_extend_a_finished_sweep(uninterrupted: Path) -> None:
    """One more trial trains one more; the same spec a third time trains nothing and needs no Ray."""
    run = run_folder(uninterrupted)
    known, ids = snapshot(run / "trials"), set(losses_of(run))
    values = json.loads(uninterrupted.read_text())
    values["search"]["trials"] += 1
    uninterrupted.write_text(json.dumps(values))

    assert submit("sweep", uninterrupted) == 0
    assert known.items() <= snapshot(run / "trials").items()
    assert ids < set(losses_of(run))
    assert len(losses_of(run)) == NUM_TRIALS + 1
    assert len(sweep_of(run).searched) == NUM_TRIALS + 1

    known, found = snapshot(run / "trials", run / "bundle"), sweep_of(run)
    third = start("sweep", uninterrupted, RAY_ADDRESS=NOWHERE)
    assert third.wait(TIMEOUT_S) == 0
    assert snapshot(run / "trials", run / "bundle") == known
    assert sweep_of(run) == found


def check_curve(run: Path) -> None:
    """Its points are the best rungs of trials on growing shares, which count nowhere else."""
    sweep, curve, ledger = sweep_of(run), sweep_of(run).learning_curve, Ledger(run / "trials")
    assert curve is not None, sweep.no_learning_curve
    points = {entry.trial.share: entry for entry in ledger.entries() if entry.trial.control == "curve"}
    assert {*SHARES} <= set(points) <= {*SHARES, 1.0}
    steps = [points[share].trial.total_steps for share in sorted(points)]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1], "a share has its part of the steps"
    assert all(entry.ended_for_good for entry in points.values())
    assert max(len(entry.results) for entry in points.values()) > 1, "a share is scored on the way, and may end early"
    winner = ledger.get(curve.trial_id)
    assert winner is not None
    scoring = Scoring(metric=sweep.metric, max_forgetting=sweep.max_forgetting, patience=PATIENCE)
    whole = [*(points[share] for share in SHARES), points.get(1.0, winner)]
    judged = [scoring.judged(entry.results, base_result(ledger)).eval_loss for entry in whole]
    assert list(curve.losses) == pytest.approx(judged, rel=1e-6)
    assert curve.trial_id == sweep.winner_id
    assert not any(trial.control == "curve" for trial in sweep.trials)
    (said,) = events_of(run, "learning_curve")
    assert said["message"] == curve.sentence
    assert curve.sentence[1:] in (run / "report.html").read_text()


# -- a classifier ------------------------------------------------------------------------------------------------------


def test_the_shipped_classification_spec_comes_to_a_bundle(tmp_path: Path, repository: Path, ray_here: None) -> None:
    from transformers import AutoModelForSequenceClassification

    shipped = repository / "jobs" / "specs" / "classify.yaml"
    values = YAML(typ="safe").load(shipped)
    values["data"]["train"] = str(shipped.parent / values["data"]["train"])
    values["search"] |= {"trials": 4, "scheduler": "asha", "controls": ["shuffled"], "repeats": 2, "learning_curve": True}
    spec = tmp_path / "classify.yaml"
    spec.write_text(json.dumps(values | {"output": "runs", "resources": TWO_GANGS}))

    assert submit("sweep", spec) == 0
    run = run_folder(spec)
    transfer = transfer_of(run)
    assert transfer.verification is not None
    assert transfer.verification.passed
    rungs = [Path(result.checkpoint) for entry in trials_of(run) for result in entry.results if result.checkpoint]
    assert any(rung.name != "rung-0" for rung in rungs)
    for rung in rungs:
        check_folder(rung)
        assert not read_json(rung / "state.json")["has_optimizer"], "no trial goes on from here"
    assert not events_of(run, "not_cleaned")
    (shuffled,) = [trial for trial in sweep_of(run).trials if trial.control == "shuffled"]
    assert shuffled.last is not None
    assert transfer.bundled is not None
    assert transfer.bundled.step in {rung.step for rung in shuffled.rungs}, "it has the bundle's budget, refit or not"
    # The control `head` starts from logistic regression, so it may be the winner itself.
    winner_is_head = read_json(run / "bundle" / "manifest.json")["about"]["layers"] == "head"
    expected = {"none", "shuffled"} if winner_is_head else {"none", "head", "shuffled"}
    assert {comparison.against for comparison in transfer.comparisons} == expected
    assert not transfer.controls_left_out
    assert_judged_as_few_examples(run)
    check_curve(run)
    model = AutoModelForSequenceClassification.from_pretrained(run / "bundle")
    assert set(model.config.id2label.values()) == {"account", "billing", "delivery", "returns"}


def assert_judged_as_few_examples(run: Path) -> None:
    """Equal classes in the splits, trials by their best rung, the winner from two seeds."""
    sweep, transfer = sweep_of(run), transfer_of(run)
    for split in ("eval", "test"):
        counts = np.bincount(TokenizedSet.load(run / "data" / f"{split}.npz").labels)
        assert counts.max() - counts.min() <= 1
    for trial in sweep.searched:
        assert trial.score == min(rung.score for rung in trial.rungs if rung.score is not None)
        assert trial.state != "stopped" or trial.last is None or trial.last.step < trial.total_steps
    winner, (again,) = sweep.winner, [trial for trial in sweep.trials if trial.control == "repeat"]
    assert winner is not None
    assert (again.trial_id, again.seed, again.learning_rate) == (f"repeat-2-{winner.trial_id}", 1, winner.learning_rate)
    assert losses_in(run / "trials" / again.trial_id)[0] != losses_in(run / "trials" / winner.trial_id)[0]
    gains = transfer.gain_over_seeds
    assert gains is not None
    assert gains.seeds == (0, 1)
    (against_base,) = [comparison for comparison in transfer.comparisons if comparison.against == "none"]
    assert gains.values[0] == pytest.approx(against_base.mean)
    wide = {comparison.against: comparison.over_seeds for comparison in transfer.comparisons}
    assert wide == {against: against != "none" for against in wide}, "as wide as two seeds differ, where both were trained"
    assert "over 2 seeds, on the same examples" in transfer.sentence
