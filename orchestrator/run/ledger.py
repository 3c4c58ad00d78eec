"""What happened to every trial, on disk: trials/<id>/{trial,result-<rung>,end}.json.

One process writes (the exchange); anybody may read. What stands here is never computed again: a sweep that is
submitted a second time answers from here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np

from orchestrator.errors import IntegrityError
from orchestrator.store import check_folder, commit_folder, read_json, read_manifest, read_record, write_json
from orchestrator.store.files import Record
from orchestrator.store.folders import MANIFEST
from orchestrator.values import Value
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

logger = logging.getLogger(__name__)
OPTIMIZER_STATE = "state-rank"
"""How the files begin that hold a rank's masters, moments and random state."""
TRIAL, END = "trial.json", "end.json"
EVALUATION = "eval.npz"
TrialState = Literal["finished", "stopped", "failed"]


class TrialEnd(Value):
    """How a trial ended. A trial without this file was interrupted and goes on from its last rung."""

    state: TrialState
    reason: str = ""
    for_want_of_hours: bool = False
    """It was stopped by `resources.max_gpu_hours` alone, and goes on from its last rung where that is raised."""


class TrialHead(Value):
    """trial.json: what was registered before it began."""

    trial: TrialSpec
    option: int | None


class TrialEntry(Value):
    """All that is known of one trial."""

    trial: TrialSpec
    option: int | None
    """Index in the plan's options; None for a control."""
    results: tuple[RungResult, ...] = ()
    end: TrialEnd | None = None

    @property
    def ended_for_good(self) -> bool:
        return self.end is not None and not self.end.for_want_of_hours


class Ledger:
    """The folder `trials/` of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        entries = map(_read_entry, sorted(folder.glob(f"*/{TRIAL}")))
        self._entries = {entry.trial.trial_id: entry for entry in entries if entry is not None}

    def entries(self) -> list[TrialEntry]:
        """Every trial and control, by number, controls first."""
        return sorted(self._entries.values(), key=lambda entry: (entry.trial.number, entry.trial.trial_id))

    def get(self, trial_id: str) -> TrialEntry | None:
        return self._entries.get(trial_id)

    def folder(self, trial_id: str) -> Path:
        return self._folder / trial_id

    def register(self, trial: TrialSpec, option: int | None) -> TrialEntry:
        """Write the trial down before it starts. A trial that stands already is returned as it stands."""
        entry = self._entries.get(trial.trial_id)
        if entry is None:
            entry = TrialEntry(trial=trial, option=option)
            self.folder(trial.trial_id).mkdir(parents=True, exist_ok=True)
            write_json(self.folder(trial.trial_id) / TRIAL, TrialHead(trial=trial, option=option))
            self._entries[trial.trial_id] = entry
        return entry

    def add(self, result: RungResult) -> None:
        """Write a rung's result down."""
        entry = self._entries[result.trial_id]
        write_json(self.folder(result.trial_id) / f"result-{result.rung}.json", result)
        results = (*(known for known in entry.results if known.rung != result.rung), result)
        self._entries[result.trial_id] = entry.model_copy(update={"results": tuple(sorted(results, key=lambda r: r.rung))})

    def end(self, trial_id: str, state: TrialState, reason: str = "", *, for_want_of_hours: bool = False) -> None:
        """Write a trial's end down; the first end counts."""
        entry = self._entries[trial_id]
        if entry.end is None:
            end = TrialEnd(state=state, reason=reason, for_want_of_hours=for_want_of_hours)
            write_json(self.folder(trial_id) / END, end)
            self._entries[trial_id] = entry.model_copy(update={"end": end})

    def document_losses(self, result: RungResult) -> tuple[np.ndarray, np.ndarray] | None:
        """(mean loss, supervised tokens) of every eval document, as a rung left them; None where it did not.

        Raises:
            IntegrityError: they are not what the rung's manifest says.
        """
        folder = Path(result.checkpoint) if result.checkpoint else self.folder(result.trial_id)
        if not (folder / EVALUATION).exists():
            return None
        if (folder / MANIFEST).exists():
            check_folder(folder, only=(EVALUATION,))
        with np.load(folder / EVALUATION, allow_pickle=False) as arrays:
            return arrays["loss_sums"] / arrays["num_tokens"], arrays["num_tokens"].astype(float)

    def lift_bounds(self) -> list[str]:
        """There are hours again: trials that were stopped for want of them are interrupted ones now. Their ids."""
        lifted = []
        for trial_id, entry in self._entries.items():
            if entry.end is not None and entry.end.for_want_of_hours:
                (self.folder(trial_id) / END).unlink()
                self._entries[trial_id] = entry.model_copy(update={"end": None})
                lifted.append(trial_id)
        return lifted


def base_result(ledger: Ledger) -> RungResult | None:
    """What the untouched base scored, once it has been measured."""
    entry = ledger.get("none")
    return entry.results[-1] if entry is not None and entry.results else None


def drop_optimizer_state(checkpoint: Path) -> None:
    """Rewrite a checkpoint without what only a continuation needs; a reader sees the old folder or the new one.

    Raises:
        IntegrityError: what would be kept is damaged: a new manifest would call it whole. Nothing was changed.
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


def _read_entry(path: Path) -> TrialEntry | None:
    """What is whole of it. A damaged record is passed over, with what came after it; `runtime.recovery` sets it aside."""
    folder = path.parent
    head = _whole(path, TrialHead)
    if head is None:
        return None
    results: list[RungResult] = []
    for file in sorted(folder.glob("result-*.json"), key=result_number):
        result = _whole(file, RungResult)
        if result is None:
            return TrialEntry(trial=head.trial, option=head.option, results=tuple(results))
        results.append(result)
    end = _whole(folder / END, TrialEnd) if (folder / END).exists() else None
    return TrialEntry(trial=head.trial, option=head.option, results=tuple(results), end=end)


def _whole(path: Path, kind: type[Record]) -> Record | None:
    try:
        return read_record(path, kind)
    except IntegrityError as error:
        logger.warning("passed over: %s", error)
        return None


def result_number(file: Path) -> int:
    """The rung of `result-<rung>.json`; -1 for another file."""
    number = file.stem.removeprefix("result-")
    return int(number) if number.isdecimal() else -1


def is_tried_again(trial: TrialSpec, state: str) -> bool:
    """Whether a new submission tries it again: without the untouched base nothing can be compared, so its failure is not kept."""
    return trial.control == "none" and state == "failed"
