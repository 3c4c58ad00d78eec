"""Measurements before a run's search: block scores, compiled blocks, domain shift; each once in the life of the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray

from orchestrator.anatomy import ModelAnatomy
from orchestrator.errors import TrainingError
from orchestrator.plan import make_trial, with_scores
from orchestrator.plan.measurements import NO_RETENTION_SET, choice_of, standing_choice, with_choice
from orchestrator.plan.schedule import has_few_examples
from orchestrator.plan.values import RunPlan
from orchestrator.run.ledger import base_result
from orchestrator.runtime.cluster import fetch, rank_resources, worker_env
from orchestrator.runtime.hang_detection import HangTimeouts
from orchestrator.runtime.prepare import Prepared, read_choice, read_scores
from orchestrator.runtime.watchdog import run_task, run_with_heartbeats, watched
from orchestrator.spec import parse_policy
from orchestrator.store import read_record, write_json
from orchestrator.train import TrainHost
from orchestrator.transfer.domain_shift import Advice, advise
from orchestrator.transfer.run_view import RunView
from orchestrator.work.assignment import Measurement, MeasureShift, ScoreBlocks, TimeCompiling
from orchestrator.work.execution import BaseLoad, ExecutionPlan
from orchestrator.work.measurements import CompileChoice, CompileTimes, DomainShift, LayerScores
from orchestrator.work.results import MeasurementResult

Measure = Callable[[Measurement], MeasurementResult]
"""Has a measurement made somewhere: in a gang, or in a process of its own."""
Found = LayerScores | DomainShift | CompileTimes
Finding = TypeVar("Finding", LayerScores, CompileChoice, DomainShift)


@dataclass(frozen=True)
class Event:
    """The event that reports a finding, once in the life of the run."""

    kind: str
    message: str
    fields: dict[str, Any]
    shown: bool = True
    """True if the view shows it; the run's record has it in any case."""


class Step(ABC, Generic[Finding]):
    """One measurement of a run: what is known of it, what it takes, what follows."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared

    @property
    @abstractmethod
    def file(self) -> Path:
        """Return the file of the finding."""

    @abstractmethod
    def known(self) -> Finding | None:
        """Return what an earlier submission found."""

    def settled(self, known: Finding | None) -> Finding | None:
        """Return what needs no measuring: what is known, or what the spec or the plan says."""
        return known

    @abstractmethod
    def work(self) -> Measurement | None:
        """Return the work to hand out; None where nothing is to be measured."""

    def announce(self, view: RunView) -> None:
        """Show that the measurement begins."""

    @abstractmethod
    def finding(self, found: Found) -> Finding:
        """Return what follows from the measurement.

        Raises:
            TrainingError: it failed, and the run cannot continue without it.
        """

    @abstractmethod
    def plan(self, finding: Finding) -> RunPlan:
        """Return the run's plan once this is known."""

    @abstractmethod
    def event(self, finding: Finding, plan: RunPlan) -> Event: ...


def measure_once(step: Step[Finding], view: RunView, measure: Measure) -> Prepared:
    """Return the run with one more thing known: from disk, else from the plan, else measured; recorded and planned with.

    Raises:
        TrainingError: the measurement failed, and the run cannot continue without it.
    """
    prepared = step.prepared
    known = step.known()
    finding = step.settled(known)
    if finding is None:
        work = step.work()
        if work is None:
            return prepared
        step.announce(view)
        result = measure(work)
        for note in result.notes:
            prepared.run.event("trial_note", message=f"{work.work_id}: {note}", trial_id=work.work_id)
        finding = step.finding(result.found)
    plan = step.plan(finding)
    if finding != known:
        write_json(step.file, finding)
    if plan != prepared.plan:
        write_json(prepared.run.plan, plan)
    if finding != known:
        event = step.event(finding, plan)
        if event.shown:
            view.event(event.kind, event.message)
        prepared.run.event(event.kind, message=event.message, **event.fields)
    return prepared if plan == prepared.plan else replace(prepared, plan=plan)


def measured_in_a_gang(prepared: Prepared, exchange: Any, view: RunView) -> Prepared:
    """Return the run with all known that its search begins with, there and in the exchange.

    Raises:
        TrainingError: blocks could not be scored, and a policy needs it; or `resources.compile: on`, and they cannot be compiled.
    """

    def measured(step: Step[Finding]) -> Prepared:
        after = measure_once(step, view, lambda work: fetch(exchange.measure.remote(work)))
        if after.plan is not step.prepared.plan:
            fetch(exchange.replan.remote(after.plan))
        return after

    return measured(TargetShift(measured(CompiledBlocks(measured(BlockScores(prepared))))))


