"""The merge plan: what becomes of every tensor of the base, with every shape checked before any file is written.

    plan = make_merge_plan(anatomy, artifact_folder, base_load, selection, merge_into="auto")

Only headers are read here: those of the base's shards and those of the trained weights (`adapter/` as PEFT writes it, `delta/`
with whole changed tensors, or both).

The trained weights have the parameter names of the class, the base's files their own: a parameter may be stored under another
name, in parts (one tensor for each expert), or together with others (a fused projection that the class splits). What is written
has the names, shapes and files of the base, found the other way round by `TensorInfo.parts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from orchestrator.anatomy.selection import NEW_ROWS
from orchestrator.anatomy.values import LayerSelection, ModelAnatomy, StoredPart, TensorInfo
from orchestrator.anatomy.weights import read_header
from orchestrator.errors import BaseError, SelectionError
from orchestrator.plan.merge_operations import (
    HEAD_FILE,
    WHOLE,
    ApplyAdapter,
    Compose,
    Dequantize,
    Keep,
    LinkShard,
    MergePlan,
    NewTensor,
    Operation,
    Place,
    Replace,
    Section,
    Shard,
    Single,
    WriteShard,
    WriteTensor,
)
from orchestrator.spec.models import ExtraTensors, Quantize
from orchestrator.work.artifact import Artifact, read_artifact
from orchestrator.work.execution import BaseLoad

Users = list[tuple[TensorInfo, StoredPart]]
"""The parameters that one stored tensor is a part of."""


def make_merge_plan(
    anatomy: ModelAnatomy,
    artifact_folder: Path | str,
    base_load: BaseLoad,
    selection: LayerSelection | None = None,
    *,
    merge_into: Literal["auto", "original"] = "auto",
    held_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    extra_tensors: ExtraTensors = "keep",
) -> MergePlan:
    """Decide what becomes of every tensor.

    Args:
        artifact_folder: Folder with `adapter/` or `delta/` or both.
        selection: If given, the trained tensors must be exactly those it names.
        merge_into: `auto`: the base as training used it; `original`: the stored one, even if training quantized it.
        held_dtype: Compute dtype of the training.
        extra_tensors: What becomes of stored tensors that the class does not have.

    Raises:
        BaseError: the base has no weights, or its files changed.
        SelectionError: the trained tensors do not fit the base; names the tensor.
    """
    if not anatomy.has_weights:
        raise BaseError("the folder has no weights", where=anatomy.folder, remedy="put the base's safetensors files there")
    artifact = read_artifact(Path(artifact_folder))
    artifact.check(anatomy, base_load.num_classes if base_load.traits.head.is_new else 0, selection)
    dequantized = base_load.quantize != "none" and merge_into == "auto"
    merge = _Merge(
        anatomy=anatomy,
        artifact=artifact,
        quantize=base_load.quantize,
        held_quantized={name for linears in anatomy.linears for name in linears} if dequantized else set[str](),
    )
    absent = {name: info for name, info in artifact.whole.items() if name not in anatomy.tensors}
    new = [_new_tensor(name, info, anatomy) for name, info in absent.items() if not name.endswith(f".{NEW_ROWS}")]
    head = None if base_load.pooling.by_class else _head_file(new)
    new = new if head is None else []
    if anatomy.tied and anatomy.head_weight in artifact.adapters:
        new.append(_untied_head(anatomy, artifact))
    unties_head = _unties_head(anatomy, artifact)
    dropped = {tensor.name for tensor in new} | _dropped(anatomy, unties_head=unties_head, new_head=base_load.traits.head.is_new)
    tensors = merge.stored_tensors(dropped, with_extra=extra_tensors == "keep")
    return MergePlan(
        base_folder=anatomy.folder,
        artifact_folder=str(Path(artifact_folder).resolve()),
        merged_into="dequantized" if dequantized else "original",
        held_dtype=held_dtype,
        task=base_load.task,
        class_names=base_load.class_names,
        pooling=base_load.pooling,
        padding=base_load.padding,
        unties_head=unties_head,
        shards=_shards(Path(anatomy.folder), tensors, new),
        head=head,
    )


def _dropped(anatomy: ModelAnatomy, *, unties_head: bool, new_head: bool) -> set[str]:
    """Return the stored names of output projections that another head replaces."""
    dropped: set[str] = set()
    if anatomy.tied and unties_head:
        # The copy of the head may be stored under another name than the class gives it.
        dropped |= {part.name for copy in anatomy.copies if copy.name == anatomy.embeddings[0] for part in copy.stored_parts}
    if new_head and anatomy.kind == "decoder":
        copies = (part for copy in anatomy.copies for part in copy.stored_parts)
        dropped |= {anatomy.head_weight, *(part.name for part in (*_parts(anatomy, anatomy.head_weight), *copies))}
    return dropped


def _unties_head(anatomy: ModelAnatomy, artifact: Artifact) -> bool:
    """Return whether the output has a head of its own though the base's config may tie it."""
    if not anatomy.tied:
        return anatomy.head_weight in anatomy.tensors
    return anatomy.head_weight in artifact.whole or anatomy.head_weight in artifact.adapters


