"""Values of the merge plan (`plan.merge`): what is written, tensor by tensor and shard by shard."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.anatomy.values import Pooling, TensorInfo
from orchestrator.spec.models import Quantize, Task
from orchestrator.values import Value
from orchestrator.work.artifact import StoredAdapter
from orchestrator.work.execution import Padding

MergedInto = Literal["dequantized", "original"]
HEAD_FILE = "head.safetensors"
"""File of a classifier that no transformers class has, with `weight` [classes, hidden] and, where it has one, `bias`."""


class Place(Value):
    """Where a stored tensor lies in the parameter that it is, or is a part of; see `StoredPart`."""

    index: tuple[int, ...] = ()
    """Position in the parameter's leading dimensions: (expert,)."""
    start: int = 0
    """First row along `axis`, a dimension of the rest."""
    length: int = 0
    """Number of rows; 0 for all."""
    axis: int = 0
    transposed: bool = False
    """True if the stored tensor is the transpose."""


WHOLE = Place()


class Keep(Value):
    """Copy the base's tensor unchanged."""

    kind: Literal["keep"] = "keep"


class ApplyAdapter(Value):
    """Write the base's tensor with its adapter, computed in float32 and rounded once.

    An adapter is of a weight [out, in], or of the weights [experts, out, in] of routed experts, whose slices are merged one by
    one.
    """

    kind: Literal["apply_adapter"] = "apply_adapter"
    adapter: StoredAdapter
    place: Place = WHOLE
    from_right: bool = False
    """True if the parameter multiplies from the right, [in, out]."""


class Replace(Value):
    """Write a trained tensor, or the part of one, instead of the base's."""

    kind: Literal["replace"] = "replace"
    trained: TensorInfo
    place: Place = WHOLE


class Dequantize(Value):
    """Write the base's tensor as training used it: quantized to nf4 (Dettmers et al. 2023) or int8 (Dettmers et al. 2022) and
    dequantized, plus the adapter, if any."""

    kind: Literal["dequantize"] = "dequantize"
    quantize: Quantize = "nf4"
    adapter: StoredAdapter | None = None
    place: Place = WHOLE
    from_right: bool = False
    parameter: TensorInfo | None = None
    """The parameter, which was quantized as a whole, where the stored tensor is not all of it."""


class NewTensor(Value):
    """Write a trained tensor that the base does not have: a classifier, or the copy of a tied head."""

    kind: Literal["new"] = "new"
    trained: TensorInfo


Single = Annotated[Keep | ApplyAdapter | Replace | Dequantize, Field(discriminator="kind")]


class Section(Value):
    """Rows of a stored tensor that are a parameter of their own: the query's in a fused projection."""

    start: int
    stop: int
    operation: Single


class Compose(Value):
    """Write a tensor that several parameters are stored in, section by section."""

    kind: Literal["compose"] = "compose"
    sections: tuple[Section, ...]


Operation = Annotated[Keep | ApplyAdapter | Replace | Dequantize | NewTensor | Compose, Field(discriminator="kind")]


class WriteTensor(Value):
    """One tensor of the output, named as in the base's files. `source` is the base's tensor, or None for a new one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    operation: Operation
    source: TensorInfo | None = None

    @property
    def num_bytes(self) -> int:
        return TensorInfo(name=self.name, shape=self.shape, dtype=self.dtype).num_bytes


class LinkShard(Value):
    """A shard of the base without changes: a hard link, or a copy if links are not possible."""

    kind: Literal["link"] = "link"
    file: str
    base_file: str
    names: tuple[str, ...]
    num_bytes: int
    """Size of its tensors."""


class WriteShard(Value):
    """A shard that is written tensor by tensor."""

    kind: Literal["write"] = "write"
    file: str
    tensors: tuple[WriteTensor, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


Shard = Annotated[LinkShard | WriteShard, Field(discriminator="kind")]


class MergePlan(Value):
    """All steps of the merge. Files are relative to `base_folder`, trained files to `artifact_folder`."""

    base_folder: str
    artifact_folder: str
    merged_into: MergedInto
    """`dequantized`: weights that were quantized in training are quantized and dequantized first. `original`: the stored base."""
    held_dtype: Literal["bfloat16", "float32"]
    """Dtype that training dequantized to."""
    task: Task
    class_names: tuple[str, ...] = ()
    pooling: Pooling = Pooling()
    padding: Padding | None = None
    """As in the base's `BaseLoad`; so is `pooling`."""
    unties_head: bool = False
    shards: tuple[Shard, ...]
    head: WriteShard | None = None
    """HEAD_FILE, beside the shards of the model; None if the model's class has the head."""

    @property
    def total_bytes(self) -> int:
        """Size of all output tensors, without headers."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def largest_tensor_bytes(self) -> int:
        """Size of the largest tensor that is written."""
        return max((t.num_bytes for shard in self.shards if isinstance(shard, WriteShard) for t in shard.tensors), default=0)

    @property
    def weight_map(self) -> dict[str, str]:
        """Output file by tensor name."""
        return {name: shard.file for shard in self.shards for name in shard.names}
