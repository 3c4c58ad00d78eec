"""The merge plan: what becomes of every tensor of the base, with every shape checked before any file is written.

    plan = make_merge_plan(anatomy, artifact_folder, base_load, selection, merge_into="auto")

Only headers are read here: those of the base's shards and those of the trained weights (`adapter/` as PEFT writes it, `delta/`
with whole changed tensors, or both).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy, Pooling, TensorInfo
from orchestrator.anatomy.weights import read_header
from orchestrator.errors import BaseError
from orchestrator.spec.models import Task
from orchestrator.values import Value
from orchestrator.work.artifact import Artifact, StoredAdapter, read_artifact
from orchestrator.work.execution import BaseLoad, Padding

MergedInto = Literal["dequantized", "original"]


class Keep(Value):
    """Copy the base's tensor unchanged."""

    kind: Literal["keep"] = "keep"


class ApplyAdapter(Value):
    """Write the base's tensor with its adapter, computed in float32 and rounded once."""

    kind: Literal["apply_adapter"] = "apply_adapter"
    adapter: StoredAdapter


class Replace(Value):
    """Write a trained tensor instead of the base's."""

    kind: Literal["replace"] = "replace"
    trained: TensorInfo


class Dequantize(Value):
    """Write the base's tensor as training used it: quantized to nf4 and dequantized (Dettmers et al. 2023), plus the adapter,
    if any."""

    kind: Literal["dequantize"] = "dequantize"
    adapter: StoredAdapter | None = None


class NewTensor(Value):
    """Write a trained tensor that the base does not have: a classifier, or the copy of a tied head."""

    kind: Literal["new"] = "new"
    trained: TensorInfo


Operation = Annotated[Keep | ApplyAdapter | Replace | Dequantize | NewTensor, Field(discriminator="kind")]


HEAD_FILE = "head.safetensors"
"""File of a classifier that no transformers class has, with `weight` [classes, hidden] and, where it has one, `bias`."""


class WriteTensor(Value):
    """One tensor of the output. `source` is the base's tensor, or None for a new one."""

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
    """`dequantized`: weights that were quantized in training go through nf4 first. `original`: the stored base."""
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
        artifact_folder: Folder with `adapter/` or `delta/` or both.
        selection: If given, the trained tensors must be exactly those it names.
        merge_into: `auto`: the base as training used it; `original`: the stored one, even if training quantized it.
        held_dtype: Compute dtype of the training.

    Raises:
        BaseError: the base has no weights, or its files changed.
        SelectionError: the trained tensors do not fit the base; names the tensor.
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
    head = None if base_load.pooling.by_class else _head_file(new)
    new = new if head is None else []
    if anatomy.tied and anatomy.head_weight in artifact.adapters:
        new.append(_untied_head(anatomy, artifact))
    return MergePlan(
        base_folder=anatomy.folder,
        artifact_folder=str(Path(artifact_folder).resolve()),
        merged_into="dequantized" if dequantized else "original",
        held_dtype=held_dtype,
        task=base_load.task,
        class_names=base_load.class_names,
        pooling=base_load.pooling,
        padding=base_load.padding,
        unties_head=anatomy.tied and (anatomy.head_weight in artifact.whole or anatomy.head_weight in artifact.adapters),
        shards=_shards(Path(anatomy.folder), tensors, new),
        head=head,
    )


def _operation(name: str, artifact: Artifact, held_quantized: set[str]) -> Operation:
    """Return the operation on one tensor. Unfrozen matrices were trained in 16 bits, so only the others of the blocks went
    through nf4."""
    adapter = artifact.adapters.get(name)
    if name in artifact.whole:
        return Replace(trained=artifact.whole[name])
    if name in held_quantized:
        return Dequantize(adapter=adapter)
    return ApplyAdapter(adapter=adapter) if adapter else Keep()


def _new_tensor(name: str, trained: TensorInfo, anatomy: ModelAnatomy) -> WriteTensor:
    dtype = next(iter(anatomy.tensors.values())).dtype
    return WriteTensor(name=name, shape=trained.shape, dtype=dtype, operation=NewTensor(trained=trained))


def _head_file(new: list[WriteTensor]) -> WriteShard:
    """Return the file of a classifier, the only new tensors of a base that pools by itself, under plain names."""
    tensors = [tensor.model_copy(update={"name": tensor.name.rpartition(".")[2]}) for tensor in new]
    return WriteShard(file=HEAD_FILE, tensors=tuple(tensors))


def _untied_head(anatomy: ModelAnatomy, artifact: Artifact) -> WriteTensor:
    """Return a tied output projection with an adapter: the embedding's weights with it, as a tensor of its own."""
    embedding = anatomy.tensors[anatomy.embeddings[0]]
    return WriteTensor(
        name=anatomy.head_weight,
        shape=embedding.shape,
        dtype=embedding.dtype,
        operation=ApplyAdapter(adapter=artifact.adapters[anatomy.head_weight]),
        source=embedding,
    )


def _shards(base: Path, tensors: Mapping[str, WriteTensor], new: list[WriteTensor]) -> tuple[Shard, ...]:
    """Return the base's own shards, ordered by name, and one more for new tensors."""
    by_file: dict[str, list[WriteTensor]] = {}
    for tensor in tensors.values():
        assert tensor.source is not None
        by_file.setdefault(tensor.source.file, []).append(tensor)
    groups = [(file, by_file[file]) for file in sorted(by_file)] + ([("", new)] if new else [])
    names = _file_names([file for file, _ in groups])
    return tuple(_shard(base, name, file, group) for name, (file, group) in zip(names, groups, strict=True))


def _file_names(base_files: list[str]) -> list[str]:
    """Return the output names: the base's if there is only one shard, else numbered as transformers numbers them."""
    count = len(base_files)
    if "" not in base_files and count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _shard(base: Path, file: str, base_file: str, tensors: list[WriteTensor]) -> Shard:
    if base_file and all(tensor.operation.kind == "keep" for tensor in tensors):
        names = tuple(tensor.name for tensor in tensors)
        # A shard that also stores tensors which the output drops cannot be linked.
        if set(read_header(base / base_file)) == set(names):
            return LinkShard(file=file, base_file=base_file, names=names, num_bytes=sum(t.num_bytes for t in tensors))
    return WriteShard(file=file, tensors=tuple(tensors))
