"""The work that a gang is given, as a union: train a rung, evaluate the base, or make one of three measurements.

Each kind has the fields that it needs and no others; what all work of a run shares is one `WorkContext`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field

from orchestrator.anatomy.values import LayerSelection
from orchestrator.spec.adapters import PLAIN_LORA
from orchestrator.values import Value, content_hash
from orchestrator.work.execution import DataPaths, ExecutionPlan, TrainSettings, TrunkPlan
from orchestrator.work.failure import Failure
from orchestrator.work.measurements import CompilePlan, CompileTimes, DomainShift, LayerScores, ProbePlan, ShiftPlan
from orchestrator.work.results import MeasurementResult, RungResult
from orchestrator.work.trial import TrialSpec


class WorkContext(Value):
    """The fields that all work for one kind of gang in a run shares."""

    settings: TrainSettings
    data: DataPaths
    metric: str
    trunk: TrunkPlan | None = None
    """The trunk planned for the run; not all work reads it (see the `trunk` of each kind)."""
    largest_memory_bytes: int | None = None
    """Planned memory of a rank for the largest trial of the run, to which the gang's processes may still grow."""
    num_gangs: int = 1
    """Upper bound on the gangs that share a node's memory."""
    spec_sha256: str = ""
    """Hash of the run's spec and, below, of its base, for the manifests of written files; empty if unknown."""
    base_sha256: str = ""


class GangWork(Value):
    """The fields of every kind of work: its context and its execution (a smaller one than planned after running out of
    memory)."""

    context: WorkContext
    execution: ExecutionPlan

    @property
    def settings(self) -> TrainSettings:
        return self.context.settings

    @property
    def data(self) -> DataPaths:
        return self.context.data


class TrialWork(GangWork):
    """Work on a trial of the ledger. Its answer is a `RungResult`."""

    trial: TrialSpec
    selection: LayerSelection
    folder: str
    """The trial's folder: steps.jsonl and rung-<n>/ are written here."""
    rung: int = 0
    predicted_memory_bytes: int | None = None
    """Planned memory of a rank for this work; None if the plan has no figure."""

    @property
    def work_id(self) -> str:
        """Return the name of the work in events and results."""
        return self.trial.trial_id

    @property
    def metric(self) -> str:
        return self.context.metric

    @property
    def largest_memory_bytes(self) -> int | None:
        return self.context.largest_memory_bytes

    @property
    def num_gangs(self) -> int:
        return self.context.num_gangs

    def failed(self, failure: Failure) -> RungResult:
        """Return the failed result of work that no gang finished."""
        return RungResult(trial_id=self.trial.trial_id, rung=self.rung, step=0, tokens=0, state="failed", failure=failure)


class TrainRung(TrialWork):
    """Train a trial from `start` up to and including `stop_step`, evaluate it and save the rung."""

    kind: Literal["train_rung"] = "train_rung"
    start: str | None = None
    """Folder of the rung or checkpoint to continue from; None starts at step 0."""
    stop_step: int
    keep_optimizer: bool = True
    """True if the trial may be continued from the checkpoint written at the end."""
    checkpoint_every_steps: int = 0
    """0: only at the end. The refit checkpoints in between."""
    evaluate: bool = True

    @property
    def trunk(self) -> TrunkPlan | None:
        """Return the activations that the trial may start from; a model with random weights has other activations."""
        return None if self.trial.control == "scratch" else self.context.trunk


class EvaluateBase(TrialWork):
    """Evaluate the base model, the control `none`; for a classifier that is the class prior."""

    kind: Literal["evaluate_base"] = "evaluate_base"

    @property
    def trunk(self) -> TrunkPlan | None:
        """Return None: the base is scored by its own forward pass."""
        return None


class MeasuringWork(GangWork):
    """A measurement before the search. It is not a trial and not in the ledger. Its answer is a `MeasurementResult`."""

    NAME: ClassVar[str]
    seed: int

    @property
    def work_id(self) -> str:
        """Return the name of the work in events and results."""
        return self.NAME


