"""Find the checkpoint to resume from: it is verified before anything of it is read. Old ones are deleted after a new one is
complete.

A checkpoint is a folder with a manifest: the artifact (adapter/ or delta/), each rank's float32 master weights and Adam
moments and its random state (state-rank<k>.safetensors), state.json, and eval.npz where the trial was evaluated there.
Master weights and moments of which every rank has a full copy are only in rank 0's file. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from orchestrator.errors import IntegrityError, TrainingError
from orchestrator.plan.cost.disk import KEPT_CHECKPOINTS
from orchestrator.store import check_folder, read_json, read_jsonl, read_manifest, set_aside, write_atomic
from orchestrator.train.checkpoint.snapshot import RANDOM
from orchestrator.train.engines.engine import FLAT, Engine
from orchestrator.train.loop import LoopState
from orchestrator.train.ranks import Ranks
from orchestrator.work.assignment import contradiction

logger = logging.getLogger(__name__)
CHECKPOINT = re.compile(r"(rung|checkpoint)-\d+")
"""Names of checkpoints; one that was set aside has another."""


@dataclass(frozen=True)
class StartPoint:
    """A checkpoint whose hashes were right, before its tensors are read; or one that this process wrote and remembers."""

    folder: Path
    state: LoopState
    exact: bool
    """True if master weights and moments can be restored bit for bit; else only the weights can."""
    whole: bool = False
    """True if rank 0's file holds the master weights and moments of all ranks."""
    remembered: Mapping[str, torch.Tensor] | None = None
    """The rank's state where it is in memory still: then no file is read."""

    def resume(self, engine: Engine, ranks: Ranks) -> None:
        """Masters and moments as they were when the checkpoint was written; random state too, of a rank that was there."""
        own = self.remembered if self.remembered is not None else _rank_state(self.folder, ranks.rank)
        state = own if ranks.first or not self.whole else _rank_state(self.folder, 0)
        engine.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(RANDOM)})
        if RANDOM + "cpu" in own:
            torch.set_rng_state(own[RANDOM + "cpu"])
        if RANDOM + "cuda" in own:
            torch.cuda.set_rng_state(own[RANDOM + "cuda"], ranks.device)


@dataclass(frozen=True)
class Wanted:
    """The requirements on a checkpoint for a trial to continue from it."""

    seed: int
    layout: str
    """The layout of master weights and moments: with another one only the weights are restored."""
    owner: Mapping[str, object]
    """The owner, as `work.assignment.ownership` writes it."""
    misfit: Callable[[Path], str]
    """Why its tensors are not those that the trial trains; empty where they are."""


def open_checkpoint(
    start: Path, trial_folder: Path, ranks: Ranks, wanted: Wanted, *, note: Callable[[str], None]
) -> StartPoint | None:
    """Check the hashes and the owner of `start` (on rank 0), and describe its contents. Called on every rank.

    A damaged one is replaced by the trial's newest complete checkpoint, or by None (step 0), and `note` reports it; so is one
    that belongs to another trial, spec or base, which is set aside. On another number of ranks, master weights and moments are
    resumed if every rank had a full copy, and their sums may differ in the last bits.

    Raises:
        TrainingError: a checkpoint without optimizer state.
    """
    folder, notes = ranks.broadcast(_own_checkpoint(start, trial_folder, wanted) if ranks.first else None)
    for message in notes:
        note(message)
    if folder is None:
        return None
    record = read_json(folder / "state.json")
    newer = [path.name for path in _on_the_way(trial_folder) if _step_of(path) > max(record["step"], _step_of(start))]
    if newer:
        note(f"skipped, damaged or from a later attempt: {', '.join(newer)}")
    if not record["has_optimizer"]:
        raise TrainingError("the checkpoint holds no optimizer state", where=str(folder), remedy="restart from step 0")
    same_ranks, whole = record["ranks"] == ranks.count, wanted.layout == FLAT
    exact = record["layout"] == wanted.layout and (same_ranks or whole)
    if not exact:
        note(f"{folder.name} is from another gang or ZeRO stage: weights are loaded, Adam's moments restart at zero")
    elif not same_ranks:
        note(
            f"{folder.name} was made by {record['ranks']} ranks and is continued by {ranks.count}: last digits may "
            "differ from here on"
        )
    loss = None if record["loss"] is None else float(record["loss"])
    return StartPoint(folder, LoopState(record["step"], record["tokens"], loss), exact, whole)


