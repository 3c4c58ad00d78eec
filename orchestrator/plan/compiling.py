"""Whether the blocks that learn are compiled: what speaks against it, whether measuring it is worth its time, and what follows.

Compiled code adds up in another order than the libraries' kernels, so that its losses differ in their last bits. That all
trials of a run are comparable and a trial's numbers hang on nothing but itself, the choice is the run's, made once.
"""

from __future__ import annotations

from typing import Literal

from orchestrator.anatomy import ModelAnatomy
from orchestrator.errors import PlanError
from orchestrator.plan.compilation import CompileChoice, CompilePlan, CompileTimes
from orchestrator.plan.cost.estimate import TRIALS, units_of_gang
from orchestrator.plan.grouping import concurrent_trials
from orchestrator.plan.values import ExecutionPlan, RunPlan, TrialOption
from orchestrator.spec.models import JobSpec
from orchestrator.units import format_seconds

KIND_SECONDS = 90.0
"""What compiling is taken to need for one choice of (tune, lora_rank), whatever the number of its blocks: two kinds of blocks,
the one at the cut, whose input needs no gradient, and those above it. From an empty cache 35 s of a core were measured
(`scripts/bench sweep compile`), and a core is seldom free; on a GPU assumed."""
WORTH = 20.0
"""Compiled blocks are measured where the search trains at least so many times as long as compiling would take."""
MOST_OF_EAGER = 0.95
"""A compiled step must take at most this share of the other's time: less gain is noise."""


def with_compiling(plan: RunPlan, spec: JobSpec, anatomy: ModelAnatomy) -> RunPlan:
    """The plan with what is measured of compiled blocks before the search, or a note why nothing is.

    Raises:
        PlanError: `resources.compile: on`, where blocks cannot be compiled.
    """
    asked = spec.resources.compile
    against = why_never(plan.execution if plan.search is not None else plan.refit_execution, spec, anatomy)
    if asked == "off":
        return plan
    if asked == "on" and against is not None:
        raise PlanError(
            f"the blocks cannot be compiled: {against}",
            where="resources.compile",
            expected="auto or off",
            remedy="leave it to auto",
        )
    if plan.search is None:
        execution = plan.refit_execution.model_copy(update={"compiled": asked == "on"})
        return plan.model_copy(update={"refit_execution": execution})
    found = _planned(plan, against, required=asked == "on")
    if asked == "on" and found.option is None:
        raise PlanError(found.reason, where="resources.compile", expected="auto or off", remedy="leave it to auto")
    return plan.model_copy(update={"compiling": found, "notes": (*plan.notes, found.reason)})


def why_never(execution: ExecutionPlan, spec: JobSpec, anatomy: ModelAnatomy) -> str | None:
    """What keeps blocks from being compiled, whatever that would gain; None where nothing does."""
    if execution.executor != "torch":
        return "DeepSpeed's engines hook into every module"
    if execution.ranks > 1:
        return "if one of several ranks cannot compile, the others would wait for it"
    if spec.base.quantize != "none":
        return f"{spec.base.quantize} is multiplied by library kernels, which cannot be compiled"
    if spec.task == "classify" or not execution.pack:
        return "rows that are not packed have many widths, and each width needs its own compilation"
    if anatomy.experts is not None:
        return "routed experts receive a different number of tokens each time"
    if anatomy.dropout:
        return f"{anatomy.dropout} would draw different random numbers"
    return None


