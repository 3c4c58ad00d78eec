"""Explain a plan in sentences: how its numbers were derived, and which notes and warnings go with it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.plan.data_size import auto_tokens_per_step, more_steps, too_few_steps_warning
from orchestrator.plan.estimates import MemoryEstimate, Rate
from orchestrator.plan.memory.estimate import RESIDENT_SHARE
from orchestrator.plan.placement import Machines, idle_gpus
from orchestrator.plan.remedies import tunes_without_anchor
from orchestrator.plan.schedule import accumulation, surviving_share, too_few_documents
from orchestrator.plan.schedule import tokens_per_step as planned_tokens_per_step
from orchestrator.plan.search_space import searched_adapters
from orchestrator.plan.values import ClusterDescription, FinetunePlan, RunPlan, SearchPlan, SweepPlan, TrialOption
from orchestrator.spec.models import AnchorSpec, JobSpec
from orchestrator.units import format_bytes, format_count
from orchestrator.work.execution import ExecutionPlan
from orchestrator.work.remedies import Remedies


def with_explanations(
    plan: RunPlan, spec: JobSpec, anatomy: ModelAnatomy, found: Machines, cluster: ClusterDescription
) -> RunPlan:
    """Return the plan with its reasons, its warnings and further notes."""
    return plan.model_copy(
        update={
            "reasons": (*derivations(plan, spec), *_threads(plan, found)),
            "notes": (*plan.notes, *_base_notes(spec, anatomy), *_anchor_notes(plan, spec), *_notes(plan, spec, found, cluster)),
            "warnings": (*_base_warnings(spec, anatomy), *plan.warnings, *_warnings(plan, spec, found, cluster)),
        }
    )


def _threads(plan: RunPlan, found: Machines) -> Iterator[str]:
    """Explain that the environment gives a rank fewer threads than its share of the cores, if it does."""
    own, part = plan.execution.threads_per_rank, found.threads_of_cores(plan.execution.ranks * plan.num_gangs)
    if own < part:
        count = "1 thread" if own == 1 else f"{own} threads"
        yield f"{count} per rank, since OMP_NUM_THREADS={found.max_threads} is set; without it a rank would have {part}"


def _base_warnings(spec: JobSpec, anatomy: ModelAnatomy) -> Iterator[str]:
    yield from anatomy.notes
    if anatomy.code_sha256:
        yield (
            f"the base's own code is run on this machine and on every rank: {', '.join(anatomy.code_files)} (SHA-256 "
            f"{anatomy.code_sha256})"
        )
    if anatomy.costs_note:
        yield (
            f"memory and operations are a lower bound: those of the blocks of {anatomy.architecture} could not be counted, and "
            f"formulas for a plain transformer stand in ({anatomy.costs_note})"
        )
    if anatomy.plan_only:
        yield f"a base of type {anatomy.model_type} can be planned but not trained: {anatomy.plan_only}"
    if anatomy.experts is not None and spec.base.quantize != "none":
        share = sum(anatomy.tensors[name].num_elements for name in anatomy.routed) / anatomy.num_parameters()
        yield (
            f"{spec.base.quantize} leaves routed experts, {share:.0%} of the parameters, in 16 bit: bitsandbytes quantizes "
            "linear layers only"
        )


WAY_NOTES = {
    "packs": "documents are not packed: each has a row of its own, in micro-batches of documents of about equal length",
    "pads": "rows are not padded: a micro-batch is one document",
    "projects": "the class's own logits are computed at every position, not at supervised ones only",
}
"""What it means that a class does not allow a way, by the name of its field in `Ways`; `plan.trunk` tells of stored states."""


def _way_notes(spec: JobSpec, anatomy: ModelAnatomy) -> Iterator[str]:
    """Explain how the base is trained where its class does not allow the usual way."""
    new_head = spec.traits.head.is_new
    for field, note in WAY_NOTES.items():
        if not getattr(anatomy.ways, field) and (field == "pads" or not new_head):
            seen = anatomy.ways.reasons.get(field)
            yield f"{note} ({seen})" if seen else note


def _base_notes(spec: JobSpec, anatomy: ModelAnatomy) -> Iterator[str]:
    if anatomy.pooling.kind != "class":
        served = "transformers' class does so too" if anatomy.pooling.by_class else "classify.py in the bundle does so too"
        yield f"{anatomy.pooling.reason}; {served}"
    yield from _way_notes(spec, anatomy)
    if anatomy.experts is None:
        return
    yield (
        "LoRA leaves routed experts frozen unless `modules` has `experts`, and routers are frozen under every policy without "
        "`+router`; trials of a mixture of experts are not batched together, which would change the last bits of their results"
    )
    if anatomy.experts.balance:
        yield (
            f"the load-balancing loss is added with a factor of {anatomy.experts.balance:g}, as the base's config says "
            "(output_router_logits); trials are compared without it"
        )


def rate_note(rate: Rate) -> str:
    """Return a note that says which rate the hours assume."""
    if rate.flops is None or rate.peak_flops is None:
        return f"GPU-hours unknown: the peak rate of {rate.device} is not in the table"
    if rate.device == "core":
        return f"hours count computing only, at {rate.flops / 1e9:.0f} GFLOP/s per core"
    found = "measured in the first steps" if rate.calibrated else "assumed"
    return (
        f"hours assume {rate.achieved_share:.0%} ({found}) of {rate.peak_flops / 1e12:.0f} TFLOP/s per GPU, and no time "
        "for starting or saving"
    )


def _hours_warning(plan: RunPlan, allowed: float | None) -> Iterator[str]:
    """Warn before a sweep that it would exceed its GPU-hours."""
    cost = plan.cost
    if allowed is None or not isinstance(plan, SweepPlan) or cost is None or cost.gpu_hours is None or cost.gpu_hours <= allowed:
        return
    fit, count = trials_within(plan, allowed), plan.search.num_trials
    most = "not even the controls and one trial fit" if fit < 1 else f"about {fit} of its {count} trials fit"
    yield (
        f"the sweep would take about {cost.gpu_hours:.3g} GPU-hours, and resources.max_gpu_hours allows {allowed:g}: {most}. It "
        "stops there with the best trial so far; fewer trials or epochs avoid this"
    )


def trials_within(plan: SweepPlan, gpu_hours: float) -> int:
    """Return how many trials of a sweep fit into a number of GPU-hours, besides its controls and its refit."""
    cost, search = plan.cost, plan.search
    assert cost is not None
    assert cost.gpu_hours
    # Only these items grow with the number of trials; controls, follow-up trials and the refit are trained once.
    of_trials = sum(part.amount for part in cost.operations if part.name in ("trials", "scoring"))
    hours_per_operation = cost.gpu_hours / sum(part.amount for part in cost.operations)
    fixed = cost.gpu_hours - of_trials * hours_per_operation
    each = of_trials * hours_per_operation / search.num_trials
    return max(0, min(search.num_trials, math.floor((gpu_hours - fixed) / each)))


def _anchor_notes(plan: RunPlan, spec: JobSpec) -> Iterator[str]:
    if isinstance(plan, SweepPlan) and spec.search is not None and isinstance(spec.train.anchor, AnchorSpec):
        for tune in tunes_without_anchor(spec.search, spec.train):
            yield f"train.anchor ({spec.train.anchor.kind}) does not apply to {tune} trials"


def _notes(plan: RunPlan, spec: JobSpec, found: Machines, cluster: ClusterDescription) -> list[str]:
    notes: list[str] = []
    if not plan.data.exact:
        notes.append("token counts are estimated from file sizes, at 4 bytes per token")
    most = spec.resources.max_gpus
    if found.device == "cuda" and most is not None and most > cluster.num_gpus:
        notes.append(f"max_gpus: {most} is an upper bound; the cluster has {cluster.num_gpus} GPUs")
    cores = sum(node.count * found.units_of(node) for node in found.nodes)
    if found.device == "cpu" and found.num_units < cores:
        notes.append(f"max_gpus: {most} limits cores if no GPU is used: {found.num_units} of {cores} cores train")
    if found.device == "cuda" and len({node.gpu_memory_bytes for node in found.nodes}) > 1:
        notes.append("nodes have different GPUs: every rank is planned for the GPU with the least memory")
    if isinstance(plan, SweepPlan) and spec.search is not None and spec.search.algorithm != "fixed":
        adapters = len(searched_adapters(spec.search))
        points = len(spec.search.layers) * sum(adapters if tune == "lora" else 1 for tune in spec.search.tune)
        if points > len(plan.search.options):
            notes.append(
                f"{points} combinations of layers and method select {len(plan.search.options)} different sets of parameters"
            )
    if plan.execution.offload != "none":
        notes.append(f"offload: {plan.execution.offload}: the hours leave out transfers between host and GPU")
    if not isinstance(plan, SweepPlan) and spec.resources.gangs not in ("auto", 1):
        notes.append("one trial runs in one gang (worker group): resources.gangs applies to sweeps only")
    return notes


def _few_steps(plan: RunPlan, spec: JobSpec) -> Iterator[str]:
    """Warn of too few steps, the most common reason why a training run achieves nothing."""
    data, warning = plan.data, too_few_steps_warning(plan.total_steps)
    if warning:
        mean = math.ceil(data.train_tokens / max(1, data.train_documents))
        longest = data.longest_document_tokens if data.exact else mean
        auto = auto_tokens_per_step(data.train_documents, data.train_tokens, longest, spec.train.epochs)
        yield f"{warning}: {more_steps(spec.train, auto, data.train_tokens, data.steps_per_epoch)}"


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
    if isinstance(plan, SweepPlan) and spec.search is not None and spec.search.learning_curve and not plan.search.curve_shares:
        yield too_few_documents(plan.data.train_documents)
    if not spec.traits.head.scores_retention and spec.data.retain is not None:
        yield ("data.retain is not used: a classifier has no output projection to measure forgetting with; remove it")
    if sum(node.count for node in found.nodes) > 1:
        yield (
            f"the run's folder ({spec.output}) must lie on storage that every node sees under the same path: gangs on "
            "other nodes read its data and write trials there; the run checks it before it starts"
        )
    yield from _bundle_warnings(plan, found)


def _bundle_warnings(plan: RunPlan, found: Machines) -> Iterator[str]:
    """Warn if verification and the test set cannot use a GPU, because each needs the whole merged model in memory at once."""
    whole = plan.num_parameters * (2 if plan.execution.dtype == "bfloat16" else 4)
    smallest = min(node.gpu_memory_bytes for node in found.nodes)
    # The bundle is verified by code that imports nothing of ours and knows no sharding: it needs the model whole.
    if found.device == "cpu" or whole <= RESIDENT_SHARE * smallest:
        return
    host = min(node.memory_bytes for node in found.nodes)
    short = f", more than the {format_bytes(host)} of host memory: expect the disk to be the limit" if whole > host else ""
    yield (
        f"the merged model ({format_bytes(whole)}) is more than {RESIDENT_SHARE:.0%} of one GPU ({format_bytes(smallest)}): the "
        f"bundle is verified and scored on the CPU, weights mapped from their files{short}; this takes hours at the end of "
        "the run, and a smaller data.test_rows shortens it"
    )


def derivations(plan: RunPlan, spec: JobSpec) -> tuple[str, ...]:
    """Return one sentence for each step in the derivation of the plan's numbers."""
    tokens_per_step, replay = planned_tokens_per_step(spec, plan.data), max(o.remedies.replay for o in plan.options)
    lines = [
        *([_auto_line(plan, tokens_per_step)] if spec.train.tokens_per_step == "auto" else []),
        batch_line(plan.execution, tokens_per_step, replay),
        f"{spec.train.epochs:g} epochs x {_count(plan.data.steps_per_epoch, 'step')} = {_count(plan.total_steps, 'step')}, "
        f"{format_count(plan.total_tokens)} tokens",
        _gangs_line(plan),
        _stage_line(plan.execution),
    ]
    if not isinstance(plan, SweepPlan):
        return tuple(lines)
    last = plan.search.rung_steps[-1]
    lines += [*_few_examples_lines(plan, plan.search), *_rungs_lines(plan.search)]
    if last < plan.total_steps:
        again = batch_line(plan.refit_execution, tokens_per_step, replay)
        lines.append(f"the winner is trained again to {plan.total_steps} steps: {again}")
    else:
        lines.append("a winner at the last rung already had the full budget and is not trained again")
    return tuple(lines)


