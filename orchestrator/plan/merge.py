"""The merge as a value: what becomes of every tensor of the base, with every shape checked before a byte is touched.

    plan = make_merge_plan(anatomy, artifact_folder, base_load, selection, merge_into="auto")

Only headers are read here: those of the base's shards and those of what was trained (`adapter/` as PEFT writes it,
`delta/` with whole changed tensors, or both).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.anatomy.headers import read_header
from orchestrator.anatomy.values import LayerSelection, ModelAnatomy, TensorInfo
from orchestrator.errors import BaseError
from orchestrator.spec.models import Task
from orchestrator.values import Value
from orchestrator.work.artifact import Artifact, LowRank, read_artifact
from orchestrator.work.execution import BaseLoad

MergedInto = Literal["dequantized", "original"]


class Keep(Value):
    """The base's tensor, byte for byte."""

    kind: Literal["keep"] = "keep"


class AddLowRank(Value):
    """W + scale * B @ A (Hu et al. 2021), accumulated in float32, rounded once."""

    kind: Literal["add_low_rank"] = "add_low_rank"
    low_rank: LowRank


class Replace(Value):
    """A whole trained tensor in the place of the base's."""

    kind: Literal["replace"] = "replace"
    trained: TensorInfo


class Dequantize(Value):
    """The base's tensor as training held it: through nf4 and back (Dettmers et al. 2023), then the adapter, if any."""

    kind: Literal["dequantize"] = "dequantize"
    low_rank: LowRank | None = None


class NewTensor(Value):
    """A trained tensor that the base does not have: a classifier, or the copy of a tied head."""

    kind: Literal["new"] = "new"
    trained: TensorInfo


Operation = Annotated[Keep | AddLowRank | Replace | Dequantize | NewTensor, Field(discriminator="kind")]


