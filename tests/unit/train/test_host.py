"""A whole rank of a gang on small bases: trials one after another, resumed, failed, out of memory."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import build_set
from orchestrator.errors import BaseLostError, RankOutOfMemoryError, TrainingError
from orchestrator.store import check_folder, read_jsonl
from orchestrator.train import TrainHost, find_latest, memory_retry, trial_engine
from orchestrator.train.adapters.branch import PlainKeeper
from orchestrator.train.checkpoint import saving
from orchestrator.train.engines.engine import num_live_engines
from orchestrator.train.engines.torch_engine import TorchEngine
from orchestrator.train.model.objective import Objective
from orchestrator.work.assignment import EvaluateBase, TrainRung, WorkContext
from orchestrator.work.execution import BaseLoad, DataPaths, ExecutionPlan, TrainSettings, TrunkPlan
from orchestrator.work.remedies import NOTHING, AnchorPlan, Remedies
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

EXECUTION = ExecutionPlan(
    device="cpu", ranks=1, threads_per_rank=1, executor="torch", dtype="float32", row_tokens=32, micro_batch_rows=2
)
STEPS = 4


class Bench:
    """A host, and assignments on it."""

    def __init__(self, base_folder: Path, folder: Path, *, task: str = "completion") -> None:
        self.folder = folder
        self.task: Any = task
        self.anatomy = read_anatomy(base_folder, need_weights=True)
        self.num_classes = 3 if task == "classify" else 0
        generator = np.random.default_rng(0)
        for name, count in (("train", 24), ("eval", 6)):
            lengths = generator.integers(8, 24, size=count)
            pairs = [((np.arange(n) + generator.integers(90)) % 90 + 3, np.arange(n) >= n // 2) for n in lengths]
            labels = generator.integers(3, size=count).tolist() if task == "classify" else None
            build_set(pairs, labels=labels).save(folder / f"{name}.npz")
        base = {"folder": str(base_folder), "model_type": self.anatomy.model_type, "quantize": "none", "task": task}
        load = BaseLoad.model_validate(base | {"num_classes": self.num_classes})
        self.host = TrainHost.create(load, self.anatomy, EXECUTION, 0, 1, None)

    def assignment(
        self,
        name: str,
        *,
        policy: str = "last:1",
        tune: Any = "lora",
        rate: float = 1e-2,
        stop: int = STEPS,
        control: Any = None,
        execution: ExecutionPlan = EXECUTION,
        remedies: Remedies = NOTHING,
        metric: str = "loss",
        trunk: TrunkPlan | None = None,
        **values: Any,
    ) -> Any:
        rank, held = 4 if tune == "lora" else None, str(self.folder / "eval.npz")
        replay = held if remedies.needs_replayed_text else None
        data = DataPaths(train=str(self.folder / "train.npz"), eval=held, retain=held, replay=replay)
        kind: Any = EvaluateBase if control == "none" else TrainRung
        return kind(
            context=WorkContext(
                settings=TrainSettings(warmup=0.1, schedule="cosine", weight_decay=0.0, grad_clip=1.0, tokens_per_step=64),
                data=data,
                metric=metric,
                trunk=trunk,
            ),
            trial=TrialSpec(
                trial_id=name,
                number=0,
                control=control,
                layers=policy,
                tune=tune,
                learning_rate=rate,
                lora_rank=rank,
                total_steps=STEPS,
                total_tokens=64 * STEPS,
                seed=1,
                remedies=remedies,
            ),
            selection=select(self.anatomy, policy, tune, rank, task=self.task, num_classes=self.num_classes),
            execution=execution,
            folder=str(self.folder / name),
            **({} if control == "none" else {"stop_step": stop}),
            **values,
        )

    def run(self, name: str, **values: Any) -> RungResult:
        return self.host.run_trial(self.assignment(name, **values))

    def bits(self, name: str) -> list[str]:
        return [line["loss_hex"] for line in read_jsonl(self.folder / name / "steps.jsonl")]


def with_data(assignment: TrainRung, **paths: str) -> TrainRung:
    data = assignment.data.model_copy(update=paths)
    return assignment.model_copy(update={"context": assignment.context.model_copy(update={"data": data})})


@pytest.fixture
def bench(llama_folder: Callable[..., Path], tmp_path: Path) -> Iterator[Bench]:
    folder = tmp_path / "base"
    shutil.copytree(llama_folder(), folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0").save_pretrained(folder)
    made = Bench(folder, tmp_path)
    yield made
    made.host.close()


def test_a_trial_from_start_to_rung(bench: Bench) -> None:
    seen: list[int] = []
    result = bench.host.run(
        bench.assignment("a", metric="exact_match", predicted_memory_bytes=10**9), on_step=lambda report: seen.append(report.step)
    )
    assert result.state == "done", result.reason
    assert seen == list(range(1, STEPS + 1))
    assert result.step == STEPS
    assert result.metrics.keys() == {"loss", "perplexity", "exact_match"}
    assert result.retain_loss == pytest.approx(result.eval_loss)
    assert result.train_loss == float.fromhex(bench.bits("a")[-1])
    rung = Path(result.checkpoint or "")
    assert rung == bench.folder / "a" / "rung-0"
    files = {record.path for record in check_folder(rung).files}
    assert files >= {"adapter/adapter_model.safetensors", "state-rank0.safetensors", "state.json", "eval.npz", "retain.npz"}
    assert result.engine is not None
    assert (result.engine.executor, result.engine.live_engines, result.engine.ordinal) == ("torch", 1, 0)
    assert result.engine.predicted_memory_bytes == 10**9
    assert result.steady_tokens_per_s is not None
    assert result.steady_tokens_per_s > 0
    assert (result.engine.peak_memory_bytes,) == result.engine.rank_peak_memory_bytes
    assert result.engine.peak_memory_bytes >= max(line["memory_bytes"] for line in read_jsonl(bench.folder / "a" / "steps.jsonl"))
    assert result.engine.partitioned_bytes == 12 * result.engine.trainable_parameters + 4


def test_warm_is_as_cold(bench: Bench) -> None:
    first = bench.run("first")
    assert bench.run("full", policy="all+head", tune="full").state == "done"
    failed = bench.run("failed", tune="full", rate=1e30)
    assert failed.state == "failed"
    assert 1 <= failed.step < STEPS
    again = bench.run("again")
    assert bench.bits("again") == bench.bits("first")
    assert again.eval_loss == first.eval_loss
    assert again.engine is not None
    assert (again.engine.live_engines, again.engine.ordinal) == (1, 3)


def test_the_untouched_base_is_only_evaluated(bench: Bench) -> None:
    result = bench.run("none", policy="none", control="none", stop=0)
    assert (result.state, result.checkpoint, result.train_loss) == ("done", None, None)
    assert result.engine is not None
    assert result.engine.executor == "none"
    assert result.engine.peak_memory_bytes > 0
    with np.load(bench.folder / "none" / "eval.npz") as arrays:
        assert len(arrays["loss_sums"]) == 6
    bench.run("tuned")
    after = bench.run("none-again", policy="none", control="none", stop=0)
    assert after.eval_loss == result.eval_loss


def test_a_resumed_trial_is_the_straight_one(bench: Bench) -> None:
    bench.run("straight", tune="full")
    part = bench.run("parts", tune="full", stop=2)
    bench.run("between")
    whole = bench.run("parts", tune="full", start=part.checkpoint, rung=1)
    assert bench.bits("parts") == bench.bits("straight")
    assert whole.state == "done"


@pytest.mark.parametrize(
    ("tune", "remedies"),
    [
        ("full", Remedies(anchor=AnchorPlan(kind="l2sp", strength=100.0))),
        ("full", Remedies(anchor=AnchorPlan(kind="ewc", strength=100.0), replay=0.3, layer_decay=0.5)),
        ("lora", Remedies(anchor=AnchorPlan(kind="product", strength=100.0))),
    ],
    ids=["l2sp", "ewc, replay and decay", "product"],
)
def test_a_resumed_trial_is_held_to_the_base_still(bench: Bench, tune: str, remedies: Remedies) -> None:
    """Not to where it was resumed, and with the weights that the first engine had measured."""
    settings: dict[str, Any] = {"tune": tune, "policy": "last:2", "remedies": remedies}
    bench.run("straight", **settings)
    part = bench.run("parts", stop=2, **settings)
    bench.host.context.saver.forget()
    bench.run("parts", start=part.checkpoint, rung=1, **settings)
    assert bench.bits("parts") == bench.bits("straight")
    bench.run("plain", tune=tune, policy="last:2")
    assert bench.bits("plain") != bench.bits("straight")


def test_what_measured_the_weights_is_gone_before_what_learns_is_held(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts one engine, and the weights are measured once for all trials of a selection."""
    alive: list[int] = []
    anchor = trial_engine._anchor
    monkeypatch.setattr(trial_engine, "_anchor", lambda *given: (alive.append(num_live_engines()), anchor(*given))[1])
    for name in ("first", "second"):
        bench.run(name, tune="full", remedies=Remedies(anchor=AnchorPlan(kind="ewc", strength=1.0)))
    assert alive == [1, 1]
    assert len(list((bench.folder / "fisher").iterdir())) == 1


