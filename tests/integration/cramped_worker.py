"""ranks_worker.py, whose rank 1 has less, by the end of a trial's name. Alone it runs out of memory

    -rows      while it computes more than one row at once, from its second step on
    -ladder    below ZeRO-2
    -never     always

and of a group, by the name of its first trial,

    -pair      with more than two trials in a batch
    -full      likewise, where the width is measured
    -slow      never, but it finds that sharing gains nothing, where rank 0 finds that it gains

What is stored of the trunk it cannot make.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.train import fused_batch
from orchestrator.train.model.objective import Objective
from orchestrator.train.session import TrainingSession
from orchestrator.train.trunk.build import TrunkBuilder
from orchestrator.work.assignment import TrainRung

sys.path.insert(0, str(Path(__file__).parent))
from ranks_worker import main

under_way: list[TrainingSession] = []
forward, run, build = Objective.forward, TrainingSession.run, TrunkBuilder.build
FULL = "CUDA out of memory. Tried to allocate 20.00 GiB."


def kind_of(assignment: TrainRung) -> str:
    return assignment.trial.trial_id.rpartition("-")[2]


def noting_run(self: TrainingSession, on_step):
    under_way[:] = [self]
    return run(self, on_step)


def cramped_forward(self: Objective, **batch):
    if not self.training or dist.get_rank() != 1 or not under_way:
        return forward(self, **batch)
    (session,) = under_way
    full = {
        "rows": len(batch["input_ids"]) > 1 and session.outcomes[0].state.step > 0,
        "ladder": session.execution.zero_stage < 2,
        "never": True,
        "pair": batch.get("num_trials", 1) > 2,
    }
    if full.get(kind_of(session.outcomes[0].work), False):
        raise torch.OutOfMemoryError(FULL)
    return forward(self, **batch)


def uneven_seconds(context, group: Sequence[TrainRung], step) -> float:
    """Rank 0 takes a second whatever the width; rank 1 may take as much longer, or have no memory."""
    kind, cramped = kind_of(group[0]), dist.get_rank() == 1
    if kind == "full" and cramped and len(group) > 2:
        raise torch.OutOfMemoryError(FULL)
    return 2.0 * len(group) if kind == "slow" and cramped else 1.0


def cramped_build(self: TrunkBuilder, data, chunks):
    if self.ranks.rank == 1:
        raise RuntimeError("no room for what is stored")
    return build(self, data, chunks)


if __name__ == "__main__":
    TrainingSession.run, Objective.forward = noting_run, cramped_forward
    fused_batch._seconds, TrunkBuilder.build = uneven_seconds, cramped_build
    main(*sys.argv[1:])