class WriteTensor(Value):
    """One tensor of the output. `source` is the base's tensor; None for a new one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    operation: Operation
    source: TensorInfo | None = None

    @property
    def num_bytes(self) -> int:
        return TensorInfo(name=self.name, shape=self.shape, dtype=self.dtype).num_bytes


class LinkShard(Value):
    """A shard of the base in which nothing changes: a hard link, or a copy where links are not possible."""

    kind: Literal["link"] = "link"
    file: str
    base_file: str
    names: tuple[str, ...]
    num_bytes: int
    """Bytes of its tensors."""


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
    """Everything that the merge will do. Files are relative to `base_folder`, trained files to `artifact_folder`."""

    base_folder: str
    artifact_folder: str
    merged_into: MergedInto
    """`dequantized`: the weights that training held quantized go through nf4 first. `original`: the stored base."""
    held_dtype: Literal["bfloat16", "float32"]
    """What training dequantized to."""
    task: Task
    class_names: tuple[str, ...] = ()
    unties_head: bool = False
    shards: tuple[Shard, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all output tensors, headers not counted."""
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def largest_tensor_bytes(self) -> int:
        return max((t.num_bytes for shard in self.shards if isinstance(shard, WriteShard) for t in shard.tensors), default=0)

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> output file."""
        return {name: shard.file for shard in self.shards for name in shard.names}


def make_merge_plan(
    anatomy: ModelAnatomy,
    artifact_folder: Path | str,
    base_load: BaseLoad,
    selection: LayerSelection | None = None,
    *,
    merge_into: Literal["auto", "original"] = "auto",
    held_dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> MergePlan:
    """Decide what becomes of every tensor.

    Args:
        artifact_folder: Holds `adapter/` or `delta/` or both.
        selection: When given, what was trained must be exactly what it says.
        merge_into: `auto` is the base as training held it; `original` the stored one, also when training had it quantized.
        held_dtype: What training computed in.

    Raises:
        BaseError: the base has no weights, or its files changed.
        SelectionError: what was trained does not fit the base; names the tensor.
    """
    if not anatomy.has_weights:
        raise BaseError("the folder has no weights", where=anatomy.folder, remedy="put the base's safetensors files there")
    artifact = read_artifact(Path(artifact_folder))
    artifact.check(anatomy, base_load.num_classes if base_load.traits.head.is_new else 0, selection)
    dequantized = base_load.quantize == "nf4" and merge_into == "auto"
    held_quantized = {name for linears in anatomy.linears for name in linears} if dequantized else set[str]()
    dropped = {anatomy.head_weight} if base_load.traits.head.is_new and anatomy.kind == "decoder" else set[str]()
    tensors = {
        name: WriteTensor(
            name=name,
            shape=info.shape,
            dtype=info.dtype,
            operation=_operation(name, artifact, held_quantized),
            source=info,
        )
        for name, info in anatomy.tensors.items()
        if name not in dropped
    }
    new = [_new_tensor(name, info, anatomy) for name, info in artifact.whole.items() if name not in anatomy.tensors]
    if anatomy.tied and anatomy.head_weight in artifact.low_rank:
        new.append(_untied_head(anatomy, artifact))
    return MergePlan(
        base_folder=anatomy.folder,
        artifact_folder=str(Path(artifact_folder).resolve()),
        merged_into="dequantized" if dequantized else "original",
        held_dtype=held_dtype,
        task=base_load.task,
        class_names=base_load.class_names,
        unties_head=anatomy.tied and (anatomy.head_weight in artifact.whole or anatomy.head_weight in artifact.low_rank),
        shards=_shards(Path(anatomy.folder), tensors, new),
    )


def _operation(name: str, artifact: Artifact, held_quantized: set[str]) -> Operation:
    """What learned whole was held in 16 bits, so only the other matrices of the blocks went through nf4."""
    low_rank = artifact.low_rank.get(name)
    if name in artifact.whole:
        return Replace(trained=artifact.whole[name])
    if name in held_quantized:
        return Dequantize(low_rank=low_rank)
    return AddLowRank(low_rank=low_rank) if low_rank else Keep()


def _new_tensor(name: str, trained: TensorInfo, anatomy: ModelAnatomy) -> WriteTensor:
    dtype = next(iter(anatomy.tensors.values())).dtype
    return WriteTensor(name=name, shape=trained.shape, dtype=dtype, operation=NewTensor(trained=trained))


def _untied_head(anatomy: ModelAnatomy, artifact: Artifact) -> WriteTensor:
    """A tied output projection with an adapter: the embedding's weights plus the product, as a tensor of its own."""
    embedding = anatomy.tensors[anatomy.embeddings[0]]
    return WriteTensor(
        name=anatomy.head_weight,
        shape=embedding.shape,
        dtype=embedding.dtype,
        operation=AddLowRank(low_rank=artifact.low_rank[anatomy.head_weight]),
        source=embedding,
    )


def _shards(base: Path, tensors: Mapping[str, WriteTensor], new: list[WriteTensor]) -> tuple[Shard, ...]:
    """The base's own shards, in the order of their names, and one more for what is new."""
    by_file: dict[str, list[WriteTensor]] = {}
    for tensor in tensors.values():
        assert tensor.source is not None
        by_file.setdefault(tensor.source.file, []).append(tensor)
    groups = [(file, by_file[file]) for file in sorted(by_file)] + ([("", new)] if new else [])
    names = _file_names([file for file, _ in groups])
    return tuple(_shard(base, name, file, group) for name, (file, group) in zip(names, groups, strict=True))


def _file_names(base_files: list[str]) -> list[str]:
    """Output names: the base's where the shards are the same, else numbered as transformers numbers them."""
    count = len(base_files)
    if "" not in base_files and count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _shard(base: Path, file: str, base_file: str, tensors: list[WriteTensor]) -> Shard:
    if base_file and all(tensor.operation.kind == "keep" for tensor in tensors):
        names = tuple(tensor.name for tensor in tensors)
        if set(read_header(base / base_file)) == set(names):
            return LinkShard(file=file, base_file=base_file, names=names, num_bytes=sum(t.num_bytes for t in tensors))
    return WriteShard(file=file, tensors=tuple(tensors))
