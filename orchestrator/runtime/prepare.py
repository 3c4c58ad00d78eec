"""From a spec to a plan: everything that is decided before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.anatomy import LayerSelection, ModelAnatomy, read_anatomy, resolve_base
from orchestrator.data import DataSummary, data_size, prepare_data
from orchestrator.errors import UsageError
from orchestrator.plan import make_assignment, make_plan, steps
from orchestrator.plan.compilation import CompileChoice
from orchestrator.plan.compiling import standing_choice, with_choice
from orchestrator.plan.scored import LayerScores
from orchestrator.plan.steps import StepSize
from orchestrator.plan.values import Assignment, ClusterDescription, DataPaths, RunPlan, TrainSettings, TrialSpec
from orchestrator.runtime.places import output_root
from orchestrator.runtime.scoring import Scoring
from orchestrator.spec import JobSpec, LoadedSpec, spec_sha256
from orchestrator.store import RunDirectory, read_json, sampled_sha256, write_json
from orchestrator.train.evaluation import text_metric
from orchestrator.transfer.view import RunView

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

    def assignment(self, trial: TrialSpec, selection: LayerSelection, *, folder: Path, stop_step: int, **how: Any) -> Assignment:
        """From step 0, outside the search; `how` as in `make_assignment`."""
        return make_assignment(
            self.plan,
            trial,
            selection,
            settings=self.settings,
            data=self.data_paths,
            metric=self.scoring.metric,
            folder=str(folder),
            rung=0,
            start=None,
            stop_step=stop_step,
            **how,
        )

    @property
    def scoring(self) -> Scoring:
        search = self.spec.search
        if search is None or self.plan.search is None:
            return Scoring(metric="loss", max_forgetting=float("inf"))
        return Scoring(metric=search.metric, max_forgetting=search.max_forgetting, patience=self.plan.search.patience)


def open_run(loaded: LoadedSpec, job: Job, output: Path | None, view: RunView) -> RunDirectory:
    """The run's folder under `output`, or under the spec's, locked.

    Raises:
        RunConflictError: it holds another run, or another driver works in it.
    """
    root = output_root(loaded, output)
    run = RunDirectory.open(root.path, loaded.spec.name, loaded, spec_sha256(loaded.spec, job))
    if root.moved:
        view.event("output_moved", root.moved)
        run.event("output_moved", message=root.moved)
    return run


def prepare(
    loaded: LoadedSpec, job: Job, run: RunDirectory, view: RunView, cluster: Callable[[], ClusterDescription] | None
) -> Prepared:
    """Read the base, tokenise, plan; write plan.json.

    Args:
        cluster: Describes the cluster; called once the input has been found good, so that a bad one starts nothing.
            None for a run that has come to its end: its plan stands.

    Raises:
        BaseError, SelectionError, DataError: the input cannot be used.
        UsageError: the search's metric cannot be imported.
        RunConflictError: base or data are not what earlier trials of this run were trained on.
        PlanError: it does not fit the cluster.
    """
    spec = loaded.spec
    if job == "sweep" and cluster is not None:
        _require_metric(loaded)
    anatomy = read_anatomy(resolve_base(spec.base.model, loaded.folder), need_weights=True)
    run.claim_base(_identity_of(anatomy))
    known = RunPlan.model_validate(read_json(run.plan)) if run.plan.exists() else None
    view.phase("data")
    data = prepare_data(loaded, Path(anatomy.folder), run.data, keep=known is not None)
    before = known.data if known is not None and known.data.tokens_per_step else None
    size = data_size(data, spec, run.data, planned=StepSize(before.tokens_per_step, before.step_ranks) if before else None)
    if cluster is None:
        assert known is not None, "a run that ended was planned"
        return Prepared(spec, run, anatomy, data, known)
    sha256, scores = spec_sha256(spec, job), read_scores(run)
    resize = None if before else lambda step: data_size(data, spec, run.data, planned=step)
    plan = make_plan(loaded, anatomy, size, cluster(), job=job, spec_sha256=sha256, scores=scores, resize=resize)
    if plan.search is not None:
        plan = with_choice(plan, standing_choice(spec.resources.compile, read_choice(run)))
    write_json(run.plan, plan)
    if loaded.defaulted:
        view.event("default_section", loaded.defaulted)
        run.event("default_section", message=loaded.defaulted)
    for warning in plan.warnings:
        view.event("warning", warning)
        run.event("warning", message=warning)
    return Prepared(spec, run, anatomy, data, plan)


def read_scores(run: RunDirectory) -> LayerScores | None:
    """What the run's probe found, once it has been; also that it failed."""
    return LayerScores.model_validate(read_json(run.layer_scores)) if run.layer_scores.exists() else None


def read_choice(run: RunDirectory) -> CompileChoice | None:
    """Whether the run's trials train with compiled blocks, once that is settled."""
    return CompileChoice.model_validate(read_json(run.compile_choice)) if run.compile_choice.exists() else None


def _require_metric(loaded: LoadedSpec) -> None:
    """Import the search's metric where it is a user's own function, from where the workers import it too.

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
    """A run that was prepared before, from its own folder.

    Raises:
        UsageError: the folder holds no planned run.
        BaseError: the base is no longer where the plan says.
        RunConflictError: a driver works in it, or the base's folder holds another base now.
    """
    if not (run_folder / "plan.json").exists():
        raise UsageError("no planned run", where=str(run_folder), expected="a folder with plan.json, as a sweep leaves it")
    run = RunDirectory.reopen(run_folder)
    try:
        plan = RunPlan.model_validate(read_json(run.plan))
        spec = JobSpec.model_validate(run.identity["values"])
        anatomy = read_anatomy(Path(plan.base.folder), need_weights=True)
        run.claim_base(_identity_of(anatomy))
        data = DataSummary.model_validate(read_json(run.data / "summary.json"))
    except BaseException:
        run.close()
        raise
    return Prepared(spec, run, anatomy, data, plan)


def _identity_of(anatomy: ModelAnatomy) -> dict[str, Any]:
    """The base's config, and what its weight files hold; folders and times are left out, for copies are the same base."""
    folder = Path(anatomy.folder)
    files = sorted({tensor.file for tensor in anatomy.tensors.values()})
    return {
        "config": read_json(folder / "config.json"),
        "weights": {file: f"{(folder / file).stat().st_size} bytes, {sampled_sha256(folder / file)[:16]}" for file in files},
    }
