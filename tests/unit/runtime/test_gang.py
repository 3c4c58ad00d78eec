"""What a gang died of, by what its ranks say and when."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError as EvictedError

from orchestrator.anatomy import ModelAnatomy
from orchestrator.errors import RankOutOfMemoryError
from orchestrator.plan.values import RunPlan
from orchestrator.run.hours import Meter
from orchestrator.runtime import gang as gang_module
from orchestrator.runtime.gang import Gang, GangDiedError
from orchestrator.runtime.hang_detection import HangTimeouts, ProcessId
from orchestrator.train.heartbeat import NO_HEARTBEAT_YET, Heartbeat

LOST = ConnectionError("connection closed by peer")
FULL = RankOutOfMemoryError("out of memory on rank 1")
EVICTED = EvictedError("the node was running low on memory")


async def rank(after_s: float, error: Exception | None) -> str:
    await asyncio.sleep(after_s)
    if error is not None:
        raise error
    return "done"


class Rank:
    """What a rank answers about its heartbeat; None where it does not answer."""

    def __init__(self, found: Heartbeat | None) -> None:
        self.heartbeat = self
        self.found = found

    async def answer(self) -> Heartbeat:
        if self.found is None:
            await asyncio.sleep(99)
        assert self.found is not None
        return self.found

    def remote(self) -> Coroutine[Any, Any, Heartbeat]:
        return self.answer()


TRAINING = Heartbeat("training", 7, 100, 0.0, is_steady=True)


@pytest.mark.parametrize(
    ("heartbeats", "state", "said"),
    [
        ([TRAINING, None], "T", r"gang 3 hangs: rank 1 on here \(pid 11\) is stopped"),
        ([TRAINING, TRAINING], "S", r"gang 3 hangs: rank 0 .* made no progress .* training, after step 7.*; rank 1 "),
    ],
    ids=["stopped", "in a collective"],
)
def test_a_rank_that_hangs_ends_the_wait_and_its_gang(
    plan: RunPlan,
    anatomy: ModelAnatomy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    heartbeats: list[Heartbeat | None],
    state: str,
    said: str,
) -> None:
    ended: list[ProcessId] = []
    monkeypatch.setattr(gang_module, "POLL_S", 0.02)
    monkeypatch.setattr(gang_module, "states_of", lambda processes: dict.fromkeys(processes, state))
    monkeypatch.setattr(gang_module, "end_processes", ended.extend)
    timeouts = HangTimeouts(silent_s=0.1, steady_s=0.5, opening_s=0.5, load_bytes_per_s=1e15)
    gang = Gang(3, plan.base, anatomy, plan.execution, Meter(tmp_path / "hours.json"), timeouts)
    gang._processes = tuple(ProcessId(number, "here", "node", 10 + number, 0) for number in range(2))
    gang._ranks = [Rank(found) for found in heartbeats]
    for process in gang._processes:
        gang._detector.record(process, NO_HEARTBEAT_YET)

    async def scene() -> None:
        with pytest.raises(GangDiedError, match=said) as death:
            await asyncio.wait_for(gang._all([rank(99, None), rank(99, None)]), 10)
        assert not death.value.out_of_memory
        assert ended == list(gang._processes), "those that wait for the one that hangs are ended too"

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("device", "ends", "out_of_memory", "said"),
    [
        ("cpu", [(0, LOST), (0.05, EVICTED)], True, "low on memory"),
        ("cuda", [(0, LOST), (0.05, EVICTED)], False, "low on memory"),
        ("cuda", [(0, LOST), (0.05, FULL)], True, "rank 1"),
        ("cuda", [(0, FULL), (99, None)], True, "rank 1"),
        ("cpu", [(0, LOST), (99, FULL)], False, "closed by peer"),
        ("cpu", [(0, None), (0.05, LOST)], False, "closed by peer"),
    ],
    ids=["evicted on a CPU", "evicted beside its GPU", "a full rank last", "a full rank first", "too late", "lost"],
)
def test_the_rank_that_ran_out_of_memory_counts_also_where_others_are_heard_first(
    plan: RunPlan,
    anatomy: ModelAnatomy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    ends: list[tuple[float, Exception | None]],
    out_of_memory: bool,
    said: str,
) -> None:
    monkeypatch.setattr(gang_module, "SETTLE_S", 0.5)
    execution = plan.execution.model_copy(update={"device": device})
    gang = Gang(0, plan.base, anatomy, execution, Meter(tmp_path / "hours.json"))

    async def scene() -> None:
        with pytest.raises(GangDiedError, match=said) as death:
            await asyncio.wait_for(gang._all([rank(*end) for end in ends]), 10)
        assert death.value.out_of_memory is out_of_memory

    asyncio.run(scene())
