"""What a gang receives: one trial to train up to a step, or one measurement, and who owns the checkpoints written for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from orchestrator.anatomy.values import LayerSelection
from orchestrator.values import Value, content_hash
from orchestrator.work.execution import DataPaths, ExecutionPlan, TrainSettings, TrunkPlan
from orchestrator.work.measurements import CompilePlan, ProbePlan, ShiftPlan
from orchestrator.work.trial import TrialSpec


class Assignment(Value):
    """All that a gang receives: carry this trial from `start` to `stop_step`, evaluate, save."""

    trial: TrialSpec
    selection: LayerSelection
    execution: ExecutionPlan
    settings: TrainSettings
    data: DataPaths
    metric: str
    folder: str
    """The trial's folder: steps.jsonl and rung-<n>/ are written here."""
    rung: int
    start: str | None = None
    """Folder of the rung or checkpoint to continue from; None starts at step 0."""
    stop_step: int
    """Train up to and including this step; 0 only evaluates."""
    keep_optimizer: bool = True
    """Whether the trial may be continued from the checkpoint written at the end."""
    checkpoint_every_steps: int = 0
    """0: only at the end. The refit checkpoints in between."""
    evaluate: bool = True
    trunk: TrunkPlan | None = None
    predicted_memory_bytes: int | None = None
    """What the plan expects a rank to use for it; None where the plan has no figure."""
    largest_memory_bytes: int | None = None
    """Likewise, for any trial of the run: what its gang may still grow to."""
    num_gangs: int = 1
    """Of the run: at most so many share a node's memory."""
    probe: ProbePlan | None = None
    """Score the blocks and train nothing."""
    shift: ShiftPlan | None = None
    """Measure how far the target lies from the retention set, and train nothing."""
    compiling: CompilePlan | None = None
    """Measure what compiled blocks gain and train nothing."""
    spec_sha256: str = ""
    """Of the run's spec and of its base, for the manifests of what is written; empty where nobody knows."""
    base_sha256: str = ""

    @property
    def measures(self) -> bool:
        """Whether it is no trial: nothing of it stands in the record of trials."""
        return self.probe is not None or self.compiling is not None or self.shift is not None


OF = {"spec_sha256": "spec", "base_sha256": "base"}
"""Hashes that a manifest may hold beside the trial, and what they are of."""


def ownership(trial: TrialSpec, spec_sha256: str = "", base_sha256: str = "") -> dict[str, object]:
    """What a manifest says of whose the folder is."""
    values = trial.model_dump(mode="json")
    hashes = {"spec_sha256": spec_sha256, "base_sha256": base_sha256}
    return {"trial": values, "trial_sha256": content_hash(values), **{name: value for name, value in hashes.items() if value}}


def owner_of(assignment: Assignment) -> dict[str, object]:
    """As `ownership`, of what an assignment writes."""
    return ownership(assignment.trial, assignment.spec_sha256, assignment.base_sha256)


def contradiction(about: Mapping[str, object], own: Mapping[str, object]) -> str:
    """Why a folder is not one's own, after "rung-0 is "; empty where its manifest does not contradict.

    A manifest of an older version names nothing or less, and what it leaves out is not held against it.

    Args:
        about: Of the folder's manifest.
        own: As `owner_of` says.
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
