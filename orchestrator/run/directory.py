"""The folder of one run, held by a driver: which spec and base it belongs to, and the lock that keeps a second driver out."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pydantic import ValidationError

from orchestrator.errors import IntegrityError, RunConflictError
from orchestrator.run.layout import IDENTITY, PLAN, RunFolder
from orchestrator.run.ledger import Ledger
from orchestrator.spec import JobSpec, LoadedSpec, describe_difference
from orchestrator.store import versions
from orchestrator.store.files import (
    PARTIAL,
    RECORD_REMEDY,
    append_jsonl,
    output_to,
    read_json,
    set_aside,
    write_atomic,
    write_json,
)
from orchestrator.values import content_hash

LOCK = ".lock"
FREE_TO_CHANGE = ("output:", "resources.", "search.trials:")
"""Keys of the spec that may differ between two submissions of one run."""
HUB = "hub"
"""Key of base.json with id, revision and commit of a base from the hub."""
LISTED = 20
UPLOADED = "runtime_resources/working_dir_files"
"""Part of the path of a working directory that `ray job submit` uploaded; Ray deletes it when it needs the room."""
WRITABLE = "give `output` or --output a writable folder with free space; or free space or grant write permission there"


class RunDirectory(RunFolder):
    """`runs/<name>/`, held by one driver at a time; see `open`."""

    def __init__(self, path: Path, lock: TextIO) -> None:
        super().__init__(path)
        self._lock = lock

    @classmethod
    def open(cls, root: Path, name: str, loaded: LoadedSpec, spec_sha256: str) -> RunDirectory:
        """Create the run's folder, or open the one of an earlier submission of the same spec.

        A folder of another spec that was never planned (its data was rejected, for instance) is reused. Partial files of a killed
        driver are removed; a change of package versions between submissions is recorded as an event.

        Raises:
            RunConflictError: the folder holds another run or something else, or another driver is running it.
            UsageError: the folder is not writable.
        """
        path = root / name
        earlier = _read_earlier(path)
        with output_to(path, remedy=WRITABLE):
            _refuse_foreign(path, earlier)
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, _lock(path))
            try:
                _clear_partial(path)
                earlier = _read_earlier(path)  # read again under the lock: its last holder may have written it
                run._take_over(earlier, loaded, spec_sha256)
            except BaseException:
                run.close()
                raise
            return run

    def _take_over(self, earlier: EarlierSubmission, loaded: LoadedSpec, spec_sha256: str) -> None:
        """Write this submission's spec and identity over those of an earlier one. A damaged run.json is set aside where the plan
        shows that the run belongs to this spec.

        Raises:
            IntegrityError, RunConflictError: run.json is damaged or of another run.
        """
        known, damage = earlier.identity, earlier.damage
        same = known is not None and known["spec_sha256"] == spec_sha256
        if damage is not None and earlier.planned_for != spec_sha256:
            damage.remedy = "restore run.json from a copy, or choose another `name` or `output`; nothing was overwritten"
            raise damage
        if known is not None and not same and self.was_planned:
            raise _conflict(self.path, known["values"], loaded.spec.model_dump(mode="json"))
        identity = _identity(loaded, spec_sha256, known if same else None)
        if damage is not None:
            aside = set_aside(self.identity_file)
            shown = "the plan shows that the run belongs to this spec"
            message = f"{IDENTITY} is damaged ({damage.what}): set aside as {aside.name}; {shown}"
            self.event("record_damaged", message=message, path=IDENTITY, aside=aside.name)
        write_json(self.identity_file, identity)
        write_atomic(self.spec, loaded.text)
        if known is not None and same and known["versions"] != identity["versions"]:
            self.event("versions_changed", changes=describe_difference(known["versions"], identity["versions"]))

    @classmethod
    def reopen(cls, path: Path) -> RunDirectory:
        """Open a run by its folder, without its spec.

        Raises:
            RunConflictError: the folder holds no run, or another driver is running it.
        """
        earlier = _read_earlier(path)
        if earlier.damage is not None:
            raise earlier.damage
        if earlier.identity is None:
            raise RunConflictError("the folder does not hold a run", where=str(path), remedy="give the folder of a run")
        with output_to(path, remedy=WRITABLE):
            return cls(path, _lock(path))

    @property
    def identity(self) -> dict[str, Any]:
        """The content of run.json: name, spec_sha256, created, submissions, seed, versions, values (the resolved spec)."""
        return read_json(self.identity_file)

    @property
    def was_planned(self) -> bool:
        """Return whether the run has a plan, or had a damaged one: its trials then depend on its base and data."""
        return was_planned(self.path)

    @cached_property
    def ledger(self) -> Ledger:
        """The driver's ledger, read at first use. Refresh it where the exchange has written since."""
        return Ledger(self.trials)

    def claim_base(self, identity: dict[str, Any], hub: dict[str, str] | None = None) -> str:
        """Record which base model this run trains, and return its hash; once the run was planned, reject another.

        Args:
            hub: Id, revision and commit of a base from the hub. They are recorded and not compared: what counts is the content.

        Raises:
            RunConflictError: the base's folder holds another base than at the last submission; names the differences.
        """
        require_same_base(self.path, identity)
        if not (self.was_planned and self.base.exists()):
            write_json(self.base, identity | ({HUB: hub} if hub else {}))
        return content_hash(identity)

    def event(self, kind: str, **fields: Any) -> None:
        """Append an automatic action to events.jsonl (micro-batch halved, gang replaced, trial retried)."""
        append_jsonl(self.events, {"time": time.time(), "kind": kind, **fields})

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def was_planned(path: Path) -> bool:
    """Return whether the run in `path` has a plan, or had a damaged one that was set aside."""
    return (path / PLAN).exists() or any(path.glob(f"{PLAN}.damaged-*"))


