"""What a plan says beside its numbers: how they follow, what to know, and what to hear before a run."""

from __future__ import annotations

import math
from collections.abc import Iterator

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.plan.curve import too_few_documents
from orchestrator.plan.estimates import Rate
from orchestrator.plan.memory.estimate import RESIDENT_SHARE
from orchestrator.plan.placement import Machines, idle_gpus
from orchestrator.plan.remedies import left_out
from orchestrator.plan.step_size import auto_tokens_per_step, few_steps_sentence, more_steps
from orchestrator.plan.values import ClusterDescription, RunPlan
from orchestrator.plan.view import derivations
from orchestrator.spec.models import AnchorSpec, JobSpec
from orchestrator.units import format_bytes


def with_remarks(plan: RunPlan, spec: JobSpec, anatomy: ModelAnatomy, found: Machines, cluster: ClusterDescription) -> RunPlan:
    """The plan with reasons and warnings, and more notes."""
    return plan.model_copy(
        update={
            "reasons": (*derivations(plan, spec), *_threads(plan, found)),
            "notes": (*plan.notes, *_base_notes(spec, anatomy), *_anchor_notes(plan, spec), *_notes(plan, spec, found, cluster)),
            "warnings": (*_base_warnings(anatomy), *plan.warnings, *_warnings(plan, spec, found, cluster)),
        }
    )


def _threads(plan: RunPlan, found: Machines) -> Iterator[str]:
    """Where the environment gives a rank fewer threads than its part of the cores."""
    own, part = plan.execution.threads_per_rank, found.threads_of_cores(plan.execution.ranks * plan.num_gangs)
    if own < part:
        count = "1 thread" if own == 1 else f"{own} threads"
        yield f"{count} a rank, as OMP_NUM_THREADS={found.max_threads} says; its share of the cores would be {part}"


def _base_warnings(anatomy: ModelAnatomy) -> Iterator[str]:
    if anatomy.plan_only:
        yield f"a base of type {anatomy.model_type} can be planned but not trained: {anatomy.plan_only}"


def _base_notes(spec: JobSpec, anatomy: ModelAnatomy) -> Iterator[str]:
    if anatomy.experts is None:
        return
    yield "LoRA adapts the attention (and shared experts): routed experts are stacked in one tensor, which it leaves frozen"
    if spec.base.quantize != "none":
        stacked = sum(anatomy.tensors[name].num_elements for block in anatomy.stacked for name in block)
        share = stacked / anatomy.num_parameters()
        yield (
            f"{spec.base.quantize} leaves routed experts, {share:.0%} of the parameters, in 16 bit: it quantizes "
            "linear layers only"
        )


def rate_note(rate: Rate) -> str:
    """What hours rest on."""
    if rate.flops is None or rate.peak_flops is None:
        return f"no GPU-hours: the peak rate of {rate.device} is not in the table"
    if rate.device == "core":
        return f"hours count arithmetic only, at {rate.flops / 1e9:.0f} GFLOP/s a core"
    found = "measured in the first steps" if rate.calibrated else "assumed"
    return (
        f"hours assume {rate.achieved_share:.0%} ({found}) of {rate.peak_flops / 1e12:.0f} TFLOP/s of each GPU, and no time "
        "for starting or saving"
    )


def _hours_warning(plan: RunPlan, allowed: float | None) -> Iterator[str]:
    """A sweep that would pass its hours says so before."""
    cost = plan.cost
    if allowed is None or plan.search is None or cost is None or cost.gpu_hours is None or cost.gpu_hours <= allowed:
        return
    fit, count = trials_within(plan, allowed), plan.search.num_trials
    most = "not even the controls and one trial fit" if fit < 1 else f"about {fit} of its {count} trials fit"
    yield (
        f"the sweep would take about {cost.gpu_hours:.3g} GPU-hours, and resources.max_gpu_hours allows {allowed:g}: {most}. It "
        "ends in order there, with the best trial so far; with fewer trials or epochs it ends by itself"
    )


def trials_within(plan: RunPlan, gpu_hours: float) -> int:
    """Trials of a sweep that fit into so many GPU-hours, beside its controls and its refit."""
    cost, search = plan.cost, plan.search
    assert cost is not None
    assert search is not None
    assert cost.gpu_hours
    of_trials = sum(part.amount for part in cost.operations if part.name in ("trials", "scoring"))
    hours_per_operation = cost.gpu_hours / sum(part.amount for part in cost.operations)
    fixed = cost.gpu_hours - of_trials * hours_per_operation
    each = of_trials * hours_per_operation / search.num_trials
    return max(0, min(search.num_trials, math.floor((gpu_hours - fixed) / each)))


