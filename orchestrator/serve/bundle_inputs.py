"""What the end of a run hands over: everything about the promoted trial that is known before it is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.values import Value
from orchestrator.work.execution import BaseLoad
from orchestrator.work.trial import TrialSpec


class BundleInputs(Value):
    """The promoted trial, its base and its data. Folders and files are paths of this machine."""

    name: str
    """The run's name."""
    base_name: str
    """`base.model` as the spec gives it."""
    base: BaseLoad
    base_sha256: str = ""
    """`RunPlan.base_sha256`; empty where the run does not know it."""
    anatomy: ModelAnatomy
    trial: TrialSpec
    selection: LayerSelection
    artifact: str
    """The rung or checkpoint that holds `adapter/` or `delta/`."""
    step: int | None = None
    """At which it was taken; None: at the trial's last."""
    held_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """`ExecutionPlan.dtype`: what training computed in."""
    merge_into: Literal["auto", "original"] = "auto"
    train_set: str
    eval_set: str
    """Verification takes its held-out documents from here, so that the test set is read once."""
    test_set: str
    retain_set: str | None = None
    controls: dict[str, str] = {}
    failed_seeds: int = 0
    """Control (`head`, `shuffled`, `repeat-2`) -> the folder that holds its adapter or delta."""
    shots: int = 0
    """Examples in the prompts of the control `k_shot`; 0: it was not asked for."""
    separator: str = "\n"
    """`data.separator`: stands between prompt and completion."""
    data_sha256: str
    """`DataSummary.inputs_sha256`."""
    spec: dict[str, object] = {}
    """The resolved spec; paths outside the run lose their folders in the bundle."""


def shown_base(name: str) -> str:
    """A base's name without the folders it lies in on this machine."""
    path = Path(name)
    return path.name if path.is_absolute() or name.startswith((".", "~")) else name