def recorded_commit(path: Path, model: str, revision: str | None) -> str:
    """Return the commit of the hub that the planned run in `path` began with; empty if none is recorded, or of another base."""
    with contextlib.suppress(IntegrityError, OSError):
        known = read_json(RunFolder(path).base)
        hub = known.get(HUB) if isinstance(known, dict) and was_planned(path) else None
        if isinstance(hub, dict) and (hub.get("id"), hub.get("revision")) == (model, revision or ""):
            return str(hub.get("commit", ""))
    return ""


def require_same_base(path: Path, identity: dict[str, Any]) -> None:
    """Reject another base than the one that the planned run in `path` trained; a run without a plan accepts any.

    Raises:
        RunConflictError: names the differences.
        IntegrityError: the record of the run's base is damaged.
    """
    file = RunFolder(path).base
    if not (was_planned(path) and file.exists()):
        return
    known = read_json(file)
    if not isinstance(known, dict):
        raise IntegrityError("no identity of a base", where=str(file), remedy=RECORD_REMEDY)
    differences = describe_difference({key: value for key, value in known.items() if key != HUB}, identity)
    if differences:
        raise RunConflictError(
            "the base's folder differs from when this run began; the difference (there -> here):\n  " + _shown(differences),
            where=str(path),
            remedy="restore the base, or choose another `name`; nothing was overwritten",
        )


def is_same_run(path: Path, loaded: LoadedSpec, spec_sha256: str) -> bool:
    """Return whether `RunDirectory.open` would continue an earlier submission in `path`, without writing anything.

    Raises:
        RunConflictError: `open` would refuse: the folder holds another run or something else, or another driver is running it.
    """
    earlier = _read_earlier(path)
    _refuse_foreign(path, earlier)
    if earlier.damage is not None:
        raise earlier.damage
    known = earlier.identity
    if holder := running_driver(path):
        raise _busy(path, holder)
    if known is None:
        return False
    if known["spec_sha256"] != spec_sha256:
        if (path / PLAN).exists():
            raise _conflict(path, known["values"], loaded.spec.model_dump(mode="json"))
        return False
    return True


def running_driver(path: Path) -> str:
    """Return the process that is running the run now (`process 123 on host`); empty where there is none."""
    file = path / LOCK
    if not file.exists():
        return ""
    with file.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return lock.read().strip() or "another process"
    return ""


def _identity(loaded: LoadedSpec, spec_sha256: str, known: dict[str, Any] | None) -> dict[str, Any]:
    now = time.time()
    return {
        "name": loaded.spec.name,
        "spec_sha256": spec_sha256,
        "created": known["created"] if known else now,
        "submissions": [*(known["submissions"] if known else []), now],
        "seed": loaded.spec.train.seed,
        "versions": versions(),
        "values": loaded.spec.model_dump(mode="json"),
    }


class EarlierSubmission(NamedTuple):
    """The state that an earlier submission left in a run's folder; empty for a new run."""

    identity: dict[str, Any] | None
    """The content of run.json."""
    planned_for: str | None
    """Hash of the spec that the plan was made for; None without a readable plan."""
    damage: IntegrityError | RunConflictError | None = None
    """Why run.json cannot be used; empty if it can."""


