"""Put the parts of a model, the facts about them and the stored names together as an anatomy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from orchestrator.anatomy.config import DTYPES
from orchestrator.anatomy.values import ModelAnatomy, TensorInfo
from orchestrator.probe import facts
from orchestrator.probe.classes import NUM_CLASSES, Built
from orchestrator.probe.heads import HeadNames
from orchestrator.probe.names import NameMap
from orchestrator.probe.structure import Structure, block_kinds


@dataclass(frozen=True)
class Classifier:
    """What `classify` adds to a base."""

    weight: str = ""
    bias: str = ""
    new: tuple[str, ...] = ()
    """Parameters between the last block and the classifier that base checkpoints do not have."""


@dataclass(frozen=True)
class Outside:
    """The parameters of the text model outside its blocks."""

    embeddings: tuple[str, ...] = ()
    final_norm: tuple[str, ...] = ()
    others: tuple[str, ...] = field(default=())
    """Parameters outside the text model."""


def find_classifier(structure: Structure) -> Classifier:
    """Return the parameters of a sequence classifier outside of the base model; all are new to a base checkpoint."""
    model: Any = structure.model
    prefix = f"{model.base_model_prefix}."
    outside = [name for name, _ in model.named_parameters() if not name.startswith(prefix)]
    weights = [name for name in outside if (shape := model.get_parameter(name).shape)[0] == NUM_CLASSES and len(shape) == 2]
    if not weights:
        return Classifier()
    bias = weights[-1].removesuffix("weight") + "bias"
    named = (weights[-1], bias)
    return Classifier(weights[-1], bias if bias in outside else "", tuple(name for name in outside if name not in named))


def find_outside(structure: Structure, head: tuple[str, ...], classifier: Classifier) -> Outside:
    """Sort the parameters outside the blocks: before them, the norm after them, and what is no part of the text model."""
    model: Any = structure.model
    list_parent, _, own = structure.blocks_module.rpartition(".")
    siblings = [name for name, _ in model.get_submodule(list_parent).named_children()]
    after = siblings[siblings.index(own) + 1 :]
    norms = [name for name in siblings if ("norm" in name.lower() or name.startswith("ln")) and "emb" not in name]
    last_norm = next((name for name in norms if name in after), next(iter(norms), ""))
    place = f"{list_parent}." if list_parent else ""
    backbone = f"{structure.tower or structure.backbone}."
    skipped = {*head, classifier.weight, classifier.bias, *classifier.new}
    embeddings, final, others = list[str](), list[str](), list[str]()
    first = structure.first_name(structure.name_of(structure.embedding, "weight"))
    for name, _ in model.named_parameters():
        if name in skipped or name.startswith(f"{structure.blocks_module}."):
            continue
        if name != first and not name.startswith(backbone):
            others.append(name)
        elif last_norm and name.startswith(f"{place}{last_norm}."):
            final.append(name)
        elif not any(name.startswith(f"{place}{sibling}.") for sibling in after) and "pooler" not in name:
            embeddings.append(name)
    return Outside(tuple(sorted(embeddings, key=lambda name: name != first)), tuple(final), tuple(others))


def implied_tensors(structure: Structure, dtype: str) -> dict[str, TensorInfo]:
    """Return the tensors that the class has, as its config stores them."""
    return {
        name: TensorInfo(name=name, shape=tuple(parameter.shape), dtype=dtype)
        for name, parameter in structure.model.named_parameters()
    }


def dtype_of(config: PreTrainedConfig) -> str:
    """Return the config's dtype in safetensors' spelling, float32 if it gives none."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return DTYPES.get(str(found).removeprefix("torch."), "F32")


def tied_names(structure: Structure, head: str) -> tuple[tuple[str, ...], ...]:
    """Return the groups of parameters that share one tensor, without the output projection."""
    groups: dict[int, list[str]] = {}
    for name, parameter in structure.model.named_parameters(remove_duplicate=False):
        if name != head:
            groups.setdefault(id(parameter), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def assemble(built: Built, structure: Structure, names: NameMap | None, head: HeadNames) -> ModelAnatomy:
    """Return the anatomy of a built class.

    Args:
        built: The class.
        structure: Its parts.
        names: How its parameters are stored; None if only the config is known.
        head: The output projection.
    """
    config: Any = built.config
    classifier = find_classifier(structure) if built.classifies else Classifier()
    outside = find_outside(structure, (head.weight, head.bias), classifier)
    heads, kv_heads, head_dim = facts.heads_of(structure)
    scale, cap = facts.logits_of(structure)
    embedding: Any = structure.embedding
    return ModelAnatomy(
        model_type=str(config.model_type),
        kind=built.kind,
        folder="",
        has_weights=names is not None,
        hidden_size=facts.hidden_size(structure),
        intermediate_size=facts.intermediate_size(structure),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=int(embedding.weight.shape[0]) if embedding is not None else 0,
        max_positions=facts.positions_of(structure),
        tied=head.tied,
        block_prefix=structure.blocks_module + ".{}.",
        blocks_module=structure.blocks_module,
        backbone=structure.backbone,
        head_weight=head.weight,
        head_bias=head.bias,
        classifier_weight=classifier.weight or "score.weight",
        classifier_bias=classifier.bias,
        embeddings=outside.embeddings,
        final_norm=outside.final_norm,
        **_blocks(structure),
        experts=facts.experts_of(structure),
        attention="fused" if structure.model._supports_sdpa else "eager",
        norm=facts.norm_of(structure),
        mlp=facts.mlp_of(structure),
        activation=facts.activation_of(structure),
        dropout=facts.dropout_of(structure),
        source="class",
        architecture=type(built.model).__name__,
        logit_scale=scale,
        logit_cap=cap,
        tied_names=tied_names(structure, head.weight),
        others=outside.others,
        **_tensors(structure, names, classifier, dtype_of(config)),
        config_sha256="",
    )


def _blocks(structure: Structure) -> dict[str, Any]:
    """Return the fields of an anatomy that have an entry for each block."""
    numbers = range(len(structure.blocks))
    linears = [facts.linears_of(structure, number) for number in numbers]
    stacked = [facts.stacked_of(structure, number) for number in numbers]
    routers = tuple(tuple(facts.routers_of(structure, number)) for number in numbers)
    kinds = block_kinds(structure)
    return {
        "num_blocks": len(structure.blocks),
        "blocks": tuple(map(tuple, structure.in_blocks)),
        "linears": tuple(tuple(found) for found, _ in linears),
        "stacked": tuple(tuple(found) for found, _ in stacked),
        "transposed": tuple(name for _, found in (*linears, *stacked) for name in found),
        "routers": routers if any(routers) else (),
        "block_kinds": kinds if any(kinds) else (),
    }


def _tensors(structure: Structure, names: NameMap | None, classifier: Classifier, dtype: str) -> dict[str, Any]:
    """Return the fields of an anatomy that say what is stored, or what the config implies where nothing is."""
    implied = implied_tensors(structure, dtype)
    new = {classifier.weight, classifier.bias}
    if names is None:
        tensors = {name: tensor for name, tensor in implied.items() if name not in new and name not in classifier.new}
        stored: dict[str, Any] = {}
    else:
        tensors = {name: names.tensors[name] for name in implied if name in names.tensors and name not in new}
        buffers = tuple(names.tensors[name] for name in names.buffers)
        stored = {"extra": names.extra, "buffers": buffers, "copies": names.copies}
    made = tuple(tensor for name, tensor in implied.items() if name not in tensors and name not in new)
    return {"tensors": tensors, "new_tensors": made, **stored}
