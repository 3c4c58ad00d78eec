"""What will be done: decisions as values, with the reasons and the rejected alternatives."""

from __future__ import annotations

from typing import Any, Literal, Self, cast

from pydantic import ModelWrapValidatorHandler, ValidationError, model_validator

from orchestrator.anatomy.values import LayerSelection
from orchestrator.plan.data_size import DataSize
from orchestrator.plan.estimates import CostEstimate, MemoryEstimate, Placement
from orchestrator.spec.models import Tune
from orchestrator.values import Value
from orchestrator.work.execution import BaseLoad, ExecutionPlan, TrunkPlan
from orchestrator.work.measurements import CompilePlan, ProbePlan, ShiftPlan
from orchestrator.work.remedies import NOTHING, Remedies, method_name


class NodeDescription(Value):
    """One node (or `count` equal ones) of a cluster."""

    count: int = 1
    num_cpus: int
    num_gpus: int = 0
    gpu_memory_bytes: int = 0
    gpu_name: str = ""
    gpu_hour_price: float | None = None
    """What an hour of one of its GPUs costs, in the currency of whoever wrote it down."""
    memory_bytes: int
    """Host memory."""
    core_flops: float = 0.0
    """Of a float32 product of matrices on one core, measured; 0 where it was not. Hours are told by it, nothing is decided."""


class ClusterDescription(Value):
    """The machines a plan is for, live or described by a file."""

    nodes: tuple[NodeDescription, ...]
    source: str = ""
    max_threads: int | None = None
    """Threads that a rank may have at most, where the environment of a live cluster's driver says so (OMP_NUM_THREADS)."""

    @property
    def num_gpus(self) -> int:
        return sum(node.count * node.num_gpus for node in self.nodes)

    @property
    def num_cpus(self) -> int:
        return sum(node.count * node.num_cpus for node in self.nodes)


class RejectedWay(Value):
    """A cheaper way that did not fit, and the term that broke it."""

    way: str
    reason: str


class TrialOption(Value):
    """One discrete choice of the search with its selection, memory and cost."""

    layers: str
    tune: Tune
    lora_rank: int | None
    selection: LayerSelection
    memory: MemoryEstimate
    """Of one rank's device."""
    host_memory: MemoryEstimate = MemoryEstimate(terms=())
    """Of one rank in its host's memory, beside a GPU."""
    learning_rate_low: float
    learning_rate_high: float
    remedies: Remedies = NOTHING

    @property
    def method(self) -> str:
        """`lora r16 · replay 0.1`: how its layers learn."""
        return method_name(self.tune, self.lora_rank, self.selection.adapter, self.remedies)


class PlannedPoint(Value):
    """A trial that the spec gives: an option (by index) at a learning rate."""

    option: int
    learning_rate: float


class SearchPlan(Value):
    options: tuple[TrialOption, ...]
    num_trials: int
    algorithm: Literal["optuna", "random", "grid", "fixed"]
    scheduler: Literal["asha", "none"]
    rung_steps: tuple[int, ...]
    """Steps at which trials are compared; the last is the trial's whole budget."""
    total_steps: int
    """Steps of the full budget (`train.epochs`)."""
    reduction_factor: int
    patience: int | None = None
    """After so many rungs without anything better on the eval set a trial ends, and is judged by its best; None: by its last."""
    concurrent_trials: int
    max_fused: int = 1
    """How many trials may share a batch at most; the gang measures how many pay."""
    controls: tuple[Literal["shuffled", "scratch", "k_shot"], ...] = ()
    """Asked for beside those that every sweep has."""
    curve_shares: tuple[float, ...] = ()
    """Of the training documents, on which the winner is trained once more for the learning curve; empty without one."""
    repeats: int = 1
    """From how many seeds the promoted trial is trained in all."""
    prior: Literal["none", "near", "far", "few"] = "none"
    """What the domain shift advises to try first, once it was measured."""
    points: tuple[PlannedPoint, ...] = ()
    """The trials of `fixed`, in order."""
    shares: tuple[float, ...] = ()
    """Of the summed scores of the blocks, what each option's blocks hold; empty without scores."""


class RunPlan(Value):
    """Everything derived before anything runs, of a sweep or of a fine-tuning: what both have.

    plan.json has both `search` and `finetune`, one of them null. Read as a `RunPlan` it becomes the kind that it is.
    """

    name: str
    spec_sha256: str
    base_sha256: str = ""
    """Over the base's config and what its weight files hold (`store.base_identity`). Empty where the run has not begun."""
    base: BaseLoad
    num_parameters: int
    data: DataSize
    execution: ExecutionPlan
    refit_execution: ExecutionPlan
    num_gangs: int
    base_memory: MemoryEstimate
    scratch_memory: MemoryEstimate | None = None
    """Of the control `scratch`; None where it was not asked for, or does not fit."""
    head_memory: MemoryEstimate | None = None
    """Of the control `head`; None where the job has none."""
    total_steps: int
    total_tokens: int
    disk_bytes: int
    gpu_hours: float | None
    """With early stopping; None without GPUs, and where their rate is unknown."""
    cost: CostEstimate | None = None
    """Where the two above come from, and what it costs beside them. None in plans of older versions."""
    probe: ProbePlan | None = None
    """How the blocks are scored before anything is trained; None where they are not."""
    shift: ShiftPlan | None = None
    """How the distance of target and retention set is measured before the search; None where it is not."""
    compiling: CompilePlan | None = None
    """What is measured of compiled blocks; None where the choice has been made, or was asked for."""
    placement: Placement | None = None
    refit_placement: Placement | None = None
    trunk: TrunkPlan | None = None
    """None where nothing is stored; `notes` say why."""
    reasons: tuple[str, ...]
    """Derivations in sentences: batch x accumulation x ranks = tokens per step, why this stage, ..."""
    rejected: tuple[RejectedWay, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """What a person should hear before the run, also where only a log is read."""

    @property
    def options(self) -> tuple[TrialOption, ...]:
        """Return the choices that are planned: the search's, or the one trial."""
        raise NotImplementedError

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_kind(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> RunPlan:
        if cls is not RunPlan or not isinstance(values, dict):
            return handler(values)
        given = cast("dict[str, Any]", values)
        kind = SweepPlan if given.get("search") is not None else FinetunePlan
        try:
            return kind.model_validate(given)
        except ValidationError as error:  # said in one line, as of any other record
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


class SweepPlan(RunPlan):
    """The plan of a sweep."""

    search: SearchPlan
    finetune: None = None

    @property
    def options(self) -> tuple[TrialOption, ...]:
        return self.search.options


class FinetunePlan(RunPlan):
    """The plan of a fine-tuning, the one-trial job."""

    search: None = None
    finetune: TrialOption

    @property
    def options(self) -> tuple[TrialOption, ...]:
        return (self.finetune,)