def _read_earlier(path: Path) -> EarlierSubmission:
    """Read run.json, and from plan.json which spec it was made for."""
    file, planned_for = path / IDENTITY, None
    with output_to(path, remedy=WRITABLE):
        with contextlib.suppress(IntegrityError, OSError):
            plan = read_json(path / PLAN)
            planned_for = plan.get("spec_sha256") if isinstance(plan, dict) else None
        if not file.exists():
            return EarlierSubmission(None, planned_for)
        try:
            known = read_json(file)
        except IntegrityError as error:
            return EarlierSubmission(None, planned_for, error)
    fields = {"spec_sha256", "created", "submissions", "versions", "values"}
    if isinstance(known, dict) and known.keys() >= fields and _is_shaped(known):
        return EarlierSubmission(known, planned_for)
    remedy = "choose another `name` or `output`; nothing was overwritten"
    foreign = RunConflictError("this run.json was not written by this program", where=str(file), remedy=remedy)
    return EarlierSubmission(None, planned_for, foreign)


def _refuse_foreign(path: Path, earlier: EarlierSubmission) -> None:
    """Reject a folder without run.json unless it holds only a lock, or a partial run.json."""
    remedy = "choose another `name` or `output`; nothing was changed"
    if path.exists() and not path.is_dir():
        raise RunConflictError("a file is in the place of the run's folder", where=str(path), remedy=remedy)
    if not path.is_dir() or earlier.planned_for is not None or earlier.identity is not None:
        return
    if earlier.damage is not None:
        raise earlier.damage
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK and PARTIAL not in entry.name)
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        what = f"the folder holds files but is not a run: {', '.join(foreign[:3])}{more}"
        raise RunConflictError(what, where=str(path), remedy=remedy)


def _is_shaped(known: dict[str, Any]) -> bool:
    return isinstance(known["submissions"], list) and all(isinstance(known[key], dict) for key in ("versions", "values"))


def _clear_partial(path: Path) -> None:
    """Remove partial files of a killed driver. Partial folders are left to `commit_folder`, which can recover them."""
    for partial in (*path.glob(f".*{PARTIAL}*"), *path.glob(f"data/.*{PARTIAL}*")):
        if partial.is_file():
            partial.unlink(missing_ok=True)


def _lock(path: Path) -> TextIO:
    """Take the lock. The operating system releases the lock of a driver that was killed."""
    lock = (path / LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise _busy(path, holder) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on host {platform.node()}")
    lock.flush()
    return lock


def _busy(path: Path, holder: str) -> RunConflictError:
    return RunConflictError(
        f"{holder} is already running this run", where=str(path), remedy="wait for it, stop it, or choose another `name`"
    )


def _conflict(path: Path, old: dict[str, Any], new: dict[str, Any]) -> RunConflictError:
    remedy = "choose another `name` or `output`, or restore the spec; nothing was overwritten"
    old, new = as_today(old), as_today(new)
    steps = old.get("train", {}).get("tokens_per_step")
    if isinstance(steps, int) and new.get("train", {}).get("tokens_per_step") == "auto":
        remedy = f"write train.tokens_per_step: {steps} to continue this run, or choose another `name`; nothing was overwritten"
    differences = [line for line in describe_difference(old, new) if not line.startswith(FREE_TO_CHANGE)]
    shown = _shown(differences) or "not in the spec: it was submitted as the other job (sweep, finetune)"
    return RunConflictError(
        f"the folder holds another run; the difference (there -> here):\n  {shown}",
        where=str(path),
        remedy=remedy,
    )


def as_today(values: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded spec with newer keys at their defaults, so that they are not reported as differences."""
    with contextlib.suppress(ValidationError):
        values = JobSpec.model_validate(values).model_dump(mode="json")
    sources = values.get("data", {}).get("train")
    for source in sources if isinstance(sources, list) else ():
        source["weight"] = source.get("weight") or 1.0
    return values


def _shown(differences: list[str]) -> str:
    more = [f"and {len(differences) - LISTED} more"] if len(differences) > LISTED else []
    return "\n  ".join(differences[:LISTED] + more)


@dataclass(frozen=True)
class OutputRoot:
    """The folder that holds the runs."""

    path: Path
    moved: str = ""
    """Why it differs from the spec's `output`; empty where it does not."""


def output_root(loaded: LoadedSpec, output: Path | None) -> OutputRoot:
    """Return the folder that holds the runs: `--output`, or the spec's.

    A spec in a working directory that Ray uploaded, with a relative `output`, would put the run into that copy, which Ray
    deletes: the run goes to `~/orchestrator-runs` of the node instead.
    """
    if output is not None:
        return OutputRoot(output.expanduser().absolute())
    root = loaded.output_root
    if UPLOADED not in root.as_posix():
        return OutputRoot(root)
    kept = Path.home() / "orchestrator-runs"
    return OutputRoot(
        kept,
        f"`output: {loaded.spec.output}` lies in the working directory that Ray uploaded and will delete; "
        f"the run goes to {kept} (give --output or an absolute `output` for another place)",
    )
