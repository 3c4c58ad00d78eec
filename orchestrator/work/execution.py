"""How a gang trains: its device, engine and batch shape, the base that it loads, and the data that it reads."""

from __future__ import annotations

from typing import Literal

from orchestrator.spec.models import Quantize, Task
from orchestrator.spec.tasks import TASKS, TaskTraits
from orchestrator.values import Value


class GangKind(Value):
    """What a gang is started for: executions with the same kind can be run by the same gang, one after another."""

    device: Literal["cpu", "cuda"]
    ranks: int
    executor: Literal["torch", "deepspeed"]
    dtype: Literal["bfloat16", "float32"]
    offload: Literal["none", "optimizer", "parameters"]
    row_tokens: int
    pack: bool
    shards_base: bool
    """Whether the base is sharded over the ranks (ZeRO-3); stages 0 to 2 hold it whole, and can follow each other."""


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

    @property
    def gang_kind(self) -> GangKind:
        """Return what must be equal for this execution to be run by the gang of another one."""
        return GangKind(
            device=self.device,
            ranks=self.ranks,
            executor=self.executor,
            dtype=self.dtype,
            offload=self.offload,
            row_tokens=self.row_tokens,
            pack=self.pack,
            shards_base=self.zero_stage == 3,
        )


class BaseLoad(Value):
    """How a rank loads the base."""

    folder: str
    model_type: str
    quantize: Quantize
    task: Task
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    revision: str | None = None

    @property
    def traits(self) -> TaskTraits:
        """The traits of the task."""
        return TASKS[self.task]


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
