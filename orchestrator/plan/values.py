"""What will be done: decisions as values, with the reasons and the rejected alternatives."""

from __future__ import annotations

from typing import Literal

from orchestrator.anatomy.values import LayerSelection
from orchestrator.plan.compilation import CompilePlan
from orchestrator.plan.estimates import CostEstimate, MemoryEstimate, Placement
from orchestrator.plan.remedies import NOTHING, Remedies, method_name
from orchestrator.plan.scored import ProbePlan
from orchestrator.plan.size import DataSize
from orchestrator.spec.models import Quantize, Task, Tune
from orchestrator.values import Value


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


class ExecutionPlan(Value):
    """How one gang trains a trial. The same for every trial of a sweep."""

    device: Literal["cpu", "cuda"]
    ranks: int
    threads_per_rank: int
    executor: Literal["torch", "deepspeed"]
    """`torch` where a rank holds all that learns; `deepspeed` to partition it, or where a ZeRO stage was asked for."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "parameters"] = "none"
    checkpointing: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    row_tokens: int
    """Width of a row: documents are packed into rows of so many tokens."""
    micro_batch_rows: int
    """Rows that a rank computes at once."""
    pack: bool = True
    compiled: bool = False
    """Whether the blocks from the cut up are compiled for training."""
    backend: Literal["gloo", "nccl"] = "gloo"
    inside_node: bool = False
    """Whether every gang has a node that holds it: then its ranks wait for one rather than spread."""


class TrialSpec(Value):
    """One point of the search, or a control. Nothing of the cluster is in here."""

    trial_id: str
    number: int
    control: Literal["none", "head", "shuffled", "scratch", "repeat", "curve"] | None = None
    share: float = 1.0
    """Of the training documents, what it learns from; below 1 for points of the learning curve."""
    layers: str
    tune: Tune
    learning_rate: float
    lora_rank: int | None = None
    total_steps: int
    """Steps of the full budget: the learning-rate schedule ends there."""
    total_tokens: int
    """Training tokens (with prompts and what is replayed, without padding) of the full budget."""
    seed: int
    remedies: Remedies = NOTHING

    @property
    def method(self) -> str:
        """`lora r16 · replay 0.1`: how its layers learn."""
        return method_name(self.tune, self.lora_rank, self.remedies)

    @property
    def lora_alpha(self) -> int:
        """LoRA's scale is alpha / rank; twice the rank is the field's usual choice (Hu et al. 2021 keep it fixed)."""
        return 2 * (self.lora_rank or 0)


class BaseLoad(Value):
    """How a rank loads the base."""

    folder: str
    model_type: str
    quantize: Quantize
    task: Task
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    revision: str | None = None


class TrainSettings(Value):
    """The part of the spec's `train` that the loop needs."""

    warmup: float
    schedule: Literal["cosine", "linear", "constant"]
    weight_decay: float
    grad_clip: float
    tokens_per_step: int


class DataPaths(Value):
    """Tokenised sets, as written by `data.TokenizedSet.save`. Absolute or store paths."""

    train: str
    eval: str
    retain: str | None = None
    """What is scored of the retention set."""
    replay: str | None = None
    """What is learned from of it: none of it is scored."""


class TrunkPlan(Value):
    """Hidden states that are stored once, for trials to begin from instead of the embeddings."""

    cuts: tuple[int, ...]
    """Where they are stored, ascending, each at least 1: what enters block `cut` (`num_blocks`: the final norm)."""
    num_bytes: int
    """Of all sets at all cuts."""
    folder: str = ""
    """On each machine's own disk; the user's cache folder where it is empty."""
    max_bytes: int | None = None
    """What the folder may hold; None for half of the disk's free space."""


class ShiftPlan(Value):
    """How the distance of target and retention set is measured before the search."""

    cuts: tuple[int, ...]
    """What enters these blocks is compared, ascending."""
    num_documents: int
    """Of each set, at most."""


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
        return method_name(self.tune, self.lora_rank, self.remedies)


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
    """Everything derived before anything runs."""

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
    search: SearchPlan | None
    finetune: TrialOption | None
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
