"""A type on two ranks under ZeRO: two processes, forked before any of them has a thread of its own."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

from orchestrator.store import read_jsonl
from orchestrator.train import TrainHost


def train_on_two_ranks(examined: Any, stage: int) -> dict[str, Any]:
    """Return the losses of a LoRA trial, in which the first is that of one process, or why it failed."""
    name = f"zero{stage}"
    work = examined.work(name, "lora", examined._execution(stage), steps=3)
    meeting, answers = examined.folder / f"meeting-{stage}", [examined.folder / f"{name}-{rank}.json" for rank in range(2)]
    children = [_fork(lambda rank=rank: _rank(examined, work, rank, meeting), answers[rank]) for rank in range(2)]
    for child in children:
        os.waitpid(child, 0)
    found = [json.loads(file.read_text()) if file.exists() else "the process died" for file in answers]
    failed = [each for each in found if each != "done"]
    if failed:
        return {"fails": str(failed[0])[:300]}
    losses = [line["loss"] for line in read_jsonl(Path(work.folder) / "steps.jsonl")]
    return {"losses": [round(losses[0], 3), round(losses[-1], 3)]}


def _fork(run: Any, file: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        file.write_text(json.dumps(run()))
    except BaseException:
        file.write_text(json.dumps(traceback.format_exc().strip().splitlines()[-1]))
    finally:
        os._exit(0)


def _rank(examined: Any, work: Any, rank: int, meeting: Path) -> str:
    os.environ["LOCAL_RANK"] = str(rank)
    host = TrainHost.create(examined._load(), examined.anatomy, work.execution, rank, 2, f"file://{meeting}")
    result = host.run_trial(work)
    host.close()
    return "done" if result.state == "done" else str(result.reason)
