"""Inputs of the bundle: everything known about the promoted trial before it is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.bases import folder_on_this_node
from orchestrator.spec.models import ExtraTensors
from orchestrator.values import Value
from orchestrator.work.execution import BaseLoad
from orchestrator.work.trial import TrialSpec


class BundleInputs(Value):
    """Promoted trial, its base and its data. Folders and files are paths of this machine."""

    name: str
    """The run's name."""
    base_name: str
    """`base.model` as in the spec."""
    base: BaseLoad
    base_sha256: str = ""
    """`RunPlan.base_sha256`; empty if the run does not have it."""
    anatomy: ModelAnatomy
    trial: TrialSpec
    selection: LayerSelection
    artifact: str
    """Rung or checkpoint that holds `adapter/` or `delta/`."""
    step: int | None = None
    """Step of the artifact; None for the trial's last."""
    held_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """`ExecutionPlan.dtype`: compute type of training."""
    merge_into: Literal["auto", "original"] = "auto"
    extra_tensors: ExtraTensors = "keep"
    """`base.extra_tensors`."""
    train_set: str
    eval_set: str
    """Set with the documents for verification, so that the test set is read only once."""
    test_set: str
    retain_set: str | None = None
    controls: dict[str, str] = {}
    """Control (`head`, `shuffled`, `repeat-2`) -> folder that holds its adapter or delta."""
    repeat_seeds: dict[str, int] = {}
    """Seed of each control among `controls` that is the same training from another seed."""
    failed_seeds: int = 0
    """Seeds for which the same training failed."""
    shots: int = 0
    """Examples in the prompts of the control `k_shot`; 0 if it was not requested."""
    separator: str = "\n"
    """`data.separator`, between prompt and completion."""
    data_sha256: str
    """`DataSummary.inputs_sha256`."""
    spec: dict[str, object] = {}
    """Resolved spec; absolute paths are shortened to their last part in the bundle."""

    def on_this_node(self) -> BundleInputs:
        """Return the inputs with the base's folder on this node: of a base from the hub each node has its own copy."""
        folder = str(folder_on_this_node(self.base))
        base, anatomy = (value.model_copy(update={"folder": folder}) for value in (self.base, self.anatomy))
        return self.model_copy(update={"base": base, "anatomy": anatomy})


def base_label(name: str) -> str:
    """Return a base's name without its folders on this machine."""
    path = Path(name)
    return path.name if path.is_absolute() or name.startswith((".", "~")) else name