def scored_alone(prepared: Prepared, view: RunView) -> Prepared:
    """Return the one-trial job with its blocks scored, in a process of its own with one rank's resources: it has no gang yet.

    Raises:
        TrainingError: the blocks could not be scored, and a policy needs it.
    """
    whole = prepared.plan.refit_execution
    execution = whole.model_copy(update={"ranks": 1, "executor": "torch", "zero_stage": 0, "offload": "none"})
    resources = rank_resources(execution)

    def score(work: Measurement) -> MeasurementResult:
        # One call per process: Ray would keep an idle worker for later tasks, and with it the base in memory.
        remote: Any = ray.remote(max_calls=1)(run_with_heartbeats)
        task = remote.options(
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            max_retries=0,
            runtime_env={"env_vars": worker_env(execution)},
        )
        timeouts = HangTimeouts.from_environment().for_base(2 * prepared.anatomy.num_parameters())
        with watched(prepared.run, timeouts, 1) as watchdog:
            given = (prepared.plan.base, prepared.anatomy, work)
            return run_task(watchdog, "scoring the blocks", task, measure_in_this_process, *given)

    return measure_once(BlockScores(prepared, execution), view, score)


def measure_in_this_process(base: BaseLoad, anatomy: ModelAnatomy, work: Measurement) -> MeasurementResult:
    """Load the base and measure."""
    host = TrainHost.create(base, anatomy, work.execution, 0, 1, init_method=None)
    try:
        return host.measure(work)
    finally:
        host.close()


class BlockScores(Step[LayerScores]):
    """The blocks scored by their gradients, and policies by score resolved.

    Args:
        execution: Execution of the rank that scores; that of the search's gangs unless given.
    """

    def __init__(self, prepared: Prepared, execution: ExecutionPlan | None = None) -> None:
        super().__init__(prepared)
        self._execution = execution or prepared.plan.execution

    @property
    def file(self) -> Path:
        return self.prepared.run.layer_scores

    def known(self) -> LayerScores | None:
        return read_scores(self.prepared.run)

    def work(self) -> Measurement | None:
        prepared, plan = self.prepared, self.prepared.plan.probe
        if plan is None:
            return None
        context, seed = prepared.work_context(self._execution), prepared.spec.train.seed
        return ScoreBlocks(context=context, execution=self._execution, seed=seed, plan=plan)

    def announce(self, view: RunView) -> None:
        plan = self.prepared.plan.probe
        assert plan is not None
        view.phase("probe", f"scoring the blocks on {plan.num_batches} micro-batches of {plan.rows} rows each")

    def finding(self, found: Found) -> LayerScores:
        assert isinstance(found, LayerScores)
        plan = self.prepared.plan.probe
        if found.failed and plan is not None and plan.required:
            raise TrainingError(
                f"the blocks could not be scored: {found.failed}",
                where=str(self.prepared.run.path),
                remedy="fix the reported error and submit the same spec again, or name blocks instead of `top:` under another "
                "`name`",
            )
        return found

    def plan(self, finding: LayerScores) -> RunPlan:
        return with_scores(self.prepared.plan, self.prepared.spec, self.prepared.anatomy, finding)

    def event(self, finding: LayerScores, plan: RunPlan) -> Event:
        fields = finding.model_dump(mode="json", exclude={"failed"})
        if finding.failed:
            return Event("blocks_not_scored", f"the search continues without scores: {finding.failed}", fields)
        return Event("blocks_scored", _sentence(finding, plan), fields)


def _sentence(found: LayerScores, plan: RunPlan) -> str:
    """Return `4 micro-batches of 60 documents, 1810 tokens, in 0.3 s: 2.1% of ... operations; top:0.5 is blocks 2, 3`."""
    batches = "1 micro-batch" if found.num_batches == 1 else f"{found.num_batches} micro-batches"
    sentence = (
        f"{batches} of {found.num_documents} documents, {found.num_tokens} tokens, in "
        f"{found.seconds:.1f} s: {found.share_of_trial:.1%} of the cheapest trial's operations"
    )
    options = plan.options
    chosen = {option.layers: option.selection.blocks for option in options if parse_policy(option.layers).kind == "top"}
    return "; ".join([sentence, *(f"{layers} is blocks {', '.join(map(str, blocks))}" for layers, blocks in chosen.items())])


