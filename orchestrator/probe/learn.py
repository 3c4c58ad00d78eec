"""Answer a question about a base."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path

from orchestrator.anatomy.learning import Answer, Question, Refusal
from orchestrator.anatomy.own_code import code_files
from orchestrator.anatomy.values import ModelAnatomy, TensorInfo
from orchestrator.bases.own_code import own_model, use_own_code
from orchestrator.errors import BaseError
from orchestrator.probe.assemble import assemble
from orchestrator.probe.classes import CAUSAL, MASKED, Built, RefusedError, build, candidates, read_config
from orchestrator.probe.costs import with_costs
from orchestrator.probe.heads import head_names
from orchestrator.probe.names import NameMap, map_names
from orchestrator.probe.structure import find_structure
from orchestrator.probe.trial import tried

Stored = dict[str, TensorInfo]


def answer(question: Question) -> Answer:
    """Return the anatomy that the class of a base shows, or why there is none."""
    try:
        return Answer(anatomy=with_costs(learn(question), Path(question.folder)))
    except RefusedError as error:
        return Answer(refusal=error.refusal)
    except BaseError as error:
        refusal = Refusal(kind="weights", what=error.what, where=error.where, expected=error.expected, remedy=error.remedy)
        return Answer(refusal=refusal)


def learn(question: Question) -> ModelAnatomy:
    """Build the class and return its anatomy.

    Raises:
        RefusedError: there is no such class, or it cannot be built, or it has no one list of blocks.
        BaseError: the stored tensors are not those of the class.
    """
    folder = Path(question.folder)
    use_own_code(folder, question.code_sha256)
    values = json.loads((folder / "config.json").read_bytes())
    config = read_config(folder, values)
    stored = None if question.stored is None else {tensor.name: tensor for tensor in question.stored}
    built, names = choose(candidates(config, question.head), stored)
    if stored is not None and names is not None and built.classifies:
        names = without_other_heads(built, names, stored)
    structure = find_structure(built)
    head = head_names(built, structure)
    anatomy = assemble(built, structure, names, head)
    if names is not None:
        names.check(anatomy.model_type, question.folder, needed=needed(anatomy, names), head=anatomy.head_weight)
        check_blocks(anatomy, question.folder)
    if own_model(built.config.model_type):
        names_of_code = tuple(file.name for file in code_files(folder))
        anatomy = anatomy.model_copy(update={"code_sha256": question.code_sha256, "code_files": names_of_code})
    return tried(built, structure).told(anatomy)


def choose(built: list[Built], stored: Stored | None) -> tuple[Built, NameMap | None]:
    """Return the class that fits the stored tensors best, with the names of its parameters; the first if there are none."""
    if stored is None:
        return built[0], None
    fits = [(each, map_names(each.model, stored)) for each in built]
    return min(fits, key=lambda fit: (len(fit[1].missing) + len(fit[1].mismatched), len(fit[1].extra) - len(fit[1].ignored)))


def without_other_heads(built: Built, names: NameMap, stored: Stored) -> NameMap:
    """Leave out the stored tensors that a base has for predicting tokens: a classifier has no use for them, and they are nothing
    unusual."""
    extra = {tensor.name for tensor in names.extra}
    for name in filter(None, (MASKED.get(built.config.model_type), CAUSAL.get(built.config.model_type))):
        with suppress(RefusedError):
            extra &= {tensor.name for tensor in map_names(build(copy.deepcopy(built.config), name), stored).extra}
    return names.model_copy(update={"extra": tuple(tensor for tensor in names.extra if tensor.name in extra)})


def check_blocks(anatomy: ModelAnatomy, folder: str) -> None:
    """Check that no tensors of further blocks are stored.

    Layers for multi-token prediction are stored as blocks too, and have tensors that no block has.

    Raises:
        BaseError: a block too many that is like one of the others.
    """
    kinds = {frozenset(name.split(".", anatomy.blocks_module.count(".") + 2)[-1] for name in block) for block in anatomy.blocks}
    further: dict[str, set[str]] = {}
    for tensor in anatomy.extra:
        rest = tensor.name.removeprefix(f"{anatomy.blocks_module}.")
        number, _, within = rest.partition(".")
        if rest != tensor.name and number.isdigit():
            further.setdefault(number, set()).add(within)
    alike = [number for number, names in further.items() if frozenset(names) in kinds]
    if alike:
        count = len(anatomy.blocks) + len(alike)
        raise BaseError(
            f"{count} blocks are stored, and config.json says {len(anatomy.blocks)}",
            where=folder,
            remedy="config.json and weights must belong to the same model; check num_hidden_layers",
        )


def needed(anatomy: ModelAnatomy, names: NameMap) -> set[str]:
    """Return the parameters that must be stored: all but those that the task makes anew."""
    blocks = {name for block in anatomy.blocks for name in block}
    return {*blocks, *anatomy.embeddings, *anatomy.final_norm, *({anatomy.head_weight} - {""})} - set(names.tied)