def _planned(plan: RunPlan, against: str | None, *, required: bool) -> CompilePlan:
    assert plan.search is not None
    if against is not None:
        return CompilePlan(option=None, reason=f"the blocks are not compiled: {against}")
    options = plan.search.options
    kinds = len({(option.tune, option.lora_rank) for option in options if learns_in_blocks(option)})
    if not kinds:
        return CompilePlan(option=None, reason="the blocks are not compiled: none of them is trainable")
    seconds = gang_seconds(plan)
    option = max(
        (index for index, option in enumerate(options) if learns_in_blocks(option)),
        key=lambda index: (not options[index].selection.pending, options[index].selection.num_trainable_parameters),
    )
    if required:
        return CompilePlan(
            option=option,
            reason="the blocks are compiled, as resources.compile says",
            num_kinds=kinds,
            gang_seconds=seconds,
            required=True,
        )
    if plan.search.max_fused > 1:
        sharing = "trials share batches, and each set of batched trials needs its own compilation"
        return CompilePlan(option=None, reason=f"the blocks are not compiled: {sharing}")
    if seconds is None:
        return CompilePlan(option=None, reason="the blocks are not compiled: how long the search takes is unknown")
    expected = kinds * KIND_SECONDS
    weighed = f"a gang trains for {format_seconds(seconds)}, and compiling takes about {format_seconds(expected)}"
    if seconds < WORTH * expected:
        return CompilePlan(option=None, reason=f"the blocks are not compiled: {weighed}")
    said = f"whether compiled blocks save time is measured before the search: {weighed}"
    return CompilePlan(option=option, reason=said, num_kinds=kinds, gang_seconds=seconds)


def learns_in_blocks(option: TrialOption) -> bool:
    """Whether a choice has a block to compile; one that waits for scores will have."""
    return option.selection.pending or bool(option.selection.blocks)


def gang_seconds(plan: RunPlan) -> float | None:
    """What a gang is planned to train for in the search, controls and refit left out; None where the rate is unknown."""
    if plan.cost is None or plan.cost.rate.flops is None:
        return None
    trained = sum(part.amount for part in plan.cost.operations if part.name == TRIALS)
    return trained / (plan.cost.rate.flops * units_of_gang(plan.execution) * plan.num_gangs)


def standing_choice(asked: Literal["auto", "on", "off"], known: CompileChoice | None) -> CompileChoice | None:
    """What needs no measuring: what is asked for, or what an earlier submission of the run has chosen."""
    if asked == "off":
        return CompileChoice(compiled=False, reason="resources.compile is off")
    if known is None or (asked == "on" and not known.compiled):
        return None
    return known


def choice_of(plan: CompilePlan, times: CompileTimes) -> CompileChoice:
    """What follows from a measurement: compiled blocks must gain more over the search than compiling all of them takes.

    What it gains is the share that is saved of a full micro-batch's time, of what a gang is planned to train for with such.
    """
    if times.failed:
        return CompileChoice(compiled=False, reason=f"the blocks cannot be compiled: {times.failed}", times=times)
    share = times.compiled_seconds / times.eager_seconds
    spent = times.compile_seconds * plan.num_kinds
    said = (
        f"a compiled micro-batch takes {1e3 * times.compiled_seconds:.1f} ms, {share:.2f} of {1e3 * times.eager_seconds:.1f} ms; "
        f"compiling takes {format_seconds(spent)} per gang (worker group)"
    )
    if plan.required:
        return CompileChoice(compiled=True, reason=said, times=times)
    saved = (1 - share) * times.full_share * (plan.gang_seconds or 0.0)
    said = f"{said}, and saves {format_seconds(max(0.0, saved))}"
    return CompileChoice(compiled=share <= MOST_OF_EAGER and spent < saved, reason=said, times=times)


def with_choice(plan: RunPlan, choice: CompileChoice | None) -> RunPlan:
    """The plan once the choice is made; nothing is left to measure. Where blocks are compiled, trials share no batch.

    Without a choice the plan itself.
    """
    if choice is None:
        return plan
    compiled = choice.compiled and plan.execution.executor == "torch"
    refit = choice.compiled and plan.refit_execution.executor == "torch"
    search = plan.search
    if compiled and search is not None:
        concurrent = concurrent_trials(search.num_trials, plan.num_gangs, 1)
        search = search.model_copy(update={"max_fused": 1, "concurrent_trials": concurrent})
    return plan.model_copy(
        update={
            "execution": plan.execution.model_copy(update={"compiled": compiled}),
            "refit_execution": plan.refit_execution.model_copy(update={"compiled": refit}),
            "search": search,
            "compiling": None,
        }
    )
