"""What a trial leaves behind, from its headers: low-rank pairs in PEFT's format, whole changed tensors, or both."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy, TensorInfo
from orchestrator.anatomy.weights import read_header
from orchestrator.errors import SelectionError
from orchestrator.values import Value

ADAPTER, DELTA = "adapter", "delta"
ADAPTER_FILE, ADAPTER_CONFIG, DELTA_FILE = "adapter_model.safetensors", "adapter_config.json", "delta.safetensors"
PEFT_PREFIX = "base_model.model."
SUFFIX_A, SUFFIX_B = ".lora_A.weight", ".lora_B.weight"
UNSUPPORTED: dict[str, object] = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""Options of a LoRA whose product is not simply scale * B @ A, and the value that each must have."""


class LowRank(Value):
    """One adapted weight's pair: A[rank, in], B[out, rank]."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (Kalajdzievski 2023)."""


class Artifact(Value):
    """What was trained, by the base's tensor names. Files are relative to `folder`."""

    folder: str
    low_rank: dict[str, LowRank]
    whole: dict[str, TensorInfo]

    def check(self, anatomy: ModelAnatomy, num_classes: int, selection: LayerSelection | None) -> None:
        """Prove that every trained tensor has its place in the base.

        Args:
            num_classes: Of the new classifier; 0 where there is none.

        Raises:
            SelectionError: names the tensor, and near names where the base does not have it.
        """
        for name, pair in self.low_rank.items():
            self._check_pair(name, pair, anatomy)
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

    def _check_pair(self, name: str, pair: LowRank, anatomy: ModelAnatomy) -> None:
        shapes = {name: info.shape for name, info in anatomy.tensors.items()}
        shapes.setdefault(anatomy.head_weight, (anatomy.vocab_size, anatomy.hidden_size))
        if name not in shapes:
            raise _unknown(self.folder, name, shapes)
        shape = shapes[name]
        found = (pair.a.shape, pair.b.shape)
        if len(shape) != 2 or pair.a.shape[1:] != shape[1:] or pair.b.shape != (shape[0], pair.a.shape[0]):
            raise SelectionError(
                f"the adapter of {name} has A {list(found[0])} and B {list(found[1])}",
                where=self.folder,
                expected=f"A [rank, in] and B [out, rank] of a weight {list(shape)}",
                remedy="merge into the base that the adapter was trained on",
            )

    def _check_selection(self, selection: LayerSelection, anatomy: ModelAnatomy) -> None:
        new = {anatomy.classifier_bias, *(info.name for info in anatomy.new_tensors)} - {""}
        for what, planned, found in (
            ("adapter", set(selection.adapted), self.low_rank.keys()),
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


def new_shapes(anatomy: ModelAnatomy, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what may be new: an untied head; to classify, the classifier and an encoder's pooler."""
    if not num_classes:
        return {anatomy.head_weight: (anatomy.vocab_size, anatomy.hidden_size)}
    shapes: dict[str, tuple[int, ...]] = {info.name: info.shape for info in anatomy.new_tensors}
    shapes[anatomy.classifier_weight] = (num_classes, anatomy.hidden_size)
    if anatomy.classifier_bias:
        shapes[anatomy.classifier_bias] = (num_classes,)
    return shapes


def read_artifact(folder: Path) -> Artifact:
    """Headers of `adapter/` and `delta/` in `folder`.

    Raises:
        SelectionError: neither is there; an empty tensor, half a pair, a kind of adapter that cannot be merged.
        BaseError: a damaged safetensors file.
    """
    low_rank: dict[str, LowRank] = {}
    whole: dict[str, TensorInfo] = {}
    if (folder / ADAPTER).is_dir():
        low_rank, whole = _read_adapter(folder / ADAPTER)
    if (folder / DELTA).is_dir():
        whole |= _tensors(folder, f"{DELTA}/{DELTA_FILE}")
    if not low_rank and not whole:
        raise SelectionError(
            "the folder has no trained weights",
            where=str(folder),
            expected=f"{ADAPTER}/{ADAPTER_FILE} or {DELTA}/{DELTA_FILE}",
            remedy="give a rung or checkpoint folder of the run",
        )
    for info in (*whole.values(), *(half for pair in low_rank.values() for half in (pair.a, pair.b))):
        if 0 in info.shape:
            raise SelectionError(
                f"{info.name} is empty, of shape {list(info.shape)}",
                where=str(folder / info.file),
                remedy="it was saved before its shards were gathered; train the trial again",
            )
    return Artifact(folder=str(folder), low_rank=low_rank, whole=whole)


def _tensors(folder: Path, file: str) -> dict[str, TensorInfo]:
    return {name: info.model_copy(update={"file": file}) for name, info in read_header(folder / file).items()}


def _read_adapter(adapter: Path) -> tuple[dict[str, LowRank], dict[str, TensorInfo]]:
    config = cast("dict[str, Any]", json.loads((adapter / ADAPTER_CONFIG).read_bytes()))
    for option, wanted in UNSUPPORTED.items():
        if config.get(option, wanted) not in (wanted, None):
            raise SelectionError(
                f"{option} is {config[option]!r}",
                where=str(adapter / ADAPTER_CONFIG),
                expected=repr(wanted),
                remedy="only plain LoRA is merged here; merge with `peft` instead",
            )
    stored = _tensors(adapter.parent, f"{ADAPTER}/{ADAPTER_FILE}")
    by_name = {key.removeprefix(PEFT_PREFIX): info for key, info in stored.items()}
    pairs: dict[str, LowRank] = {}
    whole: dict[str, TensorInfo] = {}
    for key, info in by_name.items():
        if key.endswith(SUFFIX_A):
            module = key.removesuffix(SUFFIX_A)
            b = by_name.get(module + SUFFIX_B)
            if b is None:
                raise SelectionError(
                    f"{module} has a lora_A without a lora_B", where=str(adapter), remedy="train the trial again"
                )
            pairs[module + ".weight"] = LowRank(a=info, b=b, scale=_scale(config, info.shape[0]))
        elif not key.endswith(SUFFIX_B):
            whole[key.replace(".modules_to_save", "")] = info
        elif key.removesuffix(SUFFIX_B) + SUFFIX_A not in by_name:
            raise SelectionError(f"{key} has no lora_A beside it", where=str(adapter), remedy="train the trial again")
    return pairs, whole


def _scale(config: Mapping[str, Any], rank: int) -> float:
    alpha = float(config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / max(rank, 1)


def _unknown(where: str, name: str, names: Iterable[str]) -> SelectionError:
    near = difflib.get_close_matches(name, list(names), n=3)
    return SelectionError(
        f"{name} was trained, but the base has no such tensor",
        where=where,
        expected=f"a name like {', '.join(near)}" if near else "a tensor of the base",
        remedy="merge into the base that the trial was trained on",
    )
