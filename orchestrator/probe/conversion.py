"""transformers' weight conversions, computed on where elements come from instead of on elements.

A `Symbolic` tensor says of every box of elements which box of which stored tensor it is. The operations that only move elements
(`transformers.core_model_loading`: stack, concatenate, chunk, split, transpose) are computed on it exactly, without memory. One
that computes new values or orders them in another way is not known here, and its name is the tensor's `operation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from transformers import core_model_loading as loading

from orchestrator.anatomy.values import StoredPart, TensorInfo

Axis = TypeVar("Axis")


@dataclass(frozen=True)
class Box:
    """A box of a tensor, and the box of a stored tensor that it is."""

    source: TensorInfo
    at: tuple[int, ...]
    """First element in each dimension of the tensor."""
    size: tuple[int, ...]
    axes: tuple[int | None, ...]
    """For each dimension of the tensor that of the stored one, or None for one that stacking added (of size 1)."""
    offset: tuple[int, ...]
    """First element in each dimension of the stored tensor."""


@dataclass(frozen=True)
class Symbolic:
    """A tensor whose elements are those of stored tensors."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    operation: str = ""
    """The operation on its elements that is not known; its shape is then that of the stored tensor."""


Collected = dict[str, list[Symbolic]]
"""Pattern -> tensors that were collected for it, in order."""


