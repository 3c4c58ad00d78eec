"""One rank of a gang, outside pytest: reads its jobs, runs them all in this one process, writes what it was answered.

    python ranks_worker.py JOBS.json RANK WORLD_SIZE MEETING_FILE OUT.json

JOBS.json is a list of hosts: {"base": BaseLoad, "anatomy": ModelAnatomy, "execution": ExecutionPlan,
"assignments": [Assignment, ...], "chunk_bytes": the most that logits may take at once}. Several hosts follow each
other in the same process, each with its own base.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from orchestrator.anatomy import ModelAnatomy
from orchestrator.plan.values import Assignment, BaseLoad, ExecutionPlan
from orchestrator.train import TrainHost, objective


def main(jobs_file: str, rank: str, world_size: str, meeting: str, out_file: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    results: dict[str, object] = {}
    host: TrainHost | None = None
    for job in json.loads(Path(jobs_file).read_text()):
        objective.LOGIT_CHUNK_BYTES = job["chunk_bytes"]
        host = TrainHost.create(
            BaseLoad.model_validate(job["base"]),
            ModelAnatomy.model_validate(job["anatomy"]),
            ExecutionPlan.model_validate(job["execution"]),
            int(rank),
            int(world_size),
            f"file://{meeting}",
        )
        for values in job["assignments"]:
            assignment = Assignment.model_validate(values)
            results[assignment.folder + f"#{assignment.rung}"] = host.run(assignment).model_dump(mode="json")
    Path(out_file).write_text(json.dumps(results))
    if host is not None:
        host.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
