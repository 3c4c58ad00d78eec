"""Prepare a run from its spec: everything that is decided before anything runs. A dry run ends there and writes nothing."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ValidationError

from orchestrator.anatomy import ModelAnatomy, pooled_for, read_anatomy, with_pooling
from orchestrator.bases import Base, locate_base, located, record_base
from orchestrator.bases.files import loaded_files
from orchestrator.bases.own_code import use_own_code
from orchestrator.data import DataSummary, TokenizedSet, data_size, load_tokenizer, prepare_data
from orchestrator.data.encoding.padding import choose_padding, odd_documents
from orchestrator.data.reading.measure import check_first_rows
from orchestrator.errors import IntegrityError, RunConflictError, UsageError
from orchestrator.plan import make_plan, work_context
from orchestrator.plan import schedule as steps
from orchestrator.plan.defaults import with_section
from orchestrator.plan.measurements import standing_choice, with_choice
from orchestrator.plan.schedule import StepSize
from orchestrator.plan.values import ClusterDescription, DataSize, FinetunePlan, RunPlan, SweepPlan
from orchestrator.run.directory import WRITABLE, RunDirectory, is_same_run, output_root, recorded_commit, require_same_base
from orchestrator.run.layout import RunFolder
from orchestrator.run.records import read_outcome
from orchestrator.run.scoring import Scoring, scoring_of
from orchestrator.runtime.cluster import require_base_everywhere
from orchestrator.runtime.recovery import repair_run
from orchestrator.spec import JobSpec, LoadedSpec, spec_sha256
from orchestrator.store import base_identity, file_identity, output_to, read_record, write_json
from orchestrator.store.files import RECORD_REMEDY, Record
from orchestrator.train.evaluation import text_metric
from orchestrator.train.model.pooled_position import check_pooled_position
from orchestrator.transfer.run_view import RunView
from orchestrator.work.assignment import WorkContext
from orchestrator.work.execution import DataPaths, ExecutionPlan, Padding, TrainSettings
from orchestrator.work.measurements import CompileChoice, LayerScores

Job = Literal["sweep", "finetune"]


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start."""

    spec: JobSpec
    run: RunDirectory
    anatomy: ModelAnatomy
    data: DataSummary
    plan: RunPlan

    @property
    def sweep_plan(self) -> SweepPlan:
        """Return the plan of a sweep."""
        assert isinstance(self.plan, SweepPlan)
        return self.plan

    @property
    def finetune_plan(self) -> FinetunePlan:
        """Return the plan of the one-trial job."""
        assert isinstance(self.plan, FinetunePlan)
        return self.plan

    @property
    def data_paths(self) -> DataPaths:
        folder = self.run.data
        retain, replay = folder / "retain.npz", folder / "replay.npz"
        return DataPaths(
            train=str(folder / "train.npz"),
            eval=str(folder / "eval.npz"),
            retain=str(retain) if retain.exists() else None,
            replay=str(replay) if replay.exists() else None,
        )

    @property
    def settings(self) -> TrainSettings:
        train = self.spec.train
        return TrainSettings(
            warmup=train.warmup,
            schedule=train.schedule,
            weight_decay=train.weight_decay,
            grad_clip=train.grad_clip,
            tokens_per_step=steps.tokens_per_step(self.spec, self.plan.data),
        )

    def work_context(self, execution: ExecutionPlan | None = None) -> WorkContext:
        """Return what all work for one kind of gang shares: the search's gangs, or those of another execution."""
        metric = self.scoring.metric
        return work_context(self.plan, settings=self.settings, data=self.data_paths, metric=metric, execution=execution)

    @property
    def scoring(self) -> Scoring:
        return scoring_of(self.spec.search, self.plan)


def open_run(loaded: LoadedSpec, job: Job, output: Path | None, view: RunView) -> RunDirectory:
    """Open and lock the run's folder under `output`, or under the spec's.

    Raises:
        RunConflictError: it holds another run, or another driver is running it.
    """
    root = output_root(loaded, output)
    run = RunDirectory.open(root.path, loaded.spec.name, loaded, spec_sha256(loaded.spec, job))
    if root.moved:
        view.event("output_moved", root.moved)
        run.event("output_moved", message=root.moved)
    try:
        repair_run(run, view)
    except BaseException:
        run.close()
        raise
    return run


