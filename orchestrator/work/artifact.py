"""The artifact of a trial, read from file headers: adapters in PEFT's format, complete changed tensors, or both."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from orchestrator.anatomy.selection import NEW_ROWS
from orchestrator.anatomy.values import LayerSelection, ModelAnatomy, TensorInfo
from orchestrator.anatomy.weights import read_header
from orchestrator.errors import SelectionError
from orchestrator.spec.adapters import ADAPTER_KINDS, LORA_A, AdapterKind, AdapterName, Shape
from orchestrator.values import Value

ADAPTER, DELTA = "adapter", "delta"
ADAPTER_FILE, ADAPTER_CONFIG, DELTA_FILE = "adapter_model.safetensors", "adapter_config.json", "delta.safetensors"
PEFT_PREFIX = "base_model.model."
PEFT_ROWS = ".token_adapter.trainable_tokens_delta"
"""Suffix of PEFT's name for the trained rows of an embedding or output projection, in place of `.new_rows`."""
UNSUPPORTED: dict[str, object] = {
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""Options of PEFT's LoraConfig that no kind of adapter here has, and the value that each must have."""


class StoredAdapter(Value):
    """The adapter of one weight, as stored in its file."""

    kind: AdapterName
    tensors: dict[str, TensorInfo]
    """Its tensors by suffix; see `AdapterKind.shapes`."""
    alpha: float
    num_experts: int = 0
    """Number of experts whose A and B are in each tensor, of a stacked weight; else 0."""

    @property
    def lora_rank(self) -> int:
        return self.tensors[LORA_A].shape[0] // max(1, self.num_experts)

    @property
    def scale(self) -> float:
        """The factor of the product B @ A."""
        return ADAPTER_KINDS[self.kind].scale(self.alpha, self.lora_rank)


class Artifact(Value):
    """The trained tensors by the base's tensor names. Files are relative to `folder`."""

    folder: str
    adapters: dict[str, StoredAdapter]
    whole: dict[str, TensorInfo]

    def check(self, anatomy: ModelAnatomy, num_classes: int, selection: LayerSelection | None) -> None:
        """Check that every trained tensor exists in the base, with the same shape.

        Args:
            num_classes: Number of classes of the new classifier; 0 without one.

        Raises:
            SelectionError: names the tensor, and near names where the base does not have it.
        """
        for name, adapter in self.adapters.items():
            self._check_adapter(name, adapter, anatomy)
        shapes = {name: info.shape for name, info in anatomy.tensors.items()} | new_shapes(anatomy, num_classes)
        for name, info in self.whole.items():
            if name not in shapes:
                raise _unknown(self.folder, name, shapes)
            if info.shape != shapes[name]:
                raise SelectionError(
                    f"{name} was trained with shape {list(info.shape)}",
                    where=self.folder,
                    expected=f"{list(shapes[name])}, as in the base",
                    remedy="merge into the base that the trial was trained on",
                )
        if selection is not None:
            self._check_selection(selection, anatomy)

    def _check_adapter(self, name: str, adapter: StoredAdapter, anatomy: ModelAnatomy) -> None:
        if name not in (known := {*anatomy.tensors, anatomy.head_weight}):
            raise _unknown(self.folder, name, known)
        shape = anatomy.matrix_shape(name)
        found = {suffix: info.shape for suffix, info in adapter.tensors.items()}
        fits = len(shape) == 2 or (len(shape) == 3 and shape[0] == adapter.num_experts)
        expected = ADAPTER_KINDS[adapter.kind].shapes(shape, adapter.lora_rank) if fits else {}
        if found != expected:
            raise SelectionError(
                f"the adapter of {name} has {_spell_shapes(found)}",
                where=self.folder,
                expected=f"{_spell_shapes(expected)}, of a weight {list(shape)}"
                if expected
                else f"a matrix, not a weight {list(shape)}",
                remedy="merge into the base that the adapter was trained on",
            )

    def _check_selection(self, selection: LayerSelection, anatomy: ModelAnatomy) -> None:
        new = {anatomy.classifier_bias, *(info.name for info in anatomy.new_tensors)} - {""}
        for what, planned, found in (
            ("adapter", set(selection.adapted), self.adapters.keys()),
            ("trained tensor", set(selection.trainable), self.whole.keys()),
        ):
            wrong = sorted((planned ^ found) - new)
            if wrong:
                state = "is missing" if wrong[0] in planned else "was not planned"
                raise SelectionError(
                    f"the {what} of {wrong[0]} {state} ({len(wrong)} such)",
                    where=self.folder,
                    expected=f"exactly the tensors that the policy {selection.policy} selects: {len(planned)}",
                    remedy="the folder belongs to another trial or was not saved whole; train the trial again",
                )


def peft_modules(parameters: Iterable[str]) -> dict[str, str]:
    """Return the module name under which PEFT saves the adapter of each of these `target_parameters`.

    It wraps a module once for each of its parameters, in their order in the module: `experts.gate_up_proj` and
    `experts.down_proj` become `experts.base_layer` and `experts`.
    """
    by_module: dict[str, list[str]] = {}
    for name in parameters:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: module + ".base_layer" * (len(names) - 1 - number)
        for module, names in by_module.items()
        for number, name in enumerate(names)
    }