def _auto_line(plan: RunPlan, tokens_per_step: int) -> str:
    """Return a line such as `tokens_per_step: auto: 240 documents of 21 tokens -> 96 tokens per step -> 106 steps`."""
    data = plan.data
    mean = data.train_tokens / max(1, data.train_documents)
    estimated = "" if data.exact else " (estimated)"
    ranks = f", for {data.step_ranks} ranks" if data.step_ranks > 1 else ""
    return (
        f"tokens_per_step: auto: {_count(data.train_documents, 'document')} of {mean:.3g} tokens{estimated} -> "
        f"{tokens_per_step} tokens per step{ranks} -> {_count(plan.total_steps, 'step')}"
    )


def _few_examples_lines(plan: RunPlan, search: SearchPlan) -> list[str]:
    """Return a line such as `only 360 documents: the winner is trained with 5 seeds, and trials are scored 8 times`."""
    parts = [f"the winner is trained with {search.repeats} seeds"] if search.repeats > 1 else []
    if search.patience is not None and len(search.rung_steps) > search.patience:
        parts.append(f"trials are scored {len(search.rung_steps)} times")
    return [f"only {_count(plan.data.train_documents, 'document')}: {', and '.join(parts)}"] if parts else []


def _rungs_lines(search: SearchPlan) -> list[str]:
    """Return when trials are scored, and which of them continue."""
    steps, going_on = search.rung_steps, f"the best of every {search.reduction_factor} trials continues"
    listed = ", ".join(map(str, steps))
    if search.patience is None or len(steps) == 1:
        return [f"trials are compared after {listed} steps" + (f"; {going_on}" if len(steps) > 1 else "")]
    compared = [
        str(step) for rung, step in enumerate(steps[:-1]) if surviving_share(search, rung + 1) < surviving_share(search, rung)
    ]
    return [
        f"trials are scored after {listed} steps, and compared by their best score",
        *([f"trials are compared after {' and '.join(compared)} steps; {going_on}"] if compared else []),
        f"a trial ends early when neither its eval loss nor its score has improved at {search.patience} scorings in a row",
    ]


