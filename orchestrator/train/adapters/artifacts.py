"""Save and load the artifact of a trial: an adapter in PEFT's own format, or a delta with only the changed tensors.

adapter/  adapter_config.json  adapter_model.safetensors     `peft.PeftModel.from_pretrained` loads it
delta/    delta.json           delta.safetensors             tensors under their checkpoint names
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType
from peft.utils.transformers_weight_conversion import (
    _MOE_TARGET_MODULE_MAPPING,  # pyright: ignore[reportPrivateUsage]
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN  # pyright: ignore[reportPrivateUsage]

from orchestrator.anatomy.selection import NEW_ROWS
from orchestrator.anatomy.values import LayerSelection, TensorInfo
from orchestrator.errors import IntegrityError, OrchestratorError, TrainingError
from orchestrator.spec.adapters import PLAIN_LORA, AdapterOptions
from orchestrator.store import check_artifact
from orchestrator.store.folders import MANIFEST
from orchestrator.train.adapters.branch import Branch, full_shape, open_branch
from orchestrator.train.adapters.naming import LIVE_NAMES, adapted_name
from orchestrator.train.model.base import LoadedBase
from orchestrator.work.artifact import (
    ADAPTER,
    ADAPTER_FILE,
    DELTA,
    DELTA_FILE,
    PEFT_PREFIX,
    PEFT_ROWS,
    Artifact,
    peft_modules,
    read_artifact,
)


@dataclass(frozen=True)
class ReadyArtifact:
    """A checked copy of a branch's trained tensors on the CPU. The branch may be trained further or closed meanwhile."""

    tensors: Mapping[str, torch.Tensor]
    """Complete (unpartitioned) tensors by stable name."""
    metadata: dict[str, str]
    about: LoraConfig | dict[str, object]
    """PEFT's configuration of an adapter, or the description of a delta."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, folder: Path) -> Path:
        """Write `folder/adapter` or `folder/delta` and return its path; the caller makes the write atomic."""
        if isinstance(self.about, LoraConfig):
            target = folder / ADAPTER
            target.mkdir(parents=True)
            self.about.save_pretrained(str(target))
            modules = peft_modules(self.about.target_parameters or ())
            named = {PEFT_PREFIX + _peft_name(name, modules): tensor for name, tensor in self.tensors.items()}
            save_file(named, target / ADAPTER_FILE, self.metadata)
            return target
        target = folder / DELTA
        target.mkdir(parents=True)
        save_file(dict(self.tensors), target / DELTA_FILE, self.metadata)
        (target / "delta.json").write_text(json.dumps(self.about, indent=2) + "\n")
        return target


def ready_artifact(branch: Branch, tensors: Mapping[str, torch.Tensor]) -> ReadyArtifact:
    """Return a checked copy of the current state of a branch, ready to be written.

    Args:
        branch: Gives the planned names and shapes.
        tensors: Every trainable parameter, unpartitioned, by its stable name (gathered by the engine), on any device.

    Raises:
        TrainingError: A tensor is missing, empty, of another shape than planned, or not finite (law 4).
    """
    whole = _checked(branch, tensors)
    selection = branch.selection
    about: LoraConfig | dict[str, object] = (
        _peft_config(branch)
        if selection.adapted
        else {
            "format": 1,
            "policy": selection.policy,
            "base_config_sha256": branch.base.anatomy.config_sha256,
            "trainable": sorted(whole),
            "new_rows": list(branch.base.anatomy.new_rows) if any(name.endswith(NEW_ROWS) for name in whole) else [],
            "unties_head": selection.unties_head,
            "new_classifier": selection.new_classifier,
            "task": branch.base.load.task,
            "class_names": list(branch.base.load.class_names),
        }
    )
    return ReadyArtifact(whole, _metadata(branch), about)


def save_artifact(branch: Branch, folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write the trained tensors to `folder/adapter` or `folder/delta` and return its path; see `ready_artifact`."""
    return ready_artifact(branch, tensors).write(folder)


def _metadata(branch: Branch) -> dict[str, str]:
    return {
        "format": "pt",
        "policy": branch.selection.policy,
        "base_config_sha256": branch.base.anatomy.config_sha256,
    }