@dataclass(frozen=True)
class _Merge:
    """What became of the parameters, on its way to the stored tensors."""

    anatomy: ModelAnatomy
    artifact: Artifact
    quantize: Quantize
    held_quantized: set[str]
    """Parameters that training held quantized, and that are merged as it used them."""
    users: dict[str, Users] = field(default_factory=dict[str, Users])
    """Stored name -> the parameters in it."""

    def stored_tensors(self, dropped: set[str], *, with_extra: bool) -> list[WriteTensor]:
        """Return the base's tensors as they are written, without those of these stored names."""
        for info in self.anatomy.tensors.values():
            for part in info.stored_parts:
                self.users.setdefault(part.name, []).append((info, part))
        tensors = [self._stored_tensor(name) for name in self.users if name not in dropped]
        # The copy of a parameter that was trained would not equal it any more, and without it the class ties them.
        copies = [copy for copy in self.anatomy.copies if not {copy.name, _new_rows_of(copy.name)} & self.artifact.whole.keys()]
        others = (*self.anatomy.buffers, *copies, *(self.anatomy.extra if with_extra else ()))
        kept = {part.name: part for info in others for part in info.stored_parts}
        return tensors + [_kept(part) for name, part in kept.items() if name not in dropped and name not in self.users]

    def _stored_tensor(self, name: str) -> WriteTensor:
        users = self.users[name]
        part = users[0][1]
        rows = self.artifact.whole.get(_new_rows_of(users[0][0].name))
        operations = [self._operation(info, part) for info, part in users]
        operation: Operation
        if rows is not None:
            operation = _with_new_rows(name, part.shape[0], rows, self.anatomy.new_rows)
        elif all(operation.kind == "keep" for operation in operations):
            operation = Keep()
        elif len(users) == 1 and not part.length:
            operation = operations[0]
        else:
            sections = [_section(part, operation) for (_, part), operation in zip(users, operations, strict=True)]
            operation = _composed(name, part.shape[0], sections)
        return _kept(part).model_copy(update={"operation": operation})

    def _operation(self, info: TensorInfo, part: StoredPart) -> Single:
        """Return the operation on the part of a parameter. Unfrozen matrices were trained in 16 bits, so only the others of the
        blocks were quantized."""
        adapter = self.artifact.adapters.get(info.name)
        trained = self.artifact.whole.get(info.name)
        place = _place(info, part)
        if trained is not None:
            return Replace(trained=trained, place=place)
        from_right = info.name in self.anatomy.transposed
        if adapter is not None and place.length and _logical_axis(info, place, from_right) == 1:
            raise SelectionError(
                f"the adapter of {info.name} cannot be merged into {part.name}, which holds some of its columns",
                where=part.file,
                expected="a stored tensor with whole rows of the weight",
                remedy="train it whole (`tune: full`), or leave it out of `modules`",
            )
        if info.name in self.held_quantized:
            parameter = info if info.parts else None
            return Dequantize(quantize=self.quantize, adapter=adapter, place=place, from_right=from_right, parameter=parameter)
        if adapter is not None:
            return ApplyAdapter(adapter=adapter, place=place, from_right=from_right)
        return Keep()


