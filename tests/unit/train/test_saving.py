"""Checkpoints beside the training: in order, none lost in silence, and no more memory than there is."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.errors import CheckpointError
from orchestrator.store import check_folder, free_memory_bytes
from orchestrator.train.checkpoint import saving
from orchestrator.train.checkpoint.resume import checkpoint_folder, rung_folder
from orchestrator.train.checkpoint.saving import Saver
from orchestrator.train.checkpoint.snapshot import Snapshot, write_snapshot
from orchestrator.train.loop import LoopState
from orchestrator.train.memory import growth_bytes, memory_in_use
from orchestrator.train.outcome import TRIAL_ERRORS
from orchestrator.train.ranks import Ranks

NUM_BYTES = 40_000
PLENTY = 10**12
WAIT_S = 60


def snapshot(step: int, *, ends: bool = False) -> Snapshot:
    states = {} if ends else {0: {"master": torch.full((NUM_BYTES // 4,), float(step))}}
    return Snapshot(LoopState(step, step, 1.0), 0, 1, "flat", states, None, {})


class Bench:
    """A saver, and rungs and checkpoints of trials by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saver = Saver()

    def rung(self, trial: str, number: int = 0, *, ends: bool = False, growth_bytes: int = 0, num_gangs: int = 1) -> Path:
        final, taken = rung_folder(self.folder / trial, number), snapshot(number, ends=ends)
        self.saver.save(final, taken, Ranks(), together=False, rung=True, growth_bytes=growth_bytes, num_gangs=num_gangs)
        return final

    def on_the_way(self, step: int) -> Path:
        final = checkpoint_folder(self.folder / "a", step)
        self.saver.save(final, snapshot(step), Ranks(), together=False)
        return final

    def remembers(self, trial: str, number: int = 0) -> bool:
        return self.saver.find(rung_folder(self.folder / trial, number), seed=0, layout="flat") is not None


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    have(monkeypatch, PLENTY)
    made = Bench(tmp_path)
    yield made
    made.saver.close()


