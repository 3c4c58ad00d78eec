"""One rank of a gang, outside pytest: reads its jobs, runs them all in this one process, writes what it was answered.

    python ranks_worker.py JOBS.json RANK WORLD_SIZE MEETING_FILE OUT.json

JOBS.json is a list of hosts: {"base": BaseLoad, "anatomy": ModelAnatomy, "execution": ExecutionPlan,
"assignments": [Work, ...], "chunk_bytes": the most that logits may take at once}. In the place of an assignment may
stand a group, {"group": [Work, ...], "width": how many share a batch, or null to measure it}. Several hosts follow
each other in the same process, each with its own base. Beside OUT.json stands OUT.built.json: of how many documents each
assignment computed the trunk here. No thread of a process group may be left at the end.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from orchestrator.anatomy import ModelAnatomy
from orchestrator.data import TokenizedSet
from orchestrator.train import TrainHost
from orchestrator.train.engines.deepspeed_engine import load_deepspeed
from orchestrator.train.model import heads
from orchestrator.train.trunk.build import TrunkBuilder
from orchestrator.work.assignment import Work
from orchestrator.work.execution import BaseLoad, ExecutionPlan

WORK: TypeAdapter[Any] = TypeAdapter(Work)


def main(jobs_file: str, rank: str, world_size: str, meeting: str, out_file: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    results: dict[str, object] = {}
    built: dict[str, int] = {}
    computed = count_computed()
    host: TrainHost | None = None
    load_deepspeed("cpu")  # before the group of a host that has no use for it
    for job in json.loads(Path(jobs_file).read_text()):
        heads.LOGIT_CHUNK_BYTES = job["chunk_bytes"]
        host = TrainHost.create(
            BaseLoad.model_validate(job["base"]),
            ModelAnatomy.model_validate(job["anatomy"]),
            ExecutionPlan.model_validate(job["execution"]),
            int(rank),
            int(world_size),
            f"file://{meeting}",
        )
        for values in job["assignments"]:
            group = [WORK.validate_python(each) for each in values.get("group", [values])]
            keys, before = {each.trial.trial_id: f"{each.folder}#{each.rung}" for each in group}, sum(computed)
            if values.get("width"):
                host.batch_sizes.limit(group[0], values["width"])
            for result in host.run_group(group):
                results[keys[result.trial_id]] = result.model_dump(mode="json")
                built[keys[result.trial_id]] = sum(computed) - before
    Path(out_file).write_text(json.dumps(results))
    Path(out_file).with_suffix(".built.json").write_text(json.dumps(built))
    if host is not None:
        host.close()
        host = None  # a base under ZeRO-3 holds the group itself
        gc.collect()
    left = [file.read_text() for file in Path("/proc/self/task").glob("*/comm") if "gloo" in file.read_text()]
    assert not left, left


def count_computed() -> list[int]:
    """Grows by a number of documents with each forward pass that fills what is stored of the trunk."""
    computed: list[int] = []
    compute = TrunkBuilder._compute

    def counted(self: TrunkBuilder, data: TokenizedSet, documents: np.ndarray, cuts: Sequence[int]) -> dict[int, torch.Tensor]:
        computed.append(len(documents))
        return compute(self, data, documents, cuts)

    TrunkBuilder._compute = counted
    return computed


if __name__ == "__main__":
    main(*sys.argv[1:])