def prepare(
    loaded: LoadedSpec, job: Job, run: RunDirectory, view: RunView, cluster: Callable[[], ClusterDescription] | None
) -> Prepared:
    """Read the base model, tokenise, plan; write plan.json.

    Args:
        cluster: Describes the cluster; called only after the input is checked, so that bad input starts nothing. None for a
            finished run, which keeps its plan.

    Raises:
        BaseError, SelectionError, DataError: the input cannot be used, or a node has another base.
        UsageError: the search's metric cannot be imported.
        RunConflictError: base or data are not what earlier trials of this run were trained on.
        PlanError: it does not fit the cluster.
    """
    spec = loaded.spec
    if job == "sweep" and cluster is not None:
        require_metric(loaded)
    view.phase("base", "reading and hashing the base model's files")
    base = _base_in(run.path, loaded)
    anatomy, base_sha256 = _claim_base(loaded, base, run, view, finished=cluster is None)
    folder = Path(anatomy.folder)
    known = _read_known(run, folder, base_sha256)
    anatomy = _pooled(anatomy, spec, known.plan)
    view.phase("data", "reading and tokenising")
    with output_to(run.data, remedy=WRITABLE, only_full=True):
        planned_sha256 = known.plan.data.sets_sha256 if known.plan is not None else ""
        data = prepare_data(
            loaded, base.for_data(), run.data, anatomy=anatomy, keep_sets=run.was_planned, planned_sha256=planned_sha256
        )
    if cluster is None:
        assert known.plan is not None, "the run has no plan any more: planning it again"
        return Prepared(spec, run, anatomy, data, known.plan)
    _report(run, view, [("warning" if notice.level == "warning" else "data", notice.line) for notice in data.told])
    view.phase("plan", "connecting to Ray")
    machines = cluster()
    # Before planning, so that a node with another or no base is reported at once and not by a gang that fails.
    files = loaded_files(folder, [*anatomy.code_files, *anatomy.weight_files])
    require_base_everywhere(folder, {name: file_identity(folder / name) for name in files}, base)
    plan = plan_of_data(loaded, anatomy, Tokenised(data, run.data, base.for_data()), machines, job, known)
    if isinstance(plan, SweepPlan):
        plan = with_choice(plan, standing_choice(spec.resources.compile, known.choice))
    plan = record_base(plan.model_copy(update={"base_sha256": base_sha256}), base)
    with output_to(run.plan, remedy=WRITABLE):
        write_json(run.plan, plan)
    defaulted = [("default_section", loaded.defaulted)] if loaded.defaulted else []
    _report(run, view, [*defaulted, *(("warning", warning) for warning in plan.warnings)])
    return Prepared(spec, run, anatomy, data, plan)


def base_of(loaded: LoadedSpec, output: Path | None) -> Base:
    """Return the base of a spec's run. A hub id means the commit with which the run began, if it did.

    Raises:
        BaseError: there is no such folder or repository.
    """
    return _base_in(output_root(loaded, output).path / loaded.spec.name, loaded)


def _base_in(run_folder: Path, loaded: LoadedSpec) -> Base:
    base = loaded.spec.base
    return locate_base(base, loaded.folder, recorded_commit(run_folder, base.model, base.revision), run_folder)


def _claim_base(loaded: LoadedSpec, base: Base, run: RunDirectory, view: RunView, *, finished: bool) -> tuple[ModelAnatomy, str]:
    """Read the base, fetch it where it is not on this machine, record it as the run's, and return its hash."""
    task = loaded.spec.task
    if base.cached is None and finished:
        # A finished run is only shown: its base is not fetched again.
        return read_anatomy(base.for_plan(), need_weights=True, task=task), read_record(run.plan, RunPlan).base_sha256
    if base.cached is None:
        # What can be rejected without the weights is rejected before they are fetched.
        read_anatomy(base.for_plan(), need_weights=True, task=task)
        check_first_rows(loaded)

    def tell(message: str) -> None:
        view.phase("base", message)
        run.event("base_fetched", message=message)

    anatomy = read_anatomy(base.for_training(tell), need_weights=True, task=task)
    return anatomy, run.claim_base(base_identity(Path(anatomy.folder), anatomy.weight_files), _hub_record(loaded.spec, base))


def _hub_record(spec: JobSpec, base: Base) -> dict[str, str] | None:
    if base.commit is None:
        return None
    return {"id": spec.base.model, "revision": spec.base.revision or "", "commit": base.commit.sha}