class CompiledBlocks(Step[CompileChoice]):
    """Measures whether the run's trials train with compiled blocks: all of them do, or none."""

    @property
    def file(self) -> Path:
        return self.prepared.run.compile_choice

    def known(self) -> CompileChoice | None:
        return read_choice(self.prepared.run)

    def settled(self, known: CompileChoice | None) -> CompileChoice | None:
        choice = standing_choice(self.prepared.spec.resources.compile, known)
        if choice is not None:
            return choice
        plan = self.prepared.plan.compiling
        if plan is None or plan.option is None:
            return CompileChoice(compiled=False, reason=plan.reason if plan is not None else "nothing is measured")
        begun = any(entry.trial.control is None for entry in self.prepared.run.ledger.entries())
        if begun and not plan.required:
            return CompileChoice(compiled=False, reason="the run's first trials were trained without")
        return None

    def work(self) -> Measurement | None:
        prepared, plan = self.prepared, self.prepared.plan.compiling
        if plan is None or plan.option is None:
            return None
        option, seed = prepared.plan.options[plan.option], prepared.spec.train.seed
        return TimeCompiling(
            context=prepared.work_context(),
            execution=prepared.plan.execution,
            seed=seed,
            plan=plan,
            trial=make_trial(prepared.plan, option, option.learning_rate_low, 0, seed),
            selection=option.selection,
        )

    def announce(self, view: RunView) -> None:
        view.phase("compiling")

    def finding(self, found: Found) -> CompileChoice:
        plan = self.prepared.plan.compiling
        assert isinstance(found, CompileTimes)
        assert plan is not None
        choice = choice_of(plan, found)
        if plan.required and not choice.compiled:
            raise TrainingError(
                choice.reason,
                where=str(self.prepared.run.path),
                remedy="fix the reported error, or set resources.compile: auto, and submit again",
            )
        return choice

    def plan(self, finding: CompileChoice) -> RunPlan:
        return with_choice(self.prepared.plan, finding)

    def event(self, finding: CompileChoice, plan: RunPlan) -> Event:
        kind = "blocks_compiled" if finding.compiled else "blocks_not_compiled"
        if finding.times is None:  # nothing was measured: the plan's notes have said why
            return Event(kind, finding.reason, {}, shown=False)
        return Event(kind, finding.reason, finding.times.model_dump(mode="json"))


class TargetShift(Step[DomainShift]):
    """Measures the distance between the target and the retention set, which orders the first proposals.

    Without a retention set there is no measurement: a small number of examples still orders the proposals, a larger one changes
    nothing.
    """

    @property
    def file(self) -> Path:
        return self.prepared.run.domain_shift

    @property
    def _is_wanted(self) -> bool:
        plan = self.prepared.plan
        return plan.shift is not None or has_few_examples(plan.data)

    def known(self) -> DomainShift | None:
        return read_record(self.file, DomainShift) if self._is_wanted and self.file.exists() else None

    def settled(self, known: DomainShift | None) -> DomainShift | None:
        if known is None and self._is_wanted and self.prepared.plan.shift is None:
            return DomainShift(failed=NO_RETENTION_SET)
        return known

    def work(self) -> Measurement | None:
        prepared, plan = self.prepared, self.prepared.plan.shift
        if plan is None:
            return None
        context, seed = prepared.work_context(), prepared.spec.train.seed
        return MeasureShift(context=context, execution=prepared.plan.execution, seed=seed, plan=plan)

    def finding(self, found: Found) -> DomainShift:
        assert isinstance(found, DomainShift)
        return found

    def plan(self, finding: DomainShift) -> RunPlan:
        plan = self.prepared.sweep_plan
        search = plan.search.model_copy(update={"prior": advice_of(self.prepared, finding).kind})
        return plan.model_copy(update={"search": search})

    def event(self, finding: DomainShift, plan: RunPlan) -> Event:
        return Event("domain_shift", advice_of(self.prepared, finding).sentence, finding.model_dump(mode="json"))


def advice_of(prepared: Prepared, found: DomainShift) -> Advice:
    base = base_result(prepared.run.ledger)
    return advise(
        [block.distance for block in found.blocks],
        target_loss=base.eval_loss if base is not None else None,
        retention_loss=base.retain_loss if base is not None else None,
        num_documents=prepared.plan.data.train_documents,
        failed=found.failed,
    )
