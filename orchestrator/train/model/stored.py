"""Reading parameters from the base's files, whichever way they are stored: as one tensor, or assembled from several.

Only the tensors that are needed are read: one expert of a stacked parameter takes one expert's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.integrations import finegrained_fp8, mxfp4

from orchestrator.anatomy.values import StoredPart, TensorInfo
from orchestrator.errors import BaseError

Reader = Callable[[str], torch.Tensor]
"""Returns a stored tensor of one file by name."""


def read_parameters(
    folder: Path | str, tensors: Iterable[TensorInfo], convert: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
) -> dict[str, torch.Tensor]:
    """Return these parameters by name. Each file is opened once, and a parameter that is one tensor is not copied.

    Args:
        convert: Applied to every stored tensor: to another type or device.

    Raises:
        BaseError: a file or a tensor cannot be read, or is stored in a form that only transformers can convert.
    """
    tensors = list(tensors)
    parts = [part for info in tensors for part in info.stored_parts]
    wanted: dict[str, set[str]] = {}
    for part in parts:
        wanted.setdefault(part.file, set()).add(part.encoding.data if part.encoding else part.name)
        if part.encoding is not None:
            wanted.setdefault(part.encoding.scales_file, set()).add(part.encoding.scales)
    stored: dict[tuple[str, str], torch.Tensor] = {}
    for file, names in wanted.items():
        path = Path(folder) / file
        try:
            with safe_open(path, framework="pt", device="cpu") as reader:
                stored |= {(file, name): reader.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise BaseError(f"the weights cannot be read: {error}", where=str(path)) from error
    found = {(part.file, part.name): convert(_decoded(part, stored)) for part in parts}
    return {info.name: _assembled(info, found) for info in tensors}


def _decoded(part: StoredPart, stored: Mapping[tuple[str, str], torch.Tensor]) -> torch.Tensor:
    """Return a stored tensor with the values that transformers gives it when loading."""
    encoding = part.encoding
    if encoding is None:
        return stored[part.file, part.name]
    data, scales = stored[part.file, encoding.data], stored[encoding.scales_file, encoding.scales]
    dtype = torch.bfloat16
    if encoding.kind == "mxfp4":
        return mxfp4.dequantize_convertops(data, scales, dtype)
    return finegrained_fp8.Fp8Dequantize(None)._dequantize_one(data, scales, dtype)  # pyright: ignore[reportPrivateUsage]


def part_of(info: TensorInfo, index: tuple[int, ...]) -> TensorInfo:
    """Return the slice of a stacked parameter at `index` (one expert), to be read or merged like a parameter of its own.

    Args:
        info: With `parts`, each at a position of the leading dimensions.
    """
    parts = tuple(part.model_copy(update={"index": ()}) for part in info.parts if part.index == index)
    return info.model_copy(update={"shape": info.shape[len(index) :], "parts": parts})


def oriented(tensor: torch.Tensor, part: StoredPart) -> torch.Tensor:
    """Return the stored tensor as the parameter holds it: a view, transposed and narrowed to the part's rows."""
    if part.transposed:
        tensor = tensor.transpose(-2, -1)
    return tensor.narrow(part.axis, part.offset, part.length) if part.length else tensor


def place_of(parameter: torch.Tensor, part: StoredPart) -> torch.Tensor:
    """Return the view of a parameter that the part fills."""
    target = parameter[part.index] if part.index else parameter
    if not part.shape:
        return target
    return target.narrow(part.axis, part.start, part.length or part.oriented_shape[part.axis])


def _assembled(info: TensorInfo, found: Mapping[tuple[str, str], torch.Tensor]) -> torch.Tensor:
    if not info.parts:
        return found[info.file, info.stored_name or info.name]
    first = found[info.parts[0].file, info.parts[0].name]
    parameter = torch.empty(info.shape, dtype=first.dtype, device=first.device)
    for part in info.parts:
        if part.operation:
            raise BaseError(
                f"{info.name} is computed from {part.name} by transformers' {part.operation}, which is not supported here",
                where=part.file,
            )
        place_of(parameter, part).copy_(oriented(found[part.file, part.name], part))
    return parameter
