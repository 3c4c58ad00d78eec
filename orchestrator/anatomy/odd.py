"""What is unusual about a checkpoint: copies of tied tensors, tensors that the class does not have, adapters beside the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from orchestrator.anatomy.values import ModelAnatomy, TensorInfo
from orchestrator.anatomy.weights import same_values
from orchestrator.errors import BaseError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
CLASSIFIERS = frozenset(
    {"score.weight", "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight"}
)
"""Names of the last matrix of transformers' sequence classifiers."""
LISTED = 3


def settle(anatomy: ModelAnatomy, stored: Mapping[str, TensorInfo], *, head_is_new: bool) -> ModelAnatomy:
    """Return the anatomy with what its files decide, and with notes about what is unusual.

    Args:
        stored: The stored tensors by stored name.
        head_is_new: True if the task gives the model a new head: tensors of heads that the class does not have are then left
            out.

    A parameter that the class ties and that is stored too is tied if both are equal. Otherwise transformers (5.23,
    `PreTrainedModel.tie_weights`) loads both: the output projection is then one of its own.

    Raises:
        BaseError: tied parameters, other than the output projection, with different values.
    """
    folder = Path(anatomy.folder)
    different = [copy for copy in anatomy.copies if not same_values(folder, copy, _stored(anatomy.tensors[copy.name]))]
    # Of an encoder-decoder, other copies of the embedding may be stored too.
    inputs = {name for group in anatomy.tied_names for name in group}
    heads = [copy for copy in different if copy.name == anatomy.embeddings[0] and copy.stored_name not in inputs]
    others = [copy for copy in different if copy not in heads]
    if others or len(heads) > 1:
        copy = (others or heads)[0]
        raise BaseError(
            f"{copy.stored_name} differs from {copy.name}, with which the config ties it",
            where=str(folder / copy.file),
            expected="equal tensors, or one of them",
            remedy="set `tie_word_embeddings: false` in config.json if they are meant to differ",
        )
    if heads:
        anatomy = _untied(anatomy, heads[0])
    foreign = [tensor for tensor in anatomy.extra if head_is_new and not _is_inside(anatomy, tensor.name)]
    anatomy = anatomy.model_copy(update={"extra": tuple(tensor for tensor in anatomy.extra if tensor not in foreign)})
    notes = list(_notes(anatomy, heads))
    if foreign:
        notes.append(f"{_listed(foreign)} belong to another head and are left out of the bundle")
    if head_is_new and anatomy.classifier_weight in stored:
        notes.append(f"the checkpoint's {anatomy.classifier_weight} is replaced by a new classifier of this task's classes")
    return anatomy.model_copy(update={"notes": (*anatomy.notes, *notes)})


def no_head_error(folder: Path | str, head: str, stored: Collection[str]) -> BaseError:
    """Return the error for a checkpoint without the output projection that completing text needs."""
    if CLASSIFIERS.intersection(stored):
        what, remedy = "a classifier", "set `task: classify`, or use the language model that it was made from"
    else:
        what = "a model without a head, as its backbone's class saves it"
        remedy = "set `task: classify`, or use the checkpoint with its output projection"
    return BaseError(
        f"{head} is missing: the checkpoint holds {what}",
        where=str(folder),
        expected="an output projection, which text cannot be generated without",
        remedy=f"{remedy}. Set `tie_word_embeddings: true` in config.json only if the model was trained so",
    )


def lone_adapter_error(folder: Path, config: object) -> BaseError:
    """Return the error for a folder with a LoRA adapter and no model.

    Args:
        config: Its adapter_config.json, as far as it can be read.
    """
    base = cast("dict[str, object]", config).get("base_model_name_or_path") if isinstance(config, dict) else None
    return BaseError(
        f"the folder holds a LoRA adapter{f' of {base}' if base else ''}, not a model",
        where=str(folder),
        expected="a folder as `save_pretrained` writes it",
        remedy=f"merge the adapter into its base first{f', or set `base.model: {base}` to start without it' if base else ''}",
    )


def _is_inside(anatomy: ModelAnatomy, name: str) -> bool:
    return name.startswith(f"{anatomy.backbone}.")


def _listed(tensors: Sequence[TensorInfo]) -> str:
    names = ", ".join(sorted(tensor.stored_name or tensor.name for tensor in tensors)[:LISTED])
    return f"{len(tensors)} stored tensors ({names}{', ...' if len(tensors) > LISTED else ''})"


def _untied(anatomy: ModelAnatomy, head: TensorInfo) -> ModelAnatomy:
    name = anatomy.head_weight
    info = head.model_copy(update={"name": name, "stored_name": "" if head.stored_name == name else head.stored_name})
    copies = tuple(copy for copy in anatomy.copies if copy != head)
    return anatomy.model_copy(update={"tied": False, "tensors": {**anatomy.tensors, name: info}, "copies": copies})


def _stored(info: TensorInfo) -> TensorInfo:
    return info.model_copy(update={"name": info.stored_name or info.name})


def _notes(anatomy: ModelAnatomy, heads: list[TensorInfo]) -> Iterator[str]:
    folder = Path(anatomy.folder)
    for head in heads:
        yield (
            f"{head.stored_name} differs from the embedding although config.json ties them; transformers loads both, so they are "
            "trained and written as two tensors, and the bundle's config says `tie_word_embeddings: false`"
        )
    if anatomy.extra:
        yield f"the model's class does not have {_listed(anatomy.extra)}: see `base.extra_tensors`"
    if any((folder / file).is_file() for file in ADAPTER_FILES):
        yield "the folder also holds a LoRA adapter, which is not used; merge it into the base first if it is meant to be"