def batch_line(execution: ExecutionPlan, tokens_per_step: int, replay: float = 0.0) -> str:
    """Return a line such as `8 rows x 512 tokens x 1 rank x 2 accumulation steps = 8192 tokens per step`.

    Args:
        replay: Largest replay share of any trial. Replayed tokens come on top of the target's tokens.
    """
    rows, width, ranks = execution.micro_batch_rows, execution.row_tokens, execution.ranks
    rounds = accumulation(rows, width, ranks, tokens_per_step)
    product = rows * width * ranks * rounds
    end = (
        f"{product} tokens per step"
        if product == tokens_per_step
        else f"{product} positions for {tokens_per_step} tokens per step"
    )
    if replay:
        end += f" of training data, up to about {Remedies(replay=replay).total_tokens(tokens_per_step)} with replayed ones"
    return f"{_count(rows, 'row')} x {width} tokens x {_count(ranks, 'rank')} x {_count(rounds, 'accumulation step')} = {end}"


def plan_lines(plan: RunPlan) -> list[str]:
    """Return the whole plan as lines of plain text, for a log."""
    execution = plan.execution
    lines = [
        f"plan {plan.name} ({plan.spec_sha256[:12]})",
        f"  base        {plan.base.shown} · {plan.base.model_type} · {format_count(plan.num_parameters)} parameters"
        + (f" · {plan.base.quantize}" if plan.base.quantize != "none" else ""),
        f"  data        {plan.data.train_documents} documents, {format_count(plan.data.train_tokens)} tokens; "
        f"eval {format_count(plan.data.eval_tokens)}, retain {format_count(plan.data.retain_tokens)}"
        + ("" if plan.data.exact else " (estimated)"),
        f"  gangs       {plan.num_gangs} of {_count(execution.ranks, 'rank')} on {execution.device}, "
        f"{_count(execution.threads_per_rank, 'thread')} per rank",
        *(f"  placement   {line}" for line in (plan.placement.sentences if plan.placement is not None else ())),
        f"  execution   {execution_line(execution)}",
        f"  refit       {execution_line(plan.refit_execution)}",
    ]
    if isinstance(plan, SweepPlan):
        search = plan.search
        lines.append(
            f"  search      {search.num_trials} trials of {len(search.options)} options · {search.algorithm} · {search.scheduler}"
        )
        lines += [f"    {option_line(option)}" for option in search.options]
    if isinstance(plan, FinetunePlan):
        lines.append(f"  finetune    {option_line(plan.finetune)}")
    heaviest = heaviest_option(plan)
    lines.append(f"  memory per rank, {heaviest.layers} {heaviest.tune}: {format_bytes(heaviest.memory.total_bytes)}")
    lines += [f"    {line}" for line in memory_lines(heaviest.memory)]
    lines.append(f"  cost        {cost_line(plan)}")
    lines += [f"  because     {reason}" for reason in plan.reasons]
    lines += [f"  rejected    {rejected.way}: {rejected.reason}" for rejected in plan.rejected]
    lines += [f"  warning     {warning}" for warning in plan.warnings]
    return lines + [f"  note        {note}" for note in plan.notes]


