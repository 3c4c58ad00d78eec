"""A job up to and including its plan, with nothing started and nothing written: `--dry-run`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.anatomy import read_anatomy, resolve_base
from orchestrator.data import DataSummary, prepare_data
from orchestrator.errors import IntegrityError, RunConflictError
from orchestrator.plan.defaults import with_section
from orchestrator.plan.values import ClusterDescription, RunPlan
from orchestrator.run.directory import is_same_run, output_root, require_same_base
from orchestrator.run.layout import RunFolder
from orchestrator.run.records import read_outcome
from orchestrator.runtime.prepare import Job, KnownRun, Tokenised, plan_of_data, require_metric
from orchestrator.spec import LoadedSpec, spec_sha256
from orchestrator.store import base_identity, read_record
from orchestrator.store.files import Record


@dataclass(frozen=True)
class Rehearsal:
    """What a submission would begin with."""

    plan: RunPlan
    data: DataSummary
    run_folder: Path
    would: str
    """`start a new run`, `continue an interrupted run`, ..."""


def rehearse(loaded: LoadedSpec, job: Job, *, output: Path | None = None, cluster: Callable[[], ClusterDescription]) -> Rehearsal:
    """Everything that a job checks before it starts: spec, output, base, data, plan. The data is tokenised in a temporary folder.

    Args:
        cluster: Describes where it would run; called once the input has been found good.

    Raises:
        SpecError, BaseError, SelectionError, DataError, UsageError: the input cannot be used.
        RunConflictError: the run's folder holds another run, or trained another base or other data.
        PlanError: it does not fit.
    """
    loaded = with_section(loaded, job)
    if job == "sweep":
        require_metric(loaded)
    sha256 = spec_sha256(loaded.spec, job)
    run_folder = output_root(loaded, output).path / loaded.spec.name
    known = is_same_run(run_folder, loaded, sha256)
    anatomy = read_anatomy(resolve_base(loaded.spec.base.model, loaded.folder), need_weights=True)
    if known:
        require_same_base(run_folder, base_identity(Path(anatomy.folder), anatomy.weight_files))
    run = RunFolder(run_folder)
    planned = _read(run.plan, RunPlan) if known else None
    with tempfile.TemporaryDirectory(prefix="orchestrator-data-") as folder:
        data = prepare_data(loaded, Path(anatomy.folder), Path(folder))
        before = _read(run.data_summary, DataSummary) if planned is not None else None
        if before is not None and _hashes(before) != _hashes(data):
            what = "the data has changed since this run began"
            raise RunConflictError(what, where=str(run_folder), remedy="put it back, or choose another `name`")
        plan = plan_of_data(loaded, anatomy, Tokenised(data, Path(folder)), cluster(), job, KnownRun(planned))
    return Rehearsal(plan, data, run_folder, _would(run_folder, known))


def _hashes(data: DataSummary) -> dict[str, str]:
    return {name: part.sha256 for name, part in data.splits.items()}


def _read(path: Path, kind: type[Record]) -> Record | None:
    """A record of the run; None where there is none, or a damaged one, which a submission would set aside."""
    try:
        return read_record(path, kind)
    except (FileNotFoundError, IntegrityError):
        return None


def _would(run_folder: Path, known: bool) -> str:
    if not known:
        return "start a new run"
    if read_outcome(run_folder) is None:
        return "continue an interrupted run"
    return "open a finished run: show its result, or add the missing trials"