def assert_same_tensors(one: Path, other: Path) -> None:
    tensors, others = load_file(one), load_file(other)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_trial_goes_on_from_memory_as_from_disk(bench: Bench, tune: str) -> None:
    """In memory it does not care what has become of its files."""
    bench.run("straight", tune=tune)
    results = {}
    for name in ("memory", "disk"):
        part = bench.run(name, tune=tune, stop=2)
        bench.run("between", tune=tune)
        if name == "disk":
            bench.host.context.saver.forget()
        else:
            shutil.rmtree(part.checkpoint or "")
        results[name] = bench.run(name, tune=tune, start=part.checkpoint, rung=1)
    assert [result.notes for result in results.values()] == [(), ()]
    assert [result.engine.from_memory for result in results.values() if result.engine] == [True, False]
    assert bench.bits("memory") == bench.bits("disk") == bench.bits("straight")
    assert results["memory"].eval_loss == results["disk"].eval_loss
    artifact = "adapter/adapter_model.safetensors" if tune == "lora" else "delta/delta.safetensors"
    for file in (artifact, "state-rank0.safetensors"):
        went_on, straight = bench.folder / "memory" / "rung-1" / file, bench.folder / "straight" / "rung-0" / file
        assert_same_tensors(went_on, straight)  # also the masters, the moments and the random state