def _checked(branch: Branch, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    planned = {name: tuple(full_shape(parameter)) for name, parameter in branch.learning_parameters()}
    for name in sorted(planned.keys() ^ tensors.keys()):
        raise TrainingError(
            "was planned but is missing" if name in planned else "is present but was not planned",
            where=name,
            expected=f"exactly the {len(planned)} trainable tensors",
            remedy="nothing was saved; gather every trainable parameter before saving",
        )
    for name, shape in planned.items():
        found = tuple(tensors[name].shape)
        if found != shape or tensors[name].numel() == 0:
            raise TrainingError(
                f"has shape {list(found)}",
                where=name,
                expected=f"{list(shape)}",
                remedy="nothing was saved; a partitioned parameter must be gathered first",
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise TrainingError("holds NaN or infinity", where=name, remedy="nothing was saved; lower the learning rate")
    return {name: _own_bytes(tensors[name]) for name in planned}


def _own_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the CPU, contiguous, and not as a view of a larger buffer, which safetensors would reject."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _peft_config(branch: Branch) -> LoraConfig:
    selection, anatomy = branch.selection, branch.base.anatomy
    rows = {name.removesuffix(f".{NEW_ROWS}") for name in selection.trainable if name.endswith(f".{NEW_ROWS}")}
    modules = sorted({name.rpartition(".")[0] for name in selection.trainable} - rows)
    options: dict[str, Any] = dict(selection.adapter_kind.peft_options)
    parameters = _target_parameters(branch)
    encodes = anatomy.kind == "encoder_decoder"
    return LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if encodes else TaskType[branch.base.load.traits.head.peft_task],
        base_model_name_or_path=branch.base.load.folder,
        revision=branch.base.load.revision,
        inference_mode=True,
        r=selection.lora_rank or 0,
        lora_alpha=branch.lora_alpha,
        # PEFT knows no dropout in adapters of parameters. It only matters for training further.
        lora_dropout=0.0 if parameters else selection.adapter.dropout,
        bias="none",
        **options,
        target_modules=sorted(adapted_name(name) for name in selection.adapted if name not in parameters),
        target_parameters=parameters or None,
        # PEFT's word for linear layers that lie [in, out]; it sets the option back for each layer of the other kind.
        fan_in_fan_out=not (set(selection.adapted) - anatomy.routed).isdisjoint(anatomy.transposed),
        modules_to_save=modules or None,
        trainable_token_indices={name: list(branch.base.anatomy.new_rows) for name in sorted(rows)} or None,
    )


def _target_parameters(branch: Branch) -> list[str]:
    """Return the adapted weights that PEFT is told as parameters: routed experts, in the order of their modules; and linear
    layers beside them that it would take for experts, where their names are those of experts of older versions."""
    selection, anatomy = branch.selection, branch.base.anatomy
    pattern = _MODEL_TO_CONVERSION_PATTERN.get(anatomy.model_type, anatomy.model_type)
    mistaken = _MOE_TARGET_MODULE_MAPPING.get(pattern, {}) if selection.adapter_kind.adapts_experts else {}
    routed = [name for block in anatomy.stacked for name in block if name in selection.adapted]
    beside = [name for name in selection.adapted if name not in anatomy.routed]
    return routed + [name for name in beside if adapted_name(name).rpartition(".")[2] in mistaken]


def _peft_name(name: str, modules: Mapping[str, str]) -> str:
    """Return the name under which PEFT saves a trained tensor: `experts.down_proj.lora_A.weight` -> `experts.lora_A.weight`,
    `embed_tokens.new_rows` -> `embed_tokens.token_adapter.trainable_tokens_delta`."""
    if name.endswith(f".{NEW_ROWS}"):
        return name.removesuffix(f".{NEW_ROWS}") + PEFT_ROWS
    for suffix in LIVE_NAMES:
        if name.endswith(suffix) and (module := modules.get(name.removesuffix(suffix))) is not None:
            return module + suffix
    return name


def _copy(parameter: nn.Parameter, value: torch.Tensor) -> None:
    parameter.data.copy_(value)


def load_artifact(branch: Branch, folder: Path, assign: Callable[[nn.Parameter, torch.Tensor], None] = _copy) -> None:
    """Put a saved adapter or delta back into a branch of the same selection, before an engine takes its parameters.

    Args:
        branch: Newly opened.
        folder: Holds `adapter/` or `delta/`.
        assign: Assigns a complete tensor to a parameter; replaced where parameters are partitioned.

    Raises:
        IntegrityError: Damaged, or names or shapes differ from the trainable parameters of this branch; nothing was changed.
    """
    stored, learning = _stored_tensors(_read(folder)), dict(branch.learning_parameters())
    if unlike := _unlike(learning, stored):
        raise IntegrityError(unlike, where=str(folder), expected=f"the {len(learning)} trainable tensors of this trial")
    for file in {info.file for info in stored.values()}:
        with safe_open(folder / file, framework="pt", device="cpu") as reader:
            for name, parameter in learning.items():
                if stored[name].file == file:
                    assign(parameter, reader.get_tensor(stored[name].name))


def misfit(branch: Branch, folder: Path) -> str:
    """Return why the artifact in `folder` cannot be loaded into a branch, judged by its headers; empty if it can."""
    try:
        return _unlike(dict(branch.learning_parameters()), _stored_tensors(_read(folder)))
    except IntegrityError as error:
        return error.what


def _unlike(learning: Mapping[str, nn.Parameter], stored: Mapping[str, TensorInfo]) -> str:
    """Describe the first tensor whose name or shape differs; empty if none does."""
    for name in sorted(learning.keys() ^ stored.keys()):
        return f"{name} is not in the artifact" if name in learning else f"{name} is not trainable in this trial"
    for name, parameter in learning.items():
        planned = tuple(full_shape(parameter))
        if stored[name].shape != planned:
            return f"{name} has shape {list(stored[name].shape)} there and {list(planned)} here"
    return ""


@contextmanager
def attach_artifact(base: LoadedBase, folder: Path) -> Iterator[Branch]:
    """Yield the trained model: the base with a saved artifact applied, until the context ends.

    Args:
        folder: If it has a manifest, as every committed folder has, its files are checked against it before they are read.

    Raises:
        IntegrityError: The artifact is damaged or belongs to another base.
    """
    if (folder / MANIFEST).exists():
        check_artifact(folder)
    selection, lora_alpha = selection_of(base, folder)
    with open_branch(base, selection, lora_alpha=lora_alpha, seed=0) as branch:
        load_artifact(branch, folder)
        yield branch


def selection_of(base: LoadedBase, folder: Path) -> tuple[LayerSelection, int]:
    """Return the selection that the artifact's trial trained, resolved on this base, and its lora_alpha."""
    artifact, anatomy = _read(folder), base.anatomy
    stored = _stored_tensors(artifact)
    with safe_open(folder / next(iter(stored.values())).file, framework="pt", device="cpu") as reader:
        metadata = reader.metadata() or {}
    if metadata.get("base_config_sha256", anatomy.config_sha256) != anatomy.config_sha256:
        raise IntegrityError("the artifact belongs to another base", where=str(folder), expected=base.load.folder)
    learns = {*artifact.adapters, *artifact.whole}
    adapter = next(iter(artifact.adapters.values()), None)
    blocks = [number for number, block in enumerate(anatomy.blocks) if learns & set(block)]
    selection = LayerSelection(
        policy=metadata.get("policy", ""),
        tune="lora" if adapter else "full",
        lora_rank=adapter.lora_rank if adapter else None,
        adapter=AdapterOptions(kind=adapter.kind) if adapter else PLAIN_LORA,
        trainable=tuple(artifact.whole),
        adapted=tuple(artifact.adapters),
        frozen=tuple(name for name, _ in base.model.named_parameters() if name not in learns),
        cut=min(blocks, default=anatomy.num_blocks),
        trains_embeddings=any(name.startswith(anatomy.embeddings[0].removesuffix("weight")) for name in artifact.whole),
        unties_head=anatomy.tied and anatomy.head_weight in learns,
        new_classifier=anatomy.classifier_weight in learns,
        num_trainable_parameters=sum(info.num_elements for info in stored.values()),
    )
    return selection, round(adapter.alpha) if adapter else 0


def _read(folder: Path) -> Artifact:
    try:
        return read_artifact(folder)
    except (OrchestratorError, OSError, ValueError, KeyError) as error:
        raise IntegrityError(f"the artifact is damaged or missing: {error}", where=str(folder)) from error


def _stored_tensors(artifact: Artifact) -> dict[str, TensorInfo]:
    """Return the tensors by their names in `Branch.learning_parameters`; `TensorInfo.name` is the key in the file."""
    tensors = dict(artifact.whole)
    for weight, adapter in artifact.adapters.items():
        tensors |= {adapted_name(weight) + suffix: info for suffix, info in adapter.tensors.items()}
    return tensors