@dataclass(frozen=True)
class Conversion:
    """What an operation is given besides its tensors."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    full_name: str
    """Name of the first parameter that is converted."""
    shape_of: Callable[[str], tuple[int, ...]]
    """Shape of a parameter of the class, by name."""


def stored(info: TensorInfo) -> Symbolic:
    """Return a stored tensor as it is."""
    rank = len(info.shape)
    whole = Box(source=info, at=(0,) * rank, size=info.shape, axes=tuple(range(rank)), offset=(0,) * rank)
    return Symbolic(shape=info.shape, boxes=(whole,))


def stack(tensors: Sequence[Symbolic], dim: int) -> Symbolic:
    boxes = [
        replace(
            box, at=_insert(box.at, dim, number), size=_insert(box.size, dim, 1), axes=(*box.axes[:dim], None, *box.axes[dim:])
        )
        for number, tensor in enumerate(tensors)
        for box in tensor.boxes
    ]
    return Symbolic(_insert(tensors[0].shape, dim, len(tensors)), tuple(boxes), _unknown_of(tensors))


def concatenate(tensors: Sequence[Symbolic], dim: int) -> Symbolic:
    boxes: list[Box] = []
    end = 0
    for tensor in tensors:
        boxes += [replace(box, at=_changed(box.at, dim, box.at[dim] + end)) for box in tensor.boxes]
        end += tensor.shape[dim]
    return Symbolic(_changed(tensors[0].shape, dim, end), tuple(boxes), _unknown_of(tensors))


def narrow(tensor: Symbolic, dim: int, start: int, length: int) -> Symbolic:
    boxes: list[Box] = []
    for box in tensor.boxes:
        first, last = max(box.at[dim], start), min(box.at[dim] + box.size[dim], start + length)
        if first >= last:
            continue
        axis, offset = box.axes[dim], box.offset
        if axis is not None:
            offset = _changed(offset, axis, offset[axis] + first - box.at[dim])
        boxes.append(
            replace(box, at=_changed(box.at, dim, first - start), size=_changed(box.size, dim, last - first), offset=offset)
        )
    return Symbolic(_changed(tensor.shape, dim, length), tuple(boxes), tensor.operation)


def transpose(tensor: Symbolic, first: int, second: int) -> Symbolic:
    boxes = [
        replace(
            box,
            at=_swapped(box.at, first, second),
            size=_swapped(box.size, first, second),
            axes=_swapped(box.axes, first, second),
        )
        for box in tensor.boxes
    ]
    return Symbolic(_swapped(tensor.shape, first, second), tuple(boxes), tensor.operation)


def convert(operations: Sequence[loading.ConversionOps], collected: Collected, given: Conversion) -> dict[str, Symbolic]:
    """Return the converted tensors by target pattern, as `WeightConverter.convert` computes them."""
    tensors = collected
    for operation in operations:
        known = OPERATIONS.get(type(operation).__name__)
        if known is None:
            boxes = tuple(box for group in tensors.values() for tensor in group for box in tensor.boxes)
            name = type(operation).__name__
            return {target: Symbolic(boxes[0].source.shape, boxes, name) for target in given.targets}
        tensors = known(operation, tensors, given)
    return {target: group[0] for target, group in tensors.items()}


def _merge_modules(operation: loading.MergeModulelist, tensors: Collected, given: Conversion) -> Collected:
    return {
        operation.get_target_pattern(len(tensors), source, list(given.targets)): [stack(group, operation.dim)]
        for source, group in tensors.items()
    }


def _concatenate(operation: loading.Concatenate, tensors: Collected, given: Conversion) -> Collected:
    ordered = [tensor for source in given.sources for tensor in tensors.get(source, [])]
    return {given.targets[0]: [concatenate(ordered, operation.dim)]}


def _chunk(operation: loading.Chunk, tensors: Collected, given: Conversion) -> Collected:
    ((tensor, *_),) = tensors.values()
    # As torch.chunk: equal sizes, the last one with what is left.
    size = math.ceil(tensor.shape[operation.dim] / len(given.targets))
    starts = range(0, tensor.shape[operation.dim], size)
    return {
        target: [narrow(tensor, operation.dim, start, min(size, tensor.shape[operation.dim] - start))]
        for target, start in zip(given.targets, starts, strict=False)
    }


def _split(operation: loading.Split, tensors: Collected, given: Conversion) -> Collected:
    ((tensor, *_),) = tensors.values()
    result: Collected = {}
    start = 0
    for target in given.targets:
        size = given.shape_of(given.full_name.replace(given.targets[0], target))[operation.dim]
        result[target] = [narrow(tensor, operation.dim, start, size)]
        start += size
    return result


def _transpose(operation: loading.Transpose, tensors: Collected, given: Conversion) -> Collected:
    ((tensor, *_),) = tensors.values()
    # The first of several operations keeps the source's pattern, as `Transpose.get_target_pattern`.
    target = given.targets[0] if len(given.targets) == 1 else given.sources[0]
    if operation.check_dims and tensor.shape == given.shape_of(given.full_name):
        return {target: [tensor]}
    return {target: [transpose(tensor, operation.dim0, operation.dim1)]}


def _fuse_two_kinds_of_experts(
    operation: loading.ErnieFuseAndSplitTextVisionExperts, tensors: Collected, given: Conversion
) -> Collected:
    result: Collected = {target: [] for target in given.targets}
    for source in given.sources:
        size = math.ceil(len(tensors[source]) / len(given.targets))
        for number, target in enumerate(given.targets):
            result[target].append(stack(tensors[source][number * size : (number + 1) * size], operation.stack_dim))
    return {target: [concatenate(group, operation.concat_dim)] for target, group in result.items()}


OPERATIONS: dict[str, Callable[..., Collected]] = {
    loading.MergeModulelist.__name__: _merge_modules,
    loading.Concatenate.__name__: _concatenate,
    loading.Chunk.__name__: _chunk,
    loading.Split.__name__: _split,
    loading.Transpose.__name__: _transpose,
    loading.ErnieFuseAndSplitTextVisionExperts.__name__: _fuse_two_kinds_of_experts,
}
"""Name of the class -> what it does. By name, so that a class derived from one of these is not taken for it."""


def as_parts(tensor: Symbolic) -> tuple[StoredPart, ...]:
    """Return the stored parts of a tensor, in its order."""
    if tensor.operation:
        return tuple(_part(box, operation=tensor.operation) for box in tensor.boxes)
    return tuple(_as_part(box, tensor.shape) for box in tensor.boxes)


def _as_part(box: Box, shape: tuple[int, ...]) -> StoredPart:
    num_stacked = next((number for number, axis in enumerate(box.axes) if axis is not None), len(box.axes))
    axes = box.axes[num_stacked:]
    straight = tuple(range(len(box.source.shape)))
    transposed = len(straight) > 1 and axes == (*straight[:-2], straight[-1], straight[-2])
    if axes != straight and not transposed:
        return _part(box, operation=f"a permutation {axes}")
    at, size = box.at[num_stacked:], box.size[num_stacked:]
    oriented = tuple(box.source.shape[axis] for axis in axes if axis is not None)
    offset = tuple(box.offset[axis] for axis in axes if axis is not None)
    # Dimensions in which the box is not all of both: at most one can be told.
    partial = [dim for dim in range(len(size)) if size[dim] != oriented[dim] or size[dim] != shape[num_stacked + dim]]
    if len(partial) > 1:
        return _part(box, operation=f"a box of {len(partial)} dimensions")
    axis = partial[0] if partial else 0
    whole = not size or size[axis] == oriented[axis]
    return _part(
        box,
        index=box.at[:num_stacked],
        start=at[axis] if size else 0,
        axis=axis,
        transposed=transposed,
        offset=0 if whole else offset[axis],
        length=0 if whole else size[axis],
    )


def _part(box: Box, **place: object) -> StoredPart:
    source = box.source
    return StoredPart.model_validate({**source.model_dump(include={"name", "file", "shape", "dtype", "encoding"}), **place})


def _unknown_of(tensors: Sequence[Symbolic]) -> str:
    return next((tensor.operation for tensor in tensors if tensor.operation), "")


def _insert(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim:])


def _changed(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _swapped(values: tuple[Axis, ...], first: int, second: int) -> tuple[Axis, ...]:
    changed = list(values)
    changed[first], changed[second] = changed[second], changed[first]
    return tuple(changed)
