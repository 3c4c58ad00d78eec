"""What a gang died of, by what its ranks say and when."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError as EvictedError

from orchestrator.anatomy import ModelAnatomy
from orchestrator.errors import RankOutOfMemoryError
from orchestrator.plan.values import RunPlan
from orchestrator.runtime import gang as gang_module
from orchestrator.runtime.gang import Gang, GangDiedError
from orchestrator.runtime.hours import Meter

LOST = ConnectionError("connection closed by peer")
FULL = RankOutOfMemoryError("out of memory on rank 1")
EVICTED = EvictedError("the node was running low on memory")


async def rank(after_s: float, error: Exception | None) -> str:
    await asyncio.sleep(after_s)
    if error is not None:
        raise error
    return "done"


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