class KnownRun(NamedTuple):
    """Decisions and measurements of earlier submissions of a run that its plan depends on."""

    plan: RunPlan | None = None
    scores: LayerScores | None = None
    """Scores of the blocks, or the record that scoring failed."""
    choice: CompileChoice | None = None
    """The decision whether trials train with compiled blocks; None where it is not made yet."""


def _read_known(run: RunDirectory, base: Path, base_sha256: str) -> KnownRun:
    """Read what is known of a run, whose base model must be the one that it was planned for.

    Raises:
        RunConflictError: it is another base model.
    """
    plan = read_record(run.plan, RunPlan) if run.plan.exists() else None
    if plan is not None and plan.base_sha256 not in ("", base_sha256):
        raise RunConflictError(
            "the base's folder holds another base than when this run was planned",
            where=str(base),
            remedy="restore the base, or choose another `name`; nothing was overwritten",
        )
    return KnownRun(plan, read_scores(run), read_choice(run))


def _report(run: RunDirectory, view: RunView, notices: Sequence[tuple[str, str]]) -> None:
    """Report (kind, message) notices, one line each, to the view and to events.jsonl."""
    for kind, message in notices:
        view.event(kind, message)
        run.event(kind, message=message)


class Tokenised(NamedTuple):
    """The data of a run, and where `prepare_data` wrote the sets."""

    summary: DataSummary
    folder: Path
    tokenizer: Path
    """Folder of the base with its tokenizer; the anatomy may come from one with headers alone."""


def plan_of_data(
    loaded: LoadedSpec, anatomy: ModelAnatomy, data: Tokenised, machines: ClusterDescription, job: Job, known: KnownRun
) -> RunPlan:
    """Make the exact plan of a job. A resumed run keeps the steps of its first plan, whatever cluster it is on now.

    Raises:
        SelectionError: a layer policy does not fit the base.
        PlanError: it does not fit the cluster.
    """
    spec, sha256 = loaded.spec, spec_sha256(loaded.spec, job)
    before = known.plan.data if known.plan is not None and known.plan.data.tokens_per_step else None
    # Trials of a resumed run were trained with the padding of its first plan.
    padding = known.plan.base.padding if known.plan is not None else padding_of(spec, anatomy, data)
    planned = StepSize(before.tokens_per_step, before.step_ranks) if before is not None else None

    def sized(step: StepSize | None) -> DataSize:
        size = data_size(data.summary, spec, data.folder, planned=step)
        return size.model_copy(update={"padding": padding})

    size, resize = sized(planned), None if before else sized
    return make_plan(loaded, anatomy, size, machines, job=job, spec_sha256=sha256, scores=known.scores, resize=resize)


def _pooled(anatomy: ModelAnatomy, spec: JobSpec, known: RunPlan | None) -> ModelAnatomy:
    """Return the anatomy with what a classifier reads: as the trials of a resumed run do, else as `pooled_for` decides."""
    return with_pooling(anatomy, known.base.pooling) if known is not None else pooled_for(anatomy, spec)


def padding_of(spec: JobSpec, anatomy: ModelAnatomy, data: Tokenised) -> Padding | None:
    """Choose the padding token of a classifier, and prove that transformers then reads the class where training does.

    Raises:
        BaseError: no token can pad these texts, or transformers would read another position.
    """
    if not spec.traits.head.is_new:
        return None
    sets = [TokenizedSet.load(data.folder / f"{name}.npz") for name in ("train", "eval", "test")]
    padding = choose_padding(data.tokenizer, spec.data, sets, fixed=anatomy.kind == "encoder", rows=anatomy.vocab_size)
    if anatomy.kind == "decoder" and anatomy.pooling.by_class:
        odd = odd_documents(load_tokenizer(data.tokenizer), escape=spec.data.special_tokens_in_text == "escape")
        longest = [each.document(int(each.lengths.argmax()))[0].tolist() for each in sets]
        check_pooled_position(anatomy, padding, [*odd, *longest])
    return padding


def read_scores(run: RunDirectory) -> LayerScores | None:
    """Read the scores of the blocks, or that scoring failed; None where they are not scored yet."""
    return read_record(run.layer_scores, LayerScores) if run.layer_scores.exists() else None


def read_choice(run: RunDirectory) -> CompileChoice | None:
    """Read whether the trials train with compiled blocks; None where that is not decided yet."""
    return read_record(run.compile_choice, CompileChoice) if run.compile_choice.exists() else None


