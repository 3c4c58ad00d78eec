"""The plan of a run: decisions as values, with their reasons and the rejected alternatives."""

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
    """Price of an hour of one of its GPUs, in the currency of the author of the cluster file."""
    memory_bytes: int
    """Host memory."""
    core_flops: float = 0.0
    """Measured operations per second of a float32 matrix product on one core; 0 if unknown. It affects estimated hours, not
    decisions."""


class ClusterDescription(Value):
    """The machines a plan is for, live or described by a file."""

    nodes: tuple[NodeDescription, ...]
    source: str = ""
    max_threads: int | None = None
    """Upper bound on the threads of a rank, if the environment of a live cluster's driver sets one (OMP_NUM_THREADS)."""

    @property
    def num_gpus(self) -> int:
        return sum(node.count * node.num_gpus for node in self.nodes)

    @property
    def num_cpus(self) -> int:
        return sum(node.count * node.num_cpus for node in self.nodes)


class RejectedWay(Value):
    """A cheaper execution that did not fit, and the term that exceeded memory."""

    way: str
    reason: str


class TrialOption(Value):
    """One discrete choice of the search with its selection, memory and cost."""

    layers: str
    tune: Tune
    lora_rank: int | None
    selection: LayerSelection
    memory: MemoryEstimate
    """Memory use on one rank's device."""
    host_memory: MemoryEstimate = MemoryEstimate(terms=())
    """Memory use of one rank in its host's memory, beside a GPU."""
    learning_rate_low: float
    learning_rate_high: float
    remedies: Remedies = NOTHING

    @property
    def method(self) -> str:
        """Return how its layers are trained, `lora r16 · replay 0.1`."""
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
    """Rungs without improvement on the eval set after which a trial stops early, scored by its best rung; None: no early
    stopping, scored by its last."""
    concurrent_trials: int
    max_fused: int = 1
    """Upper bound on the trials that share a batch; the gang measures which number is fastest."""
    controls: tuple[Literal["shuffled", "scratch", "k_shot"], ...] = ()
    """Requested controls, in addition to those of every sweep."""
    curve_shares: tuple[float, ...] = ()
    """Shares of the training documents on which the winner is trained again for the learning curve; empty without a curve."""
    repeats: int = 1
    """Total number of seeds from which the promoted trial is trained."""
    prior: Literal["none", "near", "far", "few"] = "none"
    """Which options the measured domain shift advises to try first."""
    points: tuple[PlannedPoint, ...] = ()
    """The trials of `fixed`, in order."""
    shares: tuple[float, ...] = ()
    """Share of the blocks' summed scores in each option's blocks; empty without scores."""


class RunPlan(Value):
    """Everything derived before a run begins: the fields that the plans of a sweep and of a fine-tuning share.

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
    """Memory of the control `scratch`; None if it was not requested or does not fit."""
    head_memory: MemoryEstimate | None = None
    """Memory of the control `head`; None if the job has none."""
    total_steps: int
    total_tokens: int
    disk_bytes: int
    gpu_hours: float | None
    """Expected GPU-hours with early stopping; None without GPUs or if their rate is unknown."""
    cost: CostEstimate | None = None
    """Derivation of the two fields above, and the other costs. None in plans of older versions."""
    probe: ProbePlan | None = None
    """Plan for scoring the blocks before any training; None if they are not scored."""
    shift: ShiftPlan | None = None
    """Plan for measuring the distance between target and retention set before the search; None if it is not measured."""
    compiling: CompilePlan | None = None
    """Plan for measuring compiled blocks; None if the choice has been made or was requested."""
    placement: Placement | None = None
    refit_placement: Placement | None = None
    trunk: TrunkPlan | None = None
    """The activations to cache; None if there are none (`notes` say why)."""
    reasons: tuple[str, ...]
    """Derivations in sentences: batch x accumulation x ranks = tokens per step, why this stage, ..."""
    rejected: tuple[RejectedWay, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """Warnings to show before the run, also in a plain log."""

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
        except ValidationError as error:  # one line, as for any record: pydantic's own text lists every field of the union
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
