"""Whether a sweep's controls fit the gangs that its trials need."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.anatomy import ModelAnatomy, select_everything
from orchestrator.plan.ladder import Load, RankRoom, misfit
from orchestrator.plan.memory.estimate import estimate
from orchestrator.plan.memory.footprint import Footprint, weigh
from orchestrator.plan.memory.way import Way
from orchestrator.plan.values import RunPlan
from orchestrator.spec.models import JobSpec


def head_warnings(head: Footprint, way: Way, load: Load, room: RankRoom) -> tuple[str, ...]:
    """What to hear where the control `head` fits in no way that its gang can come down to."""
    reason = misfit(_smallest(way), replace(load, footprints=(head,)), room)
    said = "the control `head` will run out of memory, and trials will be compared with the base model only"
    return () if reason is None else (f"{said}: it {reason}",)


def with_scratch(plan: RunPlan, spec: JobSpec, anatomy: ModelAnatomy, way: Way, load: Load, room: RankRoom) -> RunPlan:
    """The plan with the memory of the control `scratch` where it was asked for; left out, with a warning, where it cannot be
    trained by the gangs that the trials need."""
    if spec.search is None or plan.search is None or "scratch" not in spec.search.controls:
        return plan
    selection = select_everything(anatomy, task=plan.base.task, num_classes=plan.base.num_classes)
    element_bytes = 2 if plan.execution.dtype == "bfloat16" else 4
    footprint = weigh(anatomy, selection, spec.base.quantize, element_bytes, num_classes=plan.base.num_classes)
    reason = misfit(_smallest(way), replace(load, footprints=(footprint,)), room)
    if way.executor == "deepspeed" and way.zero_stage == 3:
        reason = "it cannot be initialised where each rank holds only a shard of the base (ZeRO-3)"
    if reason is not None:
        said = f"the control `scratch` is left out: training everything {reason}"
        return plan.model_copy(update={"warnings": (*plan.warnings, said)})
    return plan.model_copy(update={"scratch_memory": estimate(footprint, way).device})


def _smallest(way: Way) -> Way:
    """What a gang comes down to by itself when memory runs out."""
    return replace(way, micro_batch_rows=1, checkpointing=True)