def _anchor_notes(plan: RunPlan, spec: JobSpec) -> Iterator[str]:
    if plan.search is not None and spec.search is not None and isinstance(spec.train.anchor, AnchorSpec):
        for tune in left_out(spec.search, spec.train):
            yield f"the anchor {spec.train.anchor.kind} of train is left out of {tune} trials"


def _notes(plan: RunPlan, spec: JobSpec, found: Machines, cluster: ClusterDescription) -> list[str]:
    notes: list[str] = []
    if not plan.data.exact:
        notes.append("token counts are estimated from file sizes, at 4 bytes per token")
    most = spec.resources.max_gpus
    if found.device == "cuda" and most is not None and most > cluster.num_gpus:
        notes.append(f"max_gpus: {most} is an upper bound; the cluster has {cluster.num_gpus} GPUs")
    cores = sum(node.count * found.units_of(node) for node in found.nodes)
    if found.device == "cpu" and found.num_units < cores:
        notes.append(f"max_gpus: {most} bounds cores where no GPU is used: {found.num_units} of {cores} cores train")
    if found.device == "cuda" and len({node.gpu_memory_bytes for node in found.nodes}) > 1:
        notes.append("nodes have different GPUs: every rank is planned for the GPU with the least memory")
    if plan.search is not None and spec.search is not None and spec.search.algorithm != "fixed":
        points = len(spec.search.layers) * sum(len(spec.search.lora_rank) if t == "lora" else 1 for t in spec.search.tune)
        if points > len(plan.search.options):
            notes.append(f"{points} combinations give {len(plan.search.options)} different selections")
    if plan.execution.offload != "none":
        notes.append(f"offload: {plan.execution.offload}, and the hours do not include transfers over the bus: expect more")
    if plan.search is None and spec.resources.gangs not in ("auto", 1):
        notes.append("one trial runs in one gang (worker group): resources.gangs applies to sweeps only")
    return notes


def _few_steps(plan: RunPlan, spec: JobSpec) -> Iterator[str]:
    """Too few steps to learn from are the commonest reason why nothing was learned."""
    data, said = plan.data, few_steps_sentence(plan.total_steps)
    if said:
        mean = math.ceil(data.train_tokens / max(1, data.train_documents))
        longest = data.longest_document_tokens if data.exact else mean
        auto = auto_tokens_per_step(data.train_documents, data.train_tokens, longest, spec.train.epochs)
        yield f"{said}: {more_steps(spec.train, auto, data.train_tokens, data.steps_per_epoch)}"


def _warnings(plan: RunPlan, spec: JobSpec, found: Machines, cluster: ClusterDescription) -> Iterator[str]:
    yield from _few_steps(plan, spec)
    yield from _hours_warning(plan, spec.resources.max_gpu_hours)
    if found.left_out:
        counts = ", ".join(f"{node.count} x {found.name_of(node)}" for node in found.left_out)
        yield (
            f"planned without the smaller nodes ({counts}): every rank is planned for the smallest node it may run on, and with "
            "these nodes the job would not fit or would take longer. Ray does not know this: start its cluster without them"
        )
    if found.device == "cuda" and idle_gpus(cluster):
        yield (
            f"{idle_gpus(cluster)} of {cluster.num_gpus} GPUs stay idle: their nodes have too few CPUs to run a rank on each GPU"
        )
    if plan.search is not None and spec.search is not None and spec.search.learning_curve and not plan.search.curve_shares:
        yield too_few_documents(plan.data.train_documents)
    if spec.task == "classify" and spec.data.retain is not None:
        yield ("data.retain is not used: a classifier has no output projection to measure forgetting with; remove it")
    if sum(node.count for node in found.nodes) > 1:
        yield (
            f"the run's folder ({spec.output}) must lie on storage that every node sees under the same path: gangs on "
            "other nodes read its data and write trials there; the run checks it before it starts"
        )
    yield from _bundle_warnings(plan, found)


def _bundle_warnings(plan: RunPlan, found: Machines) -> Iterator[str]:
    """Where verification and the test set cannot have a GPU, since each takes the whole merged model at once."""
    whole = plan.num_parameters * (2 if plan.execution.dtype == "bfloat16" else 4)
    smallest = min(node.gpu_memory_bytes for node in found.nodes)
    if found.device == "cpu" or whole <= RESIDENT_SHARE * smallest:
        return
    host = min(node.memory_bytes for node in found.nodes)
    short = f", more than the {format_bytes(host)} of host memory: expect the disk to be the limit" if whole > host else ""
    yield (
        f"the merged model ({format_bytes(whole)}) is more than {RESIDENT_SHARE:.0%} of one GPU ({format_bytes(smallest)}): the "
        f"bundle is verified and scored on the CPU, weights mapped from their files{short}; this takes hours at the end of "
        "the run, and a smaller data.test_rows shortens it"
    )
