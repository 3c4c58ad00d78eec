"""What is unusual about a checkpoint: copies of tied tensors, tensors that the class does not have, adapters beside the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from orchestrator.anatomy.values import ModelAnatomy, TensorInfo
from orchestrator.anatomy.weights import same_values
from orchestrator.errors import BaseError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
LISTED = 3


def settle(anatomy: ModelAnatomy) -> ModelAnatomy:
    """Return the anatomy with what its files decide, and with notes about what is unusual.

    A parameter that the class ties and that is stored too is tied if both are equal. Otherwise transformers (5.23,
    `PreTrainedModel.tie_weights`) loads both: the output projection is then one of its own.

    Raises:
        BaseError: tied parameters, other than the output projection, with different values.
    """
    folder = Path(anatomy.folder)
    different = [copy for copy in anatomy.copies if not same_values(folder, copy, _stored(anatomy.tensors[copy.name]))]
    heads = [copy for copy in different if copy.name == anatomy.embeddings[0] and copy.shape[0] == anatomy.vocab_size]
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
    return anatomy.model_copy(update={"notes": (*anatomy.notes, *_notes(anatomy, heads))})


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
        names = ", ".join(sorted(tensor.name for tensor in anatomy.extra)[:LISTED])
        more = ", ..." if len(anatomy.extra) > LISTED else ""
        yield f"{len(anatomy.extra)} stored tensors that the model's class does not have ({names}{more}): see `base.extra_tensors`"
    if any((folder / file).is_file() for file in ADAPTER_FILES):
        yield "the folder also holds a LoRA adapter, which is not used; merge it into the base first if it is meant to be"