def have(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """So much memory is free, whatever is held."""
    monkeypatch.setattr(saving, "free_memory_bytes", lambda: num_bytes)


@contextmanager
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is written before the block ends."""
    gate = threading.Event()

    def write(final: Path, snapshot: Snapshot, ranks: Ranks) -> None:
        assert gate.wait(WAIT_S), "it was waited for"
        write_snapshot(final, snapshot, ranks)

    with monkeypatch.context() as slow:
        slow.setattr(saving, "write_snapshot", write)
        yield
        gate.set()


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file grows beyond a quarter of a snapshot."""

    def write(final: Path, snapshot: Snapshot, ranks: Ranks) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (NUM_BYTES // 4, hard))
        try:
            write_snapshot(final, snapshot, ranks)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    with monkeypatch.context() as full:
        full.setattr(saving, "write_snapshot", write)
        yield


def test_a_checkpoint_is_written_while_the_trial_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_disk(monkeypatch):
        folders = [bench.rung("a"), bench.rung("b"), bench.on_the_way(3)]
        assert not any(folder.exists() for folder in folders)
        settled = threading.Thread(target=bench.saver.settle)
        settled.start()
        settled.join(0.05)
        assert settled.is_alive()
    settled.join(WAIT_S)
    for folder, step in zip(folders, (0, 0, 3), strict=True):
        check_folder(folder)
        assert (load_file(folder / "state-rank0.safetensors")["master"] == step).all()


def test_one_trials_checkpoints_can_be_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_disk(monkeypatch):
        bench.rung("a")
        bench.saver.settle(bench.folder / "b")
    bench.saver.settle(bench.folder / "a")
    check_folder(bench.folder / "a" / "rung-0")


def test_a_write_that_fails_is_never_lost_and_leaves_nothing_half_written(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with full_disk(monkeypatch):
        failed = bench.rung("a")
        with pytest.raises(Exception, match="File too large"):
            bench.saver.settle()
    for call in (lambda: bench.rung("b"), bench.saver.settle, lambda: bench.saver.settle(failed.parent)):
        with pytest.raises(Exception, match="File too large"):
            call()
    assert list(failed.parent.iterdir()) == []
    assert not (bench.folder / "b").exists()


def test_an_old_checkpoint_goes_when_the_new_one_stands(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def standing() -> list[str]:
        return sorted(path.name for path in (bench.folder / "a").glob("checkpoint-*"))

    bench.on_the_way(1)
    bench.on_the_way(2)
    bench.saver.settle()
    with slow_disk(monkeypatch):
        bench.on_the_way(3)
        assert standing() == ["checkpoint-1", "checkpoint-2"]
    bench.saver.settle()
    assert standing() == ["checkpoint-2", "checkpoint-3"]
    with full_disk(monkeypatch):
        bench.on_the_way(4)
        with pytest.raises(Exception, match="File too large"):
            bench.saver.settle()
    assert standing() == ["checkpoint-2", "checkpoint-3"]


def test_what_is_remembered_is_what_was_saved(bench: Bench) -> None:
    folder = bench.rung("a", 7)
    found = bench.saver.find(folder, seed=0, layout="flat")
    assert found is not None
    assert (found.folder, found.state, found.exact) == (folder, LoopState(7, 7, 1.0), True)
    assert found.remembered is not None
    assert (found.remembered["master"] == 7).all()
    assert bench.saver.find(folder, seed=1, layout="flat") is None
    assert bench.saver.find(folder, seed=0, layout="zero-1 float32") is None


def test_a_trial_is_remembered_at_its_last_rung_as_long_as_it_may_go_on(bench: Bench) -> None:
    bench.rung("a", 0)
    bench.rung("b", 0)
    bench.rung("a", 1)
    bench.on_the_way(9)
    assert [bench.remembers("a", 0), bench.remembers("a", 1), bench.remembers("b")] == [False, True, True]
    assert bench.saver.find(checkpoint_folder(bench.folder / "a", 9), seed=0, layout="flat") is None
    bench.rung("a", 2, ends=True)
    assert [bench.remembers("a", 1), bench.remembers("a", 2), bench.remembers("b")] == [False, False, True]


def test_what_was_not_asked_for_longest_is_forgotten_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, 7 * NUM_BYTES)  # a quarter of it and of what is held has room for two, not for three
    for trial in "ab":
        bench.rung(trial)
        bench.saver.settle()
    assert bench.remembers("a")
    bench.rung("c")
    assert [bench.remembers(trial) for trial in "abc"] == [True, False, True]


def test_what_waits_is_bounded_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for one that waits: the second waits for it, and for nothing else."""
    have(monkeypatch, 5 * NUM_BYTES)
    order: list[str] = []

    def write(final: Path, snapshot: Snapshot, ranks: Ranks) -> None:
        write_snapshot(final, snapshot, ranks)
        order.append(f"{final.name} stands")

    monkeypatch.setattr(saving, "write_snapshot", write)
    for step in (1, 2, 3):
        bench.on_the_way(step)
        order.append(f"after {step}")
    bench.saver.settle()
    assert order.index("checkpoint-1 stands") < order.index("after 2")
    assert order.index("checkpoint-2 stands") < order.index("after 3")


@pytest.mark.parametrize("reason", ["little is free", "the plan expects more"])
def test_without_room_it_is_written_at_once_and_nothing_is_remembered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    have(monkeypatch, 0 if reason == "little is free" else 100 * NUM_BYTES)
    folder = bench.rung("a", growth_bytes=0 if reason == "little is free" else 100 * NUM_BYTES)
    check_folder(folder)
    assert not bench.remembers("a")
    assert bench.saver.held_bytes == 0


@pytest.mark.parametrize(("free", "growth", "kept"), [(16, 0, True), (14, 0, False), (24, 2, True), (24, 3, False)])
def test_the_gangs_of_a_node_share_the_bound(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, free: int, growth: int, kept: bool
) -> None:
    """Of four gangs each has a sixteenth of what is free once all four have grown, and of what it holds."""
    have(monkeypatch, (free - 1) * NUM_BYTES)
    bench.rung("a", growth_bytes=growth * NUM_BYTES, num_gangs=4)
    assert bench.remembers("a") == kept


def test_all_that_is_held_can_be_given_up(bench: Bench) -> None:
    folder = bench.rung("a")
    assert bench.saver.give_up()
    check_folder(folder)
    assert not bench.remembers("a")
    assert not bench.saver.give_up()


@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError("can't allocate memory"), OSError(28, "no space left")])
def test_a_write_that_fails_is_no_trials_own_failure(bench: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Whoever saves next hears of it, and must not take it for a want of memory of its own."""

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(saving, "write_snapshot", fails)
    folder = bench.rung("a")
    with pytest.raises(CheckpointError, match="could not be written") as raised:
        bench.saver.settle()
    assert raised.value.where == str(folder)
    assert not isinstance(raised.value, (*TRIAL_ERRORS, RuntimeError, MemoryError))
    with pytest.raises(CheckpointError):
        bench.rung("b")


def test_growth_is_what_the_plan_expects_beyond_what_is_used() -> None:
    cpu, used = torch.device("cpu"), memory_in_use(torch.device("cpu"))
    assert growth_bytes(cpu, None) == growth_bytes(cpu, 1) == growth_bytes(torch.device("cuda"), 10 * used) == 0
    assert 8 * used < growth_bytes(cpu, 10 * used) < 10 * used
    assert growth_bytes(cpu, 10 * used, used // 2) > growth_bytes(cpu, 10 * used) + used // 4, "what is held was not planned"


def test_a_containers_memory_counts_without_its_cached_files(tmp_path: Path) -> None:
    machine = free_memory_bytes(tmp_path)
    assert machine > 0
    for name, text in {"memory.max": "max\n", "memory.current": "700", "memory.stat": "anon 400\n"}.items():
        (tmp_path / name).write_text(text)
    assert free_memory_bytes(tmp_path) == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 100\ninactive_file 50\n")
    assert free_memory_bytes(tmp_path) == 450