def test_the_next_trial_takes_steps_while_the_last_one_is_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped, write = threading.Event(), saving.write_snapshot

    def patient(*given: Any) -> None:
        assert stepped.wait(60), "the next trial waits for it"
        write(*given)

    monkeypatch.setattr(saving, "write_snapshot", patient)
    (first,) = bench.host.run_group([bench.assignment("a")])
    assert not Path(first.checkpoint or "").exists()
    (second,) = bench.host.run_group([bench.assignment("b")], on_step=lambda _: stepped.set())
    bench.host.settle()
    for result in (first, second):
        check_folder(Path(result.checkpoint or ""))
    assert bench.bits("a") == bench.bits("b")
    states = [bench.folder / name / "rung-0" / "state-rank0.safetensors" for name in "ab"]
    assert_same_tensors(*states)  # the next trial has changed nothing of the last


def test_a_checkpoint_on_the_way_is_of_its_step_though_it_is_written_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.run("plain", checkpoint_every_steps=1)
    last, write = threading.Event(), saving.write_snapshot

    def patient(*given: Any) -> None:
        assert last.wait(60), "the next step waits for it"
        write(*given)

    monkeypatch.setattr(saving, "write_snapshot", patient)
    late = bench.assignment("late", checkpoint_every_steps=1)
    assert bench.host.run(late, on_step=lambda report: last.set() if report.step == STEPS else None).state == "done"
    for step in (2, 3):
        assert_same_tensors(
            *(bench.folder / name / f"checkpoint-{step}" / "state-rank0.safetensors" for name in ("plain", "late"))
        )