def _new_rows_of(name: str) -> str:
    """Return the name of the trained rows of new tokens of embeddings or an output projection."""
    return name.removesuffix("weight") + NEW_ROWS


def _with_new_rows(name: str, num_rows: int, trained: TensorInfo, new_rows: Sequence[int]) -> Compose:
    """Return the operation on embeddings or an output projection of which only the rows of new tokens were trained."""
    sections = [
        Section(start=row, stop=row + 1, operation=Replace(trained=trained, place=Place(start=number, length=1)))
        for number, row in enumerate(new_rows)
    ]
    return _composed(name, num_rows, sections)


def _place(info: TensorInfo, part: StoredPart) -> Place:
    if not info.parts:
        return WHOLE
    length = part.length or part.oriented_shape[part.axis]
    # All of the parameter along the axis: no need to narrow it.
    whole = length == info.shape[len(part.index) + part.axis]
    return Place(
        index=part.index,
        start=0 if whole else part.start,
        length=0 if whole else length,
        axis=0 if whole else part.axis,
        transposed=part.transposed,
    )


def _logical_axis(info: TensorInfo, place: Place, from_right: bool) -> int:
    """Return the dimension of the weight [out, in] along which a place counts; negative for one of the experts."""
    axis = len(place.index) + place.axis - (len(info.shape) - 2)
    return 1 - axis if from_right and axis >= 0 else axis


def _section(part: StoredPart, operation: Single) -> Section:
    if part.axis or part.transposed:
        raise BaseError(
            f"{part.name} is stored together with other parameters, column by column: it cannot be merged",
            where=part.file,
            expected="parameters that share a stored tensor row by row",
            remedy="load the base with transformers, and save it with `save_pretrained(..., save_original_format=False)`",
        )
    return Section(start=part.offset, stop=part.offset + (part.length or part.shape[0]), operation=operation)


def _composed(name: str, num_rows: int, sections: list[Section]) -> Compose:
    """Return the sections in order; rows that no parameter uses are kept."""
    ordered: list[Section] = []
    end = 0
    for section in sorted(sections, key=lambda section: section.start):
        assert section.start >= end, f"{name}: two parameters share row {section.start}"
        if section.start > end:
            ordered.append(Section(start=end, stop=section.start, operation=Keep()))
        ordered.append(section)
        end = section.stop
    if end < num_rows:
        ordered.append(Section(start=end, stop=num_rows, operation=Keep()))
    return Compose(sections=tuple(ordered))


def _parts(anatomy: ModelAnatomy, name: str) -> Iterable[StoredPart]:
    return anatomy.tensors[name].stored_parts if name in anatomy.tensors else ()


def _kept(part: StoredPart) -> WriteTensor:
    source = TensorInfo(name=part.name, shape=part.shape, dtype=part.dtype, file=part.file, encoding=part.encoding)
    return WriteTensor(name=part.name, shape=part.shape, dtype=part.dtype, operation=Keep(), source=source)


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


def _shards(base: Path, tensors: list[WriteTensor], new: list[WriteTensor]) -> tuple[Shard, ...]:
    """Return the base's own shards, ordered by name, and one more for new tensors."""
    by_file: dict[str, list[WriteTensor]] = {}
    for tensor in tensors:
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
    # A decoded tensor is another than the file's, also where its scales are in another shard.
    if base_file and all(tensor.operation.kind == "keep" and not _is_encoded(tensor) for tensor in tensors):
        names = tuple(tensor.name for tensor in tensors)
        # A shard that also stores tensors which the output drops cannot be linked.
        if set(read_header(base / base_file)) == set(names):
            return LinkShard(file=file, base_file=base_file, names=names, num_bytes=sum(t.num_bytes for t in tensors))
    return WriteShard(file=file, tensors=tuple(tensors))


def _is_encoded(tensor: WriteTensor) -> bool:
    return tensor.source is not None and tensor.source.encoding is not None