def execution_line(execution: ExecutionPlan) -> str:
    """Return a line such as `deepspeed ZeRO-2 · 2 ranks · checkpointing · bfloat16`."""
    parts = [
        "torch" if execution.executor == "torch" else f"deepspeed ZeRO-{execution.zero_stage}",
        _count(execution.ranks, "rank"),
    ]
    parts += [f"{execution.offload} offloaded"] if execution.offload != "none" else []
    parts += ["checkpointing"] if execution.checkpointing else []
    return " · ".join([*parts, f"{execution.micro_batch_rows} x {execution.row_tokens} tokens per micro-batch", execution.dtype])


def option_line(option: TrialOption) -> str:
    """Return a line such as `last:4 · lora r16 · 1.05M trainable · lr 1.0e-04 to 5.0e-03 · 2.1 GiB`."""
    low, high = option.learning_rate_low, option.learning_rate_high
    rates = f"lr {low:.1e}" if low == high else f"lr {low:.1e} to {high:.1e}"
    learn = format_count(option.selection.num_trainable_parameters)
    return f"{option.layers} · {option.method} · {learn} trainable · {rates} · {format_bytes(option.memory.total_bytes)}"


def cost_line(plan: RunPlan) -> str:
    """Return a line such as `1.2 GPU-hours (3.1 without early stopping) · 6m10s to 31m00s · 3.00 · 16.1 GiB of disk`."""
    cost, disk = plan.cost, f"{format_bytes(plan.disk_bytes)} of disk"
    if cost is None or (cost.gpu_hours is None and cost.core_hours is None):
        return f"GPU-hours unknown · {disk}"
    if cost.gpu_hours is None:
        parts = [f"{cost.core_hours:.3g} core-hours"]
    else:
        stops = isinstance(plan, SweepPlan) and len(plan.search.rung_steps) > 1
        whole = f" ({cost.gpu_hours_without_stopping:.3g} without early stopping)" if stops else ""
        parts = [f"{cost.gpu_hours:.3g} GPU-hours{whole}"]
    parts += [str(cost.duration)] if cost.duration is not None else []
    parts += [f"{cost.price:,.2f} for the GPUs"] if cost.price is not None else []
    return " · ".join([*parts, disk])