class ScoreBlocks(MeasuringWork):
    """Score the blocks of the base by their gradients."""

    NAME: ClassVar[str] = "probe"
    kind: Literal["score_blocks"] = "score_blocks"
    plan: ProbePlan

    @property
    def trunk(self) -> TrunkPlan | None:
        """Return None: the probe runs through every block."""
        return None

    def failed(self, failure: Failure) -> MeasurementResult:
        """Return the result where there are no scores."""
        return MeasurementResult(work_id=self.work_id, found=LayerScores(failed=str(failure)))


class MeasureShift(MeasuringWork):
    """Measure how far the target lies from the retention set in the base's own activations."""

    NAME: ClassVar[str] = "shift"
    kind: Literal["measure_shift"] = "measure_shift"
    plan: ShiftPlan

    @property
    def trunk(self) -> TrunkPlan | None:
        """Return the run's trunk: stored activations are compared without another forward pass."""
        return self.context.trunk

    def failed(self, failure: Failure) -> MeasurementResult:
        """Return the result where there are no distances."""
        return MeasurementResult(work_id=self.work_id, found=DomainShift(failed=str(failure)))


class TimeCompiling(MeasuringWork):
    """Time the first micro-batch of a trial of the search with and without compiled blocks."""

    NAME: ClassVar[str] = "compile"
    kind: Literal["time_compiling"] = "time_compiling"
    plan: CompilePlan
    trial: TrialSpec
    """A trial of the choice that is timed, as the search would train it."""
    selection: LayerSelection

    @property
    def trunk(self) -> TrunkPlan | None:
        return self.context.trunk

    def failed(self, failure: Failure) -> MeasurementResult:
        """Return the result where there are no times."""
        return MeasurementResult(work_id=self.work_id, found=CompileTimes(failed=str(failure)))


Measurement = Annotated[ScoreBlocks | MeasureShift | TimeCompiling, Field(discriminator="kind")]
Work = Annotated[TrainRung | EvaluateBase | ScoreBlocks | MeasureShift | TimeCompiling, Field(discriminator="kind")]
"""Every kind of work that a gang may be given."""


OF = {"spec_sha256": "spec", "base_sha256": "base"}
"""Hashes that a manifest may contain in addition to the trial's, with the object that each identifies."""


def ownership(trial: TrialSpec, spec_sha256: str = "", base_sha256: str = "") -> dict[str, object]:
    """Return the fields of a manifest that name the owner of a folder."""
    # Trials of older versions have no options of adapters: those of plain LoRA are left out, so that their hash does not change.
    values = trial.model_dump(mode="json", exclude={"adapter"} if trial.adapter == PLAIN_LORA else None)
    hashes = {"spec_sha256": spec_sha256, "base_sha256": base_sha256}
    return {"trial": values, "trial_sha256": content_hash(values), **{name: value for name, value in hashes.items() if value}}


def owner_of(assignment: TrialWork) -> dict[str, object]:
    """Return the `ownership` of the folders that an assignment writes."""
    return ownership(assignment.trial, assignment.context.spec_sha256, assignment.context.base_sha256)


def contradiction(about: Mapping[str, object], own: Mapping[str, object]) -> str:
    """Return why a folder has another owner, to follow "rung-0 is "; empty if its manifest does not contradict `own`.

    A manifest of an older version may name fewer hashes or none; missing ones are not contradictions.

    Args:
        about: The contents of the folder's manifest.
        own: The result of `owner_of`.
    """
    found, wanted = about.get("trial"), own.get("trial")
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        theirs, ours = cast("Mapping[str, Any]", found), cast("Mapping[str, Any]", wanted)
        if theirs.get("trial_id", ours.get("trial_id")) != ours.get("trial_id"):
            return f"that of trial {theirs.get('trial_id')}"
        for name in ours.keys() & theirs.keys():
            if theirs[name] != ours[name]:
                return f"of another trial with this id: {name} is {theirs[name]!r} there and {ours[name]!r} here"
    for name, what in OF.items():
        if about.get(name) and own.get(name) and about[name] != own[name]:
            return f"made for another {what}"
    return ""
