"""The record of every trial, on disk: trials/<id>/{trial,result-<rung>,end}.json.

One process writes: the exchange during a search, the driver in the one-trial job. Any process may read. A recorded result is
never computed again: a sweep that is submitted a second time takes it from here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from orchestrator.errors import IntegrityError
from orchestrator.run.layout import END, EVALUATION, TRIAL, rung_file, rung_files
from orchestrator.store import check_folder, commit_folder, read_json, read_manifest, read_record, write_json
from orchestrator.store.files import Record
from orchestrator.store.folders import MANIFEST
from orchestrator.values import Value
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

logger = logging.getLogger(__name__)
OPTIMIZER_STATE = "state-rank"
"""Prefix of the files with a rank's fp32 master weights, optimizer moments and random state."""
Damaged = Callable[[Path, str], None]
TrialState = Literal["finished", "stopped", "failed"]
DocumentLosses = tuple[np.ndarray, np.ndarray]
"""Mean loss and number of supervised tokens of every eval document."""


class TrialEnd(Value):
    """end.json: how a trial ended. A trial without this file was interrupted and continues from its last rung."""

    state: TrialState
    reason: str = ""
    for_want_of_hours: bool = False
    """Stopped only by `resources.max_gpu_hours`: it continues from its last rung once that is raised."""


class TrialHead(Value):
    """trial.json: written before the trial starts."""

    trial: TrialSpec
    option: int | None


class TrialEntry(Value):
    """Everything recorded of one trial."""

    trial: TrialSpec
    option: int | None
    """Index in the plan's options; None for a control."""
    results: tuple[RungResult, ...] = ()
    end: TrialEnd | None = None

    @property
    def ended_for_good(self) -> bool:
        return self.end is not None and not self.end.for_want_of_hours