def _own_checkpoint(start: Path, trial_folder: Path, wanted: Wanted) -> tuple[Path | None, list[str]]:
    """Return `start` if it is complete and the trial's own, else the newest other one that is; and the messages about it."""
    if not is_whole(start):
        found, notes = find_own(trial_folder, wanted.owner, wanted.misfit)
        return found, [*notes, f"{start.name} is damaged: {_goes_on(found)}"]
    stranger = _stranger(start, wanted)
    if not stranger:
        return start, []
    aside = set_aside(start)
    found, notes = find_own(trial_folder, wanted.owner, wanted.misfit)
    return found, [f"{start.name} is {stranger}: set aside as {aside.name}; {_goes_on(found)}", *notes]


def _goes_on(found: Path | None) -> str:
    return f"continues from {found.name}" if found is not None else "restarts from step 0"


def _stranger(folder: Path, wanted: Wanted) -> str:
    """Why a whole checkpoint is not the trial's own; empty where it is."""
    seed = read_json(folder / "state.json").get("seed")
    if found := contradiction(read_manifest(folder).about, wanted.owner):
        return found
    if seed != wanted.seed:
        return f"of seed {seed}, not {wanted.seed}"
    return f"of another trial: {unlike}" if (unlike := wanted.misfit(folder)) else ""


def find_own(
    trial_folder: Path, owner: Mapping[str, object], misfit: Callable[[Path], str] = lambda _: ""
) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint of the trial itself; set those of other trials aside, with a message for each."""
    notes: list[str] = []
    while (found := find_latest(trial_folder)) is not None:
        other = contradiction(read_manifest(found).about, owner) or misfit(found)
        if not other:
            return found, notes
        notes.append(f"{found.name} is {other}: set aside as {set_aside(found).name}")
    return None, notes


def rung_folder(trial_folder: Path, rung: int) -> Path:
    return trial_folder / f"rung-{rung}"


def checkpoint_folder(trial_folder: Path, step: int) -> Path:
    return trial_folder / f"checkpoint-{step}"


def find_latest(folder: Path) -> Path | None:
    """Return the complete checkpoint (rung-<n>/ or checkpoint-<step>/) with the most steps in a trial's folder.

    A damaged one is skipped with a warning. None if there is none.
    """
    found: list[tuple[int, Path]] = []
    for candidate in sorted(path for path in folder.glob("*-*") if CHECKPOINT.fullmatch(path.name)):
        try:
            record = read_json(candidate / "state.json")
            if record["has_optimizer"]:
                found.append((int(record["step"]), candidate))
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("checkpoint %s is skipped: %s", candidate, error)
    return next((path for _, path in sorted(found, key=lambda item: item[0], reverse=True) if is_whole(path)), None)


def is_whole(folder: Path) -> bool:
    """Return whether every file matches the manifest; log a warning for one that does not."""
    try:
        check_folder(folder)
    except IntegrityError as error:
        logger.warning("checkpoint %s is skipped: %s", folder, error)
        return False
    return True


def drop_old_checkpoints(trial_folder: Path, newest_step: int) -> None:
    """Keep the newest KEPT_CHECKPOINTS checkpoints up to `newest_step`; the new one is complete before an old one is deleted."""
    for path in [path for path in _on_the_way(trial_folder) if _step_of(path) <= newest_step][:-KEPT_CHECKPOINTS]:
        shutil.rmtree(path)


def drop_later_checkpoints(trial_folder: Path, start: Path | None) -> None:
    """Drop the checkpoints on the way that were made after `start`: the trial begins again there, by another way."""
    first = read_json(start / "state.json")["step"] if start is not None else 0
    for path in _on_the_way(trial_folder):
        if _step_of(path) > first:
            shutil.rmtree(path)


def forget_steps_after(step: int, steps_file: Path) -> None:
    """Take the lines of later steps out of steps.jsonl: they are about to be written again."""
    steps_file.parent.mkdir(parents=True, exist_ok=True)
    if steps_file.exists():
        kept = [line for line in read_jsonl(steps_file) if isinstance(line.get("step"), int) and line["step"] <= step]
        write_atomic(steps_file, "".join(json.dumps(line) + "\n" for line in kept))


def _on_the_way(trial_folder: Path) -> list[Path]:
    """Return the folders checkpoint-<step>, by step."""
    return sorted((path for path in trial_folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)), key=_step_of)


def _step_of(folder: Path) -> int:
    """Return the step in a checkpoint's name; -1 for a rung."""
    kind, _, number = folder.name.rpartition("-")
    return int(number) if kind == "checkpoint" and number.isdigit() else -1


def _rank_state(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """Return the state that a rank wrote; empty if there was no such rank."""
    file = folder / f"state-rank{rank}.safetensors"
    return load_file(file) if file.exists() else {}