def test_what_is_remembered_does_not_learn_with_the_trial(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second attempt from the same rung, after one that came to its end and could not be saved."""
    bench.run("straight")
    part = bench.run("a", stop=2)
    with monkeypatch.context() as broken:
        broken.setattr(TorchEngine, "full_tensors", lambda self: {name: torch.zeros(0) for name in self._names})
        assert bench.run("a", start=part.checkpoint, rung=1).state == "failed"
    again = bench.run("a", start=part.checkpoint, rung=1)
    assert again.engine is not None
    assert again.engine.from_memory
    assert bench.bits("a") == bench.bits("straight")


def test_what_cannot_be_saved_fails_the_trial_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 4: nobody waits for a disk to hear of it."""
    with monkeypatch.context() as broken:
        broken.setattr(TorchEngine, "full_tensors", lambda self: {name: torch.zeros(0) for name in self._names})
        result = bench.run("a")
    assert result.state == "failed"
    assert "nothing was saved" in result.reason
    assert [path.name for path in (bench.folder / "a").iterdir()] == ["steps.jsonl"]
    assert bench.run("b").state == "done"


def test_lines_that_will_be_written_again_are_taken_out(bench: Bench) -> None:
    part = bench.run("a", stop=2)
    whole = bench.run("a", start=part.checkpoint, rung=1)
    bench.run("a", start=part.checkpoint, rung=1)
    assert [line["step"] for line in read_jsonl(bench.folder / "a" / "steps.jsonl")] == list(range(1, STEPS + 1))
    bench.run("a", stop=1)
    assert len(bench.bits("a")) == 1
    assert whole.step == STEPS


def test_checkpoints_on_the_way_and_the_newest_whole_one(bench: Bench) -> None:
    straight = bench.run("straight")
    bench.run("a", checkpoint_every_steps=1, keep_optimizer=False)
    folder = bench.folder / "a"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert find_latest(folder) == folder / "checkpoint-3", "the last rung has no optimizer state"
    damaged = folder / "checkpoint-3" / "state-rank0.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-9] ^= 1
    damaged.write_bytes(content)
    assert find_latest(folder) == folder / "checkpoint-2"
    again = bench.run("a", start=str(folder / "checkpoint-3"))
    assert again.state == "done"
    assert again.notes == ("checkpoint-3 is damaged: continues from checkpoint-2",)
    assert again.eval_loss == straight.eval_loss
    assert bench.bits("a") == bench.bits("straight")


def test_without_a_whole_checkpoint_it_starts_again(bench: Bench) -> None:
    straight = bench.run("straight")
    part = bench.run("a", stop=2)
    (Path(part.checkpoint or "") / "state.json").unlink()
    bench.host.context.saver.forget()
    again = bench.run("a", start=part.checkpoint, rung=1)
    assert again.notes == ("rung-0 is damaged: restarts from step 0",)
    assert again.eval_loss == straight.eval_loss


def test_a_trial_without_optimizer_state_cannot_go_on(bench: Bench) -> None:
    part = bench.run("a", stop=2, keep_optimizer=False)
    again = bench.run("a", start=part.checkpoint, rung=1)
    assert again.state == "failed"
    assert "no optimizer state" in again.reason


def test_weights_of_another_gang_are_taken_over(bench: Bench) -> None:
    part = bench.run("a", stop=2)
    folder = Path(part.checkpoint or "")
    record = json.loads((folder / "state.json").read_text()) | {"ranks": 2, "layout": "zero-1 bfloat16"}
    (folder / "state.json").write_text(json.dumps(record))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = [file for file in manifest["files"] if file["path"] != "state.json"]
    shutil.move(folder / "state.json", bench.folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    check_folder(folder)
    from orchestrator.store.folders import write_manifest

    shutil.move(bench.folder / "state.json", folder / "state.json")
    write_manifest(folder)
    bench.host.context.saver.forget()
    again = bench.run("a", start=part.checkpoint, rung=1)
    assert (again.state, again.step) == ("done", STEPS)
    assert "another gang" in again.notes[0]


def with_little_memory(monkeypatch: pytest.MonkeyPatch, *, rows: int, recomputed: int = 0) -> None:
    """Training fits with so many rows in a micro-batch; with checkpointing, with `recomputed` of them."""
    forward = Objective.forward

    def cramped(self: Objective, **batch: Any) -> Any:
        fitting = recomputed if self.model.is_gradient_checkpointing else rows
        if self.training and len(batch["input_ids"]) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory.\nIf reserved but unallocated memory is large, ...")
        return forward(self, **batch)

    monkeypatch.setattr(Objective, "forward", cramped)


WIDE = EXECUTION.model_copy(update={"micro_batch_rows": 4})
HALVED = tuple(
    f"out of memory: restarted with {rows} per micro-batch and more accumulation rounds" for rows in ("2 rows", "1 row")
)


@pytest.mark.parametrize("fitting", [2, 1])
def test_rows_are_halved_when_memory_runs_out(bench: Bench, monkeypatch: pytest.MonkeyPatch, fitting: int) -> None:
    """The losses are those of a plan with so few rows, bit for bit."""
    with_little_memory(monkeypatch, rows=fitting)
    result = bench.run("a", execution=WIDE)
    assert result.state == "done"
    assert result.notes == HALVED[: 3 - fitting]
    fewer = WIDE.model_copy(update={"micro_batch_rows": fitting})
    assert result.reduced_execution == fewer
    assert len(bench.bits("a")) == STEPS
    monkeypatch.undo()
    assert bench.run("b", execution=fewer).reduced_execution is None
    assert bench.bits("a") == bench.bits("b")


def test_what_is_kept_of_other_trials_is_given_up_before_a_trial_comes_down(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a trial's numbers would hang on what its gang has run before."""
    bench.run("alone", execution=WIDE)
    bench.run("before", stop=2)
    forward, saver = Objective.forward, bench.host.context.saver
    assert saver.held_bytes > 0

    def cramped(self: Objective, **batch: Any) -> Any:
        if self.training and saver.held_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, **batch)

    monkeypatch.setattr(Objective, "forward", cramped)
    result = bench.run("a", execution=WIDE)
    assert (result.state, result.reduced_execution) == ("done", None)
    assert result.notes == ("out of memory: cached state of other rungs is released, and the trial is restarted",)
    assert bench.bits("a") == bench.bits("alone")


def test_where_one_row_is_too_much_activations_are_computed_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with_little_memory(monkeypatch, rows=0, recomputed=1)
    result = bench.run("a", execution=WIDE)
    assert result.state == "done"
    assert result.notes == (*HALVED, "out of memory: restarted with gradient checkpointing")
    assert result.reduced_execution is not None
    assert (result.reduced_execution.micro_batch_rows, result.reduced_execution.checkpointing) == (1, True)
    monkeypatch.undo()
    bench.run("b", execution=result.reduced_execution)
    assert bench.bits("a") == bench.bits("b")


def test_a_trial_too_large_for_every_way_of_its_gang_fails_and_the_next_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_little_memory(monkeypatch, rows=0)
    result = bench.run("a", execution=WIDE)
    assert result.state == "failed"
    assert len(result.notes) == 3
    assert "memory use cannot be reduced further" in result.reason
    assert "zero: 3" in result.reason, "it says which rung comes next"
    assert "If reserved" not in result.reason
    monkeypatch.undo()
    assert bench.run("b").state == "done"


def test_memory_that_runs_out_on_one_rank_alone_ends_the_gang(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no answer of the trial's: the other ranks wait in their collective."""
    with_little_memory(monkeypatch, rows=0)
    monkeypatch.setattr(memory_retry, "is_shared", lambda *_: False)
    with pytest.raises(RankOutOfMemoryError, match="out of memory on rank 0"):
        bench.run("a")


def test_a_step_down_is_told_before_it_is_taken(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with_little_memory(monkeypatch, rows=1)
    told: list[tuple[int, str]] = []

    def on_reduced(execution: ExecutionPlan, note: str) -> None:
        assert not (bench.folder / "a" / "rung-0").exists()
        told.append((execution.micro_batch_rows, note))

    result = bench.host.run(bench.assignment("a", execution=WIDE), on_reduced=on_reduced)
    assert told == [(2, HALVED[0]), (1, HALVED[1])]
    assert result.notes == HALVED


def test_memory_that_runs_out_while_the_base_is_put_back_ends_the_gang(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller way on a base that is half put back would train another model."""
    with_little_memory(monkeypatch, rows=2)

    def restore(_: PlainKeeper) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(PlainKeeper, "restore", restore)
    with pytest.raises(BaseLostError, match="could not be restored"):
        bench.run("a", tune="full", execution=WIDE)


@pytest.mark.parametrize("name", ["eval", "retain"])
def test_a_loss_that_is_not_finite_at_evaluation_fails_the_trial(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One document of the set has a token that occurs nowhere else, and its losses are NaN."""
    forward = Objective.forward

    def poisoned(self: Objective, **batch: Any) -> Any:
        found = forward(self, **batch)
        return (
            found._replace(losses=found.losses * torch.nan) if batch.get("each") and (batch["input_ids"] == 95).any() else found
        )

    monkeypatch.setattr(Objective, "forward", poisoned)
    file = bench.folder / "poisoned.npz"
    build_set([(np.full(8, 95), np.arange(8) >= 4)]).save(file)
    assignment = bench.assignment("a")
    result = bench.host.run(with_data(assignment, **{name: str(file)}))
    assert result.state == "failed"
    assert f"the loss on {name} became nan" in result.reason
    assert (result.step, result.eval_loss, result.metrics, result.checkpoint) == (STEPS, None, {}, None)
    assert bench.run("b").state == "done"


def test_weights_that_blow_up_in_the_last_step_fail_the_trial(bench: Bench) -> None:
    blown = bench.run("blown", tune="full", rate=1e30)
    last = bench.run("last", tune="full", rate=1e30, stop=blown.step)
    assert last.state == "failed"
    assert "the loss on eval became" in last.reason


def test_frozen_weights_that_move_fail_the_trial(bench: Bench) -> None:
    """Law 2, broken on purpose: a hook nudges a frozen norm while the trial learns."""
    norm = bench.host.context.base.model.get_parameter("model.norm.weight")
    before = norm.data.clone()
    result = bench.host.run(bench.assignment("a"), on_step=lambda _: norm.data.add_(1e-3))
    assert result.state == "failed"
    assert "frozen tensors changed" in result.reason
    assert "model.norm.weight" in result.reason
    norm.data.copy_(before)
    assert bench.run("b").state == "done"


def test_a_plan_for_another_gang_is_refused(bench: Bench) -> None:
    result = bench.run("a", execution=EXECUTION.model_copy(update={"dtype": "bfloat16"}))
    assert result.state == "failed"
    assert "cannot train" in result.reason
    load = BaseLoad(folder="", model_type="llama", quantize="none", task="completion")
    with pytest.raises(TrainingError, match="2 ranks and the gang 1"):
        TrainHost.create(load, bench.anatomy, EXECUTION.model_copy(update={"ranks": 2}), 0, 1, None)


def test_a_trial_may_fill_other_rows_than_its_gang_was_started_with(bench: Bench) -> None:
    """The loaded base serves any of them; only under another device, dtype, executor or partition would it lie otherwise."""
    assert bench.run("a", execution=EXECUTION.model_copy(update={"row_tokens": 48, "pack": False})).state == "done"


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_classifiers(kind: str, llama_folder: Callable[..., Path], bert_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(llama_folder() if kind == "decoder" else bert_folder, folder)
    bench = Bench(folder, tmp_path, task="classify")
    prior = bench.run("none", policy="none", control="none", stop=0)
    assert prior.state == "done", prior.reason
    assert prior.metrics["accuracy"] <= 1
    assert prior.eval_loss == pytest.approx(np.log(3), abs=0.5)
    head = bench.run("head", policy="head", tune="full", control="head")
    assert head.state == "done", head.reason
    assert head.retain_loss is None
    # The encoder's pooler is missing: it is trained with the classifier, from random weights.
    assert any("logistic regression" in note for note in head.notes) == (kind == "decoder")
    tuned = bench.run("tuned", metric="macro_f1")
    bench.run("again")
    assert tuned.metrics.keys() == {"loss", "accuracy", "macro_f1"}
    assert bench.bits("tuned") == bench.bits("again"), "dropout must be drawn from the trial's own seed"
    half = bench.run("half", stop=2)
    bench.run("half", start=half.checkpoint, rung=1)
    assert bench.bits("half") == bench.bits("tuned"), "a resumed trial must go on with the random numbers where it stopped"


def test_a_rung_of_another_trial_is_set_aside_and_not_gone_on_from(bench: Bench) -> None:
    """Of the same shapes it was gone on from in silence; the manifest names the trial."""
    straight = bench.run("straight")
    part, other = bench.run("a", stop=2), bench.run("b", stop=2)
    own, foreign = Path(part.checkpoint or ""), Path(other.checkpoint or "")
    shutil.rmtree(own)
    shutil.copytree(foreign, own)
    bench.host.context.saver.forget()
    again = bench.run("a", start=str(own), rung=1)
    told = "rung-0 is that of trial b: set aside as rung-0.damaged-1; restarts from step 0"
    assert (again.state, again.notes) == ("done", (told,))
    assert again.eval_loss == straight.eval_loss
    assert (own.parent / "rung-0.damaged-1" / "manifest.json").exists()


def test_a_nameless_rung_of_other_shapes_is_set_aside(bench: Bench) -> None:
    """As an older version wrote it: it broke the gang, three times over."""
    from orchestrator.store.folders import write_manifest

    straight = bench.run("straight")
    part = bench.run("a", stop=2)
    own = Path(part.checkpoint or "")
    file = next((own / "adapter").glob("*.safetensors"))
    save_file({name: tensor[:, :-1].contiguous() for name, tensor in load_file(file).items()}, file)
    write_manifest(own)
    bench.host.context.saver.forget()
    again = bench.run("a", start=str(own), rung=1)
    assert again.state == "done"
    (told,) = again.notes
    assert "rung-0 is of another trial: " in told
    assert "has shape" in told
    assert again.eval_loss == straight.eval_loss


def test_a_nameless_rung_that_fits_is_gone_on_from(bench: Bench) -> None:
    from orchestrator.store.folders import write_manifest

    straight = bench.run("straight")
    part = bench.run("a", stop=2)
    write_manifest(Path(part.checkpoint or ""))
    bench.host.context.saver.forget()
    again = bench.run("a", start=part.checkpoint, rung=1)
    assert (again.state, again.notes, again.eval_loss) == ("done", (), straight.eval_loss)


def test_a_set_that_changed_after_it_was_written_is_not_trained_on(bench: Bench) -> None:
    from orchestrator.data.summary import DataSummary, SplitSummary

    wrong = SplitSummary(documents=1, tokens=1, supervised_tokens=1, longest_document_tokens=1, sha256="0" * 64)
    summary = DataSummary(inputs_sha256="", splits={"train": wrong}, dropped=(), files=(), one_example="")
    (bench.folder / "summary.json").write_text(summary.model_dump_json())
    bench.host.context.sets.clear()
    try:
        failed = bench.run("a")
    finally:
        (bench.folder / "summary.json").unlink()
        bench.host.context.sets.clear()
    assert failed.state == "failed"
    assert "the tokenised set changed after it was written" in failed.reason