def new_shapes(anatomy: ModelAnatomy, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors that may be new: an untied head, the rows of new tokens; for `classify`, the classifier and an
    encoder's pooler."""
    widths = {anatomy.embeddings[0]: anatomy.embedding_width, anatomy.head_weight: anatomy.head_width} if anatomy.new_rows else {}
    rows = {name.removesuffix("weight") + NEW_ROWS: (len(anatomy.new_rows), width) for name, width in widths.items()}
    if not num_classes:
        return rows | {anatomy.head_weight: (anatomy.vocab_size, anatomy.head_width)}
    shapes: dict[str, tuple[int, ...]] = rows | {info.name: info.shape for info in anatomy.new_tensors}
    shapes[anatomy.classifier_weight] = (num_classes, anatomy.classifier_inputs)
    if anatomy.classifier_bias:
        shapes[anatomy.classifier_bias] = (num_classes,)
    return shapes


def read_artifact(folder: Path) -> Artifact:
    """Read the headers of `adapter/` and `delta/` in `folder`.

    Raises:
        SelectionError: neither exists; a tensor is empty, an adapter is incomplete, or its kind cannot be merged.
        BaseError: a damaged safetensors file.
    """
    adapters: dict[str, StoredAdapter] = {}
    whole: dict[str, TensorInfo] = {}
    if (folder / ADAPTER).is_dir():
        adapters, whole = _read_adapter(folder / ADAPTER)
    if (folder / DELTA).is_dir():
        whole |= _tensors(folder, f"{DELTA}/{DELTA_FILE}")
    if not adapters and not whole:
        raise SelectionError(
            "the folder has no trained weights",
            where=str(folder),
            expected=f"{ADAPTER}/{ADAPTER_FILE} or {DELTA}/{DELTA_FILE}",
            remedy="give a rung or checkpoint folder of the run",
        )
    for info in (*whole.values(), *(info for adapter in adapters.values() for info in adapter.tensors.values())):
        if 0 in info.shape:
            raise SelectionError(
                f"{info.name} is empty, of shape {list(info.shape)}",
                where=str(folder / info.file),
                remedy="it was saved before its shards were gathered; train the trial again",
            )
    return Artifact(folder=str(folder), adapters=adapters, whole=whole)


def _tensors(folder: Path, file: str) -> dict[str, TensorInfo]:
    return {name: info.model_copy(update={"file": file}) for name, info in read_header(folder / file).items()}


def _read_adapter(adapter: Path) -> tuple[dict[str, StoredAdapter], dict[str, TensorInfo]]:
    config = cast("dict[str, Any]", json.loads((adapter / ADAPTER_CONFIG).read_bytes()))
    for option, wanted in UNSUPPORTED.items():
        if config.get(option, wanted) not in (wanted, None):
            raise SelectionError(
                f"{option} is {config[option]!r}",
                where=str(adapter / ADAPTER_CONFIG),
                expected=repr(wanted),
                remedy="such an adapter is not merged here; merge with `peft` instead",
            )
    stored = _tensors(adapter.parent, f"{ADAPTER}/{ADAPTER_FILE}")
    by_name = {key.removeprefix(PEFT_PREFIX): info for key, info in stored.items()}
    kind = _kind_of(config, adapter)
    suffixes = kind.suffixes
    modules: dict[str, dict[str, TensorInfo]] = {}
    whole: dict[str, TensorInfo] = {}
    for key, info in by_name.items():
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
        if key.endswith(PEFT_ROWS):
            whole[f"{key.removesuffix(PEFT_ROWS)}.{NEW_ROWS}"] = info
        elif suffix is None:
            whole[key.replace(".modules_to_save", "")] = info
        else:
            modules.setdefault(key.removesuffix(suffix), {})[suffix] = info
    adapters: dict[str, StoredAdapter] = {}
    parameters = {module: name for name, module in peft_modules(config.get("target_parameters") or ()).items()}
    for module, tensors in modules.items():
        for suffix in suffixes:
            if suffix not in tensors:
                raise SelectionError(
                    f"the adapter of {module} has no {_role(suffix)}", where=str(adapter), remedy="train the trial again"
                )
        name = parameters.get(module, f"{module}.weight")
        experts = 0 if name.endswith(".weight") else tensors[LORA_A].shape[0] // int(config["r"])
        adapters[name] = StoredAdapter(kind=kind.name, tensors=tensors, alpha=float(config["lora_alpha"]), num_experts=experts)
    return adapters, whole


def _kind_of(config: Mapping[str, Any], adapter: Path) -> AdapterKind:
    options = {option for kind in ADAPTER_KINDS.values() for option in kind.peft_options}
    asked = {option: True for option in options if config.get(option)}
    found = next((kind for kind in ADAPTER_KINDS.values() if kind.peft_options == asked), None)
    if found is None:
        raise SelectionError(
            f"{' and '.join(sorted(asked))} together are none of the kinds {', '.join(ADAPTER_KINDS)}",
            where=str(adapter / ADAPTER_CONFIG),
            remedy="merge with `peft` instead",
        )
    return found


def _role(suffix: str) -> str:
    """Return a suffix as PEFT's parameter role: `.lora_A.weight` -> `lora_A`."""
    return suffix.split(".")[1]


def _spell_shapes(shapes: Mapping[str, Shape]) -> str:
    return " and ".join(f"{_role(suffix)} {list(shape)}" for suffix, shape in shapes.items())


def _unknown(where: str, name: str, names: Iterable[str]) -> SelectionError:
    near = difflib.get_close_matches(name, list(names), n=3)
    return SelectionError(
        f"{name} was trained, but the base has no such tensor",
        where=where,
        expected=f"a name like {', '.join(near)}" if near else "a tensor of the base",
        remedy="merge into the base that the trial was trained on",
    )
