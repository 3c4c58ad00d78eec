"""The execution of a gang: its device, engine and batch shape, the base that it loads, and the data that it reads."""

from __future__ import annotations

from typing import Literal

from orchestrator.anatomy.values import Pooling
from orchestrator.spec.models import Quantize, Task
from orchestrator.spec.tasks import TASKS, TaskTraits
from orchestrator.values import Value


class GangKind(Value):
    """The part of an execution that is fixed when a gang starts: the same gang can run executions of the same kind in turn."""

    device: Literal["cpu", "cuda"]
    ranks: int
    executor: Literal["torch", "deepspeed"]
    dtype: Literal["bfloat16", "float32"]
    offload: Literal["none", "optimizer", "parameters"]
    row_tokens: int
    pack: bool
    shards_base: bool
    """True if the base is sharded across the ranks (ZeRO-3). At stages 0 to 2 every rank has all of it, so a gang can move
    among them."""


class ExecutionPlan(Value):
    """The way one gang trains a trial, the same for every trial of a sweep."""

    device: Literal["cpu", "cuda"]
    ranks: int
    threads_per_rank: int
    executor: Literal["torch", "deepspeed"]
    """`torch` if a rank holds all trainable state; `deepspeed` to partition it, or if a ZeRO stage was requested."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "parameters"] = "none"
    checkpointing: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    row_tokens: int
    """Width of a row: documents are packed into rows of so many tokens."""
    micro_batch_rows: int
    """Rows that a rank computes at once."""
    pack: bool = True
    pads: bool = True
    """False if the base's class computes other numbers where a row is padded: a micro-batch is then one row."""
    compiled: bool = False
    """True if the blocks from the cut up are compiled for training."""
    backend: Literal["gloo", "nccl"] = "gloo"
    inside_node: bool = False
    """True if each gang fits on one node: then its ranks wait for such a node instead of spreading over several."""

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


class Padding(Value):
    """The token that pads texts to classify. It ends no text, since transformers' decoders classify the last token that is not
    it."""

    token_id: int
    token: str
    """Its spelling in the tokenizer; in the bundle's tokenizer it is the padding token."""


class BaseLoad(Value):
    """The parameters with which a rank loads the base."""

    folder: str
    model_type: str
    quantize: Quantize
    task: Task
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    revision: str | None = None
    """The hub's commit; of a local folder what the spec says."""
    hub_id: str = ""
    """Id of the repository on the hub that `folder` is a copy of; empty for a local folder."""
    code_sha256: str = ""
    """Hash of the base's own code that runs to load it; empty if none does."""
    pooling: Pooling = Pooling()
    """What a new classifier reads of a text."""
    padding: Padding | None = None
    """The padding token of a new classifier; None in records of older versions, and for other tasks."""

    @property
    def shown(self) -> str:
        """Return what people call the base: its id on the hub with the commit, or its folder."""
        return f"{self.hub_id} at {(self.revision or '')[:12]}" if self.hub_id else self.folder

    @property
    def traits(self) -> TaskTraits:
        """Return the traits of the task."""
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
    """File of the retention documents that are scored."""
    replay: str | None = None
    """File of the retention documents that are trained on; none of them is scored."""


class TrunkPlan(Value):
    """Hidden states that are stored once, so that trials start from them instead of from the embeddings."""

    cuts: tuple[int, ...]
    """Cuts at which they are stored, ascending, each at least 1: the input of block `cut` (`num_blocks`: the final norm)."""
    num_bytes: int
    """Bytes of all sets at all cuts."""
    folder: str = ""
    """Folder on each machine's own disk; empty for the user's cache folder."""
    max_bytes: int | None = None
    """Size limit of the folder; None for half of the disk's free space."""
