"""Names both ways: which stored tensors each parameter of a class is made of.

    names = map_names(model, stored)
    names.check(model_type, folder, needed=text_parameters)

The names are found as `from_pretrained` finds them, by transformers' own conversion mapping for the class
(`transformers.conversion_mapping`, `core_model_loading.convert_and_load_state_dict_in_model`); no weight is read. The same map
the other way says which parameters a stored tensor is made of, so a merge writes the names that the base had.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, dot_natural_key, rename_source_key

from orchestrator.anatomy.odd import no_head_error
from orchestrator.anatomy.values import TensorInfo
from orchestrator.errors import BaseError
from orchestrator.probe.conversion import Collected, Conversion, Symbolic, as_parts, convert
from orchestrator.probe.conversion import stored as symbolic
from orchestrator.values import Value


class NameMap(Value):
    """The parameters and persistent buffers of a class, as a checkpoint stores them."""

    tensors: dict[str, TensorInfo]
    """By name in the class, each with its shape there, and `stored_name` or `parts` where it is stored otherwise. A tied
    parameter is there only if it is stored."""
    buffers: tuple[str, ...] = ()
    """Those of `tensors` that are buffers (a router's correction): stored and loaded, never trained."""
    missing: tuple[str, ...] = ()
    """Parameters and buffers that are neither stored nor tied to one that is: new for the task, or lost."""
    tied: dict[str, str] = {}
    """Parameter that is not stored -> the one in `tensors` whose tensor it shares."""
    stored_twice: dict[str, str] = {}
    """Parameter that the class ties -> the one it is tied to, where both are stored. transformers ties them only if they are
    equal, element by element."""
    extra: tuple[TensorInfo, ...] = ()
    """Stored tensors that the class does not have."""
    ignored: tuple[str, ...] = ()
    """Those of `extra` that transformers leaves out without a word: buffers of older versions."""
    mismatched: dict[str, tuple[int, ...]] = {}
    """Parameter -> its shape as stored, where it is not that of the class. Not in `tensors`."""

    @property
    def copies(self) -> tuple[TensorInfo, ...]:
        """The stored copies of tied parameters, as `ModelAnatomy.copies`."""
        return tuple(
            self.tensors[target].model_copy(update={"name": source, "stored_name": self.tensors[target].stored_name or target})
            for target, source in self.stored_twice.items()
        )

    def unknown_operation(self, name: str) -> str:
        """Return what transformers computes for a parameter when loading that is not known here, or nothing."""
        return next((part.operation for part in self.tensors[name].parts if part.operation), "")

    def check(self, model_type: str, folder: str, *, needed: Collection[str], head: str = "") -> None:
        """Check that the parameters that are read or trained are stored, in the shape of the class.

        Args:
            needed: Names in the class. Of tied parameters those that the class counts as the first.
            head: The one among them that is the output projection.

        Raises:
            BaseError: one is missing, has another shape, or is computed by an operation that is not known here.
        """
        for name, shape in self.mismatched.items():
            if name in needed:
                raise BaseError(
                    f"{name} is stored with shape {list(shape)}, which is not that of a {model_type} with this config",
                    where=folder,
                    remedy="config.json and weights belong to different models; copy both from the same source",
                )
        missing = sorted(set(needed).intersection(self.missing))
        if missing == [head]:
            raise no_head_error(folder, head, [tensor.name for tensor in self.extra])
        if missing:
            raise BaseError(
                f"{len(missing)} tensors missing: {', '.join(missing[:3])}",
                where=folder,
                expected=f"the {len(needed)} tensors of a {model_type}",
                remedy="copy the base again; config.json and weights must belong to the same model",
            )
        for name in needed:
            if name in self.tensors and (operation := self.unknown_operation(name)):
                raise BaseError(
                    f"{name} is computed from what is stored by transformers' {operation}, which is not supported",
                    where=folder,
                    expected="weights that are renamed, stacked, concatenated, split or transposed",
                    remedy="load the base with transformers, and save it with `save_pretrained(..., save_original_format=False)`",
                )


def map_names(model: PreTrainedModel, stored: Mapping[str, TensorInfo]) -> NameMap:
    """Return how each parameter of a class is stored.

    Args:
        model: On the meta device is enough; its values are not read.
        stored: The checkpoint's tensors by stored name (`anatomy.weights.read_weights`).
    """
    transforms = get_model_conversion_mapping(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    plain, collected, extra = _collect(model, transforms, stored, shapes)
    found = {name: _renamed(name, info) for name, info in plain.items()}
    for first, (converter, tensors) in collected.items():
        found |= _converted(first, converter, tensors, shapes)
    fitting = {name: info for name, info in found.items() if info.shape == shapes.get(name) or _is_unknown(info)}
    stored_twice = {target: source for target, source in _tied_keys(model).items() if {target, source} <= fitting.keys()}
    tied = _share(model, fitting)
    buffers = {name for name, _ in model.named_buffers()}
    optional = model._keys_to_ignore_on_load_missing or ()  # pyright: ignore[reportPrivateUsage]
    taken = fitting.keys() | found.keys() | tied.keys()
    kept = set(_not_ignored([info.name for info in extra], _ignored_patterns(model)))
    return NameMap(
        tensors={name: fitting[name].model_copy(update={"shape": shapes[name]}) for name in shapes if name in fitting},
        buffers=tuple(name for name in shapes if name in fitting and name in buffers),
        missing=tuple(name for name in _not_ignored(shapes, optional) if name not in taken),
        tied=tied,
        stored_twice=stored_twice,
        extra=tuple(extra),
        ignored=tuple(info.name for info in extra if info.name not in kept),
        mismatched={
            name: info.shape for name, info in found.items() if name in shapes and name not in fitting and name not in tied
        },
    )


def _collect(
    model: PreTrainedModel,
    transforms: list[WeightTransform],
    stored: Mapping[str, TensorInfo],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, TensorInfo], dict[str, tuple[WeightConverter, Collected]], list[TensorInfo]]:
    """Return the parameters that are stored as one tensor, what is collected for each conversion by the name of its first
    parameter, and the tensors that the class does not have.

    In the order, and by the rules, of `convert_and_load_state_dict_in_model`.
    """
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, known = model.base_model_prefix, dict(shapes)
    plain: dict[str, TensorInfo] = {}
    collected: dict[str, tuple[WeightConverter, Collected]] = {}
    extra: list[TensorInfo] = []
    for original in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(original, renamings, converters, prefix, known)
        if name not in shapes and original in shapes:
            name, pattern = rename_source_key(original, [], [], prefix, known)
        if name not in shapes or name in plain or (pattern is None and name in collected):
            extra.append(stored[original])
        elif pattern is None:
            plain[name] = stored[original]
        else:
            _, tensors = collected.setdefault(name, (by_pattern[pattern], {}))
            tensors.setdefault(pattern, []).append(symbolic(stored[original]))
    return plain, collected, extra


def _converted(
    first: str, converter: WeightConverter, tensors: Collected, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorInfo]:
    """Return the parameters of one conversion by name in the class."""
    given = Conversion(
        sources=tuple(converter.source_patterns),
        targets=tuple(converter.target_patterns),
        full_name=first,
        shape_of=lambda name: shapes[name],
    )
    results = convert(converter.operations, tensors, given)
    # The results are named by target pattern; what stands around the pattern in the first name stands around each.
    full = first.replace("*.", "0.")
    pattern = next((pattern for pattern in results if pattern in full), "")
    before, _, after = full.partition(pattern) if pattern else ("", "", "")
    return {before + target + after: _assembled(before + target + after, tensor) for target, tensor in results.items()}


def _assembled(name: str, tensor: Symbolic) -> TensorInfo:
    parts = as_parts(tensor)
    part = parts[0]
    if len(parts) == 1 and part.shape == tensor.shape and not (part.transposed or part.length or part.operation):
        source = TensorInfo(name=part.name, shape=part.shape, dtype=part.dtype, file=part.file, encoding=part.encoding)
        return _renamed(name, source)
    return TensorInfo(name=name, shape=tensor.shape, dtype=part.dtype, file=part.file, parts=parts)


def _renamed(name: str, info: TensorInfo) -> TensorInfo:
    return info.model_copy(update={"name": name, "stored_name": "" if info.name == name else info.name})


def _is_unknown(info: TensorInfo) -> bool:
    return any(part.operation for part in info.parts)


def _tied_keys(model: PreTrainedModel) -> dict[str, str]:
    """Return target -> source of the parameters that the class ties with this config, without regular expressions."""
    return dict(model.all_tied_weights_keys)


def _share(model: PreTrainedModel, found: dict[str, TensorInfo]) -> dict[str, str]:
    """Return the tied parameters that are not stored with the one that they share.

    As `PreTrainedModel.tie_weights`: where only the target is stored, the source takes its tensor; it is added to `found` and
    the target removed, so that the first name of a group is always the one that holds the tensor.
    """
    keys = _tied_keys(model)
    for target, source in keys.items():
        if source not in found and target in found:
            info = found.pop(target)
            found[source] = info.model_copy(update={"name": source, "stored_name": info.stored_name or info.name})
    return {target: source for target, source in keys.items() if target not in found and source in found}


def _not_ignored(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that none of the regular expressions finds."""
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def _ignored_patterns(model: PreTrainedModel) -> list[str]:
    """Return what transformers leaves out without a warning, as `PreTrainedModel._adjust_missing_and_unexpected_keys`."""
    buffers = [name for name, _ in model.named_buffers()]
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())  # pyright: ignore[reportPrivateUsage]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return patterns