def require_metric(loaded: LoadedSpec) -> None:
    """Import the search's metric where it is a user's own function, from the path that the workers use too.

    Raises:
        UsageError: there is no such module or function.
    """
    assert loaded.spec.search is not None
    # Ray puts the driver's folder on its workers' path; a console script does not have it on its own.
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        text_metric(loaded.spec.search.metric)
    except UsageError as error:
        error.where = loaded.where("search.metric")
        raise
    finally:
        if added:
            sys.path.remove(here)


def reopen(run_folder: Path) -> Prepared:
    """Open a run that was prepared before, by its own folder.

    Raises:
        UsageError: the folder holds no planned run.
        BaseError: the base model is no longer where the plan says.
        RunConflictError: another driver is running it, or the base's folder holds another base model now.
    """
    if not RunFolder(run_folder).plan.exists():
        raise UsageError("no planned run", where=str(run_folder), expected="a folder with plan.json, as a sweep leaves it")
    run = RunDirectory.reopen(run_folder)
    try:
        plan = read_record(run.plan, RunPlan)
        spec = _recorded_spec(run)
        base = located(plan.base)
        use_own_code(Path(plan.base.folder), plan.base.code_sha256)
        anatomy = read_anatomy(base.for_training(_silent), need_weights=True, task=plan.base.task)
        anatomy = with_pooling(anatomy, plan.base.pooling)
        run.claim_base(base_identity(Path(anatomy.folder), anatomy.weight_files), _hub_record(spec, base))
        data = read_record(run.data_summary, DataSummary)
    except BaseException:
        run.close()
        raise
    return Prepared(spec, run, anatomy, data, plan)


def _silent(message: str) -> None:
    """Take a message that nobody is there to read."""


def _recorded_spec(run: RunDirectory) -> JobSpec:
    try:
        return JobSpec.model_validate(run.identity["values"])
    except ValidationError as error:
        what = f"no spec: {error.errors()[0]['msg']}"
        raise IntegrityError(what, where=str(run.identity_file), remedy=RECORD_REMEDY) from None


@dataclass(frozen=True)
class Rehearsal:
    """The state from which a submission would start."""

    plan: RunPlan
    data: DataSummary
    run_folder: Path
    would: str
    """`start a new run`, `continue an interrupted run`, ..."""


def rehearse(loaded: LoadedSpec, job: Job, *, output: Path | None = None, cluster: Callable[[], ClusterDescription]) -> Rehearsal:
    """Check everything that a job checks before it starts: spec, output, base, data, plan. The data is tokenised in a temporary
    folder.

    Args:
        cluster: Describes the cluster on which it would run; called once the input has been checked.

    Raises:
        SpecError, BaseError, SelectionError, DataError, UsageError: the input cannot be used.
        RunConflictError: the run's folder holds another run, or trained another base or other data.
        PlanError: it does not fit.
    """
    loaded = with_section(loaded, job, lambda: base_of(loaded, output).anatomy(loaded.spec.task))
    if job == "sweep":
        require_metric(loaded)
    sha256 = spec_sha256(loaded.spec, job)
    run_folder = output_root(loaded, output).path / loaded.spec.name
    known = is_same_run(run_folder, loaded, sha256)
    base = base_of(loaded, output)
    anatomy = read_anatomy(base.for_plan(), need_weights=True, task=loaded.spec.task)
    # A commit of the hub is the same by its name, and its weights need not be here.
    if known and base.commit is None:
        require_same_base(run_folder, base_identity(Path(anatomy.folder), anatomy.weight_files))
    run = RunFolder(run_folder)
    planned = _read(run.plan, RunPlan) if known else None
    anatomy = _pooled(anatomy, loaded.spec, planned)
    with tempfile.TemporaryDirectory(prefix="orchestrator-data-") as folder:
        data = prepare_data(loaded, base.for_data(), Path(folder), anatomy=anatomy)
        before = _read(run.data_summary, DataSummary) if planned is not None else None
        if before is not None and _hashes(before) != _hashes(data):
            what = "the data has changed since this run began"
            raise RunConflictError(what, where=str(run_folder), remedy="put it back, or choose another `name`")
        plan = plan_of_data(loaded, anatomy, Tokenised(data, Path(folder), base.for_data()), cluster(), job, KnownRun(planned))
    return Rehearsal(record_base(plan, base), data, run_folder, _would(run_folder, known))


def _hashes(data: DataSummary) -> dict[str, str]:
    return {name: part.sha256 for name, part in data.splits.items()}


def _read(path: Path, kind: type[Record]) -> Record | None:
    """Return a record of the run; None if it is missing or damaged (a submission would set a damaged one aside)."""
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