def heaviest_option(plan: RunPlan) -> TrialOption:
    """Return the option that needs the most memory, the one that decided the configuration."""
    return max(plan.options, key=lambda option: option.memory.total_bytes)


def memory_lines(memory: MemoryEstimate) -> list[str]:
    """Return one line for each term, the largest first."""
    ordered = sorted(memory.terms, key=lambda term: -term.num_bytes)
    return [f"{term.name:<18} {format_bytes(term.num_bytes):>10}  {term.reason}" for term in ordered]


def _gangs_line(plan: RunPlan) -> str:
    ranks = plan.execution.ranks
    if not isinstance(plan, SweepPlan):
        return f"one trial: one gang of {_count(ranks, 'rank')}"
    each = "the base and a trial fit on one rank" if ranks == 1 else f"a gang has {ranks} ranks"
    return f"{each}; {_count(plan.num_gangs, 'gang')} in all, each of which runs one trial after another"


def _stage_line(execution: ExecutionPlan) -> str:
    if execution.executor == "torch":
        if execution.ranks == 1:
            return "one process per trial: DeepSpeed is not needed"
        return (
            f"each of {execution.ranks} ranks holds all trainable parameters and sums gradients with the others: "
            "DeepSpeed is not needed"
        )
    alone = "as requested" if execution.ranks == 1 else "the lowest stage that is allowed and fits"
    return f"ZeRO-{execution.zero_stage}: {alone}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