class Ledger:
    """The folder `trials/` of a run, read when the ledger is made and kept up to date by its own writes.

    Call `refresh` to see what another process has written since.

    Args:
        folder: The run's trials/.
        damaged: Called with every record that cannot be read and why; the record is left out. Without it a damaged record is
            logged, and a disk error is raised: a driver must not retrain trials whose records are only unreachable.

    Raises:
        OSError: a record cannot be read, and `damaged` is not given.
    """

    def __init__(self, folder: Path, damaged: Damaged | None = None) -> None:
        self._folder = folder
        self._damaged = damaged
        self._entries: dict[str, TrialEntry] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the folder again."""
        entries = [_read_entry(path.parent, self._damaged) for path in sorted(self._folder.glob(f"*/{TRIAL}"))]
        self._entries = {entry.trial.trial_id: entry for entry in entries if entry is not None}

    def entries(self) -> list[TrialEntry]:
        """Return every trial and control by number, controls first."""
        return sorted(self._entries.values(), key=lambda entry: (entry.trial.number, entry.trial.trial_id))

    def get(self, trial_id: str) -> TrialEntry | None:
        return self._entries.get(trial_id)

    def folder(self, trial_id: str) -> Path:
        return self._folder / trial_id

    def register(self, trial: TrialSpec, option: int | None) -> TrialEntry:
        """Record a trial before it starts; return the existing entry if it is already recorded."""
        entry = self._entries.get(trial.trial_id)
        if entry is None:
            entry = TrialEntry(trial=trial, option=option)
            self.folder(trial.trial_id).mkdir(parents=True, exist_ok=True)
            write_json(self.folder(trial.trial_id) / TRIAL, TrialHead(trial=trial, option=option))
            self._entries[trial.trial_id] = entry
        return entry

    def add(self, result: RungResult) -> None:
        """Record the result of a rung."""
        entry = self._entries[result.trial_id]
        write_json(self.folder(result.trial_id) / rung_file(result.rung), result)
        results = (*(known for known in entry.results if known.rung != result.rung), result)
        self._entries[result.trial_id] = entry.model_copy(update={"results": tuple(sorted(results, key=lambda r: r.rung))})

    def end(self, trial_id: str, state: TrialState, reason: str = "", *, for_want_of_hours: bool = False) -> None:
        """Record how a trial ended; the first end counts."""
        entry = self._entries[trial_id]
        if entry.end is None:
            end = TrialEnd(state=state, reason=reason, for_want_of_hours=for_want_of_hours)
            write_json(self.folder(trial_id) / END, end)
            self._entries[trial_id] = entry.model_copy(update={"end": end})

    def document_losses(self, result: RungResult) -> DocumentLosses | None:
        """Return the losses that a rung wrote; None where it did not.

        Raises:
            IntegrityError: they differ from the rung's manifest.
        """
        folder = Path(result.checkpoint) if result.checkpoint else self.folder(result.trial_id)
        if not (folder / EVALUATION).exists():
            return None
        if (folder / MANIFEST).exists():
            check_folder(folder, only=(EVALUATION,))
        with np.load(folder / EVALUATION, allow_pickle=False) as arrays:
            return arrays["loss_sums"] / arrays["num_tokens"], arrays["num_tokens"].astype(float)

    def lift_bounds(self) -> list[str]:
        """Turn trials that the GPU-hour bound stopped into interrupted ones, which continue. Return their ids."""
        lifted = []
        for trial_id, entry in self._entries.items():
            if entry.end is not None and entry.end.for_want_of_hours:
                (self.folder(trial_id) / END).unlink()
                self._entries[trial_id] = entry.model_copy(update={"end": None})
                lifted.append(trial_id)
        return lifted


def base_result(ledger: Ledger) -> RungResult | None:
    """Return the scores of the base model, once it has been evaluated."""
    entry = ledger.get("none")
    return entry.results[-1] if entry is not None and entry.results else None


def drop_optimizer_state(checkpoint: Path) -> None:
    """Rewrite a checkpoint without its optimizer state, atomically: a reader sees the old folder or the new one.

    Raises:
        IntegrityError: a file to keep is damaged, and a new manifest would declare it complete. Nothing was changed.
    """
    state_file = checkpoint / "state.json"
    if not state_file.exists() or not read_json(state_file)["has_optimizer"]:
        return
    kept = [record for record in read_manifest(checkpoint).files if not Path(record.path).name.startswith(OPTIMIZER_STATE)]
    manifest = check_folder(checkpoint, only=[record.path for record in kept])
    known = {record.path: record.sha256 for record in kept if record.path != state_file.name}
    with commit_folder(checkpoint, known_sha256=known, about=manifest.about) as folder:
        for source in (path for path in checkpoint.rglob("*") if path.is_file()):
            name = source.relative_to(checkpoint)
            if source.name == MANIFEST or source.name.startswith(OPTIMIZER_STATE):
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).hardlink_to(source)
        write_json(folder / "state.json", read_json(state_file) | {"has_optimizer": False})


def _read_entry(folder: Path, damaged: Damaged | None) -> TrialEntry | None:
    """Read a trial's records up to the first damaged rung.

    Later rungs started from the damaged one, so they do not count: a resumed run trains them again, and `runtime.recovery` sets
    their files aside.
    """
    head = _read(folder / TRIAL, TrialHead, damaged)
    if head is None:
        return None
    results: list[RungResult] = []
    for file in rung_files(folder):
        result = _read(file, RungResult, damaged)
        if result is None:
            return TrialEntry(trial=head.trial, option=head.option, results=tuple(results))
        results.append(result)
    end = _read(folder / END, TrialEnd, damaged) if (folder / END).exists() else None
    return TrialEntry(trial=head.trial, option=head.option, results=tuple(results), end=end)


def _read(path: Path, kind: type[Record], damaged: Damaged | None) -> Record | None:
    try:
        return read_record(path, kind)
    except FileNotFoundError:
        return None  # set aside since the folder was listed
    except IntegrityError as error:
        if damaged is None:
            logger.warning("left out: %s", error)
        else:
            damaged(path, error.what)
    except OSError as error:
        if damaged is None:
            raise
        damaged(path, str(error))
    return None


def is_tried_again(trial: TrialSpec, state: str) -> bool:
    """Return whether a new submission runs a failed trial again: only the base model, without which nothing can be compared."""
    return trial.control == "none" and state == "failed"
