"""Resolve a layer policy on a base."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import get_args

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.errors import SelectionError
from orchestrator.spec.adapters import ADAPTER_KINDS, PLAIN_LORA, AdapterOptions, ModuleGroup, Modules
from orchestrator.spec.models import Task, Tune
from orchestrator.spec.policy import Policy, parse_policy
from orchestrator.spec.tasks import TASKS

GROUPS: tuple[ModuleGroup, ...] = get_args(ModuleGroup)
NEW_ROWS = "new_rows"
"""Attribute of the embeddings and the output projection, in a branch that trains the rows of new tokens alone."""
ROUNDING = 1e-9
"""Tolerance for shares of the blocks: 0.1 x 30 is slightly more than 3 in binary floating point."""


def select(
    anatomy: ModelAnatomy,
    policy: str,
    tune: Tune,
    lora_rank: int | None,
    *,
    adapter: AdapterOptions = PLAIN_LORA,
    task: Task,
    num_classes: int = 0,
    scores: Sequence[float | None] | None = None,
) -> LayerSelection:
    """Sort every parameter into trainable, adapted and frozen, and find the cut.

    `full` trains all parameters of the blocks (norms, biases, experts too) except their routers, `lora` adapts their linear
    layers, and their routed experts if its modules include these. Embeddings and the final norm stay frozen, unless the policy
    adds them:

    - `+head` (or `head`): the output projection, for `full` with its bias; a tied one is untied first.
    - `+router`: the routers of the blocks, whole under `lora` too.
    - `+embeddings`: the input embeddings, and with them a tied output projection.
    - `+new_tokens`: the rows of the tokens that `base.add_tokens` names, in the embeddings and in the output projection.
    - `+norms`: the final norm, and with `lora` the norms of the blocks.

    What learns in the embeddings puts the cut at 0. `classify` has no output projection: it trains its own new classifier under
    every policy but `none`, together with the other tensors that the checkpoint does not have (`ModelAnatomy.new_tensors`);
    there `head` is only that classifier, which `full` trains whatever `tune` says.

    `top:F` selects the best-scored blocks, `num_of_share` of them. Without scores the selection is `pending`; a share of 1 is
    every block and needs none.

    Args:
        adapter: Options of the adapters of `lora`.
        scores: Score of each block, higher is better; None for a block that was not scored and cannot be selected.

    Raises:
        SelectionError: not a policy, a block that the base does not have, LoRA without a rank, an encoder for a task that
            generates text, fewer than two classes, fewer scored blocks than requested.
    """
    parsed = parse_policy(policy)
    head_is_new = TASKS[task].head.is_new
    if head_is_new:
        parsed = parsed.without("head")
        if num_classes < 2 and parsed.kind != "none":
            raise SelectionError(f"{num_classes} classes", expected="at least two", remedy="check the label column")
    if anatomy.kind == "encoder" and not TASKS[task].head.encoders:
        raise SelectionError(
            f"task {task!r} on {anatomy.model_type!r}, an encoder, which cannot generate text",
            expected="a decoder, or `task: classify`",
            remedy="use a base that generates text, of the llama, mistral or qwen layout for example",
        )
    pending = parsed.kind == "top" and scores is None and num_of_share(parsed.fraction, anatomy.num_blocks) < anatomy.num_blocks
    blocks = _largest(parsed, anatomy) if pending else _blocks(parsed, anatomy, policy, scores)
    wants_head = parsed.with_head or parsed.kind == "head"
    head = [anatomy.head_weight] if wants_head and not head_is_new else []
    _check_router(anatomy, parsed)
    if tune == "lora" and (blocks or head):
        selection = _adapted(anatomy, parsed, blocks, head, lora_rank, adapter, task, num_classes)
    else:
        selection = _full(anatomy, parsed, blocks, head, task, num_classes)
    return selection.model_copy(update={"pending": True, "cut": 0}) if pending else selection


def _check_router(anatomy: ModelAnatomy, parsed: Policy) -> None:
    if parsed.with_router and not any(anatomy.routers):
        raise SelectionError(
            f"'{parsed}' asks for routers, and {anatomy.model_type!r} has none",
            where=anatomy.folder,
            expected="a mixture of experts",
            remedy=f"write {parsed.without('router')}",
        )


def select_everything(anatomy: ModelAnatomy, *, task: Task, num_classes: int = 0) -> LayerSelection:
    """Select every parameter as trainable, embeddings and norms too, as training from random weights needs it."""
    blocks = tuple(range(anatomy.num_blocks))
    policy = Policy("all")
    names = tuple(_stored_names(anatomy, task))
    new = _new_names(anatomy, task, policy)
    elements = sum(anatomy.tensors[name].num_elements for name in names)
    return LayerSelection(
        policy="everything",
        tune="full",
        lora_rank=None,
        trainable=(*names, *new),
        adapted=(),
        frozen=(),
        cut=0,
        blocks=blocks,
        new_classifier=bool(new),
        num_trainable_parameters=elements + _new_elements(anatomy, task, policy, num_classes),
    )


def is_attention(anatomy: ModelAnatomy, weight: str) -> bool:
    """Return whether a linear layer of a block belongs to its attention; the others are its MLP's."""
    return names_attention(_within_block(anatomy, weight))


def names_attention(module: str) -> bool:
    """Return whether a module of a block belongs to its attention, by its name: `self_attn.q_proj`, `self_attention.dense`,
    `layer.0.SelfAttention.q`."""
    return any("attn" in part or "attention" in part or part == "att" for part in module.lower().split("."))


def is_chosen(anatomy: ModelAnatomy, weight: str, modules: Modules) -> bool:
    """Return whether these modules include a linear layer, or a weight of routed experts.

    A name is that of the layer within its block, or the end of it. Routed experts are only in `experts` and under their names:
    an adapter of every expert has many times the parameters of all others together.
    """
    if not isinstance(modules, str):
        return any(is_chosen(anatomy, weight, name) if name in GROUPS else _named(anatomy, weight, name) for name in modules)
    if weight in anatomy.routed:
        return modules == "experts"
    return modules == "all" or (modules != "experts" and (modules == "attention") == is_attention(anatomy, weight))


def _named(anatomy: ModelAnatomy, weight: str, name: str) -> bool:
    return f".{_within_block(anatomy, weight)}".endswith(f".{name}")


def check_modules(anatomy: ModelAnatomy, modules: Modules) -> None:
    """Raise SelectionError if a name or a group matches nothing in any block."""
    known = module_names(anatomy)
    weights = [name for block in adaptable(anatomy) for name in block]
    for name in (modules,) if isinstance(modules, str) else modules:
        if not any(is_chosen(anatomy, weight, (name,)) for weight in weights):
            near = difflib.get_close_matches(
                name, [*known, *(end for each in known if (end := each.rpartition(".")[2]) != each)], n=1
            )
            raise SelectionError(
                f"the blocks have no linear layer {name!r}" if name != "experts" else "the blocks have no routed experts",
                expected=f"all, attention, mlp,{' experts,' if anatomy.experts else ''} or names among {', '.join(known)}",
                remedy=f"did you mean {near[0]}?" if near else "",
            )


def module_names(anatomy: ModelAnatomy) -> list[str]:
    """Return the names of the linear layers and routed experts within their blocks."""
    return list(dict.fromkeys(_within_block(anatomy, name) for block in adaptable(anatomy) for name in block))


def adaptable(anatomy: ModelAnatomy) -> tuple[tuple[str, ...], ...]:
    """Return for each block the weights that adapters can be attached to: its linear layers, then its routed experts."""
    stacked = anatomy.stacked or ((),) * anatomy.num_blocks
    return tuple((*linears, *routed) for linears, routed in zip(anatomy.linears, stacked, strict=True))


def _within_block(anatomy: ModelAnatomy, weight: str) -> str:
    """Return a weight's module name within its block: `model.layers.3.mlp.up_proj.weight` -> `mlp.up_proj`."""
    return weight.removeprefix(f"{anatomy.blocks_module}.").partition(".")[2].removesuffix(".weight")


def num_of_share(share: float, num_blocks: int) -> int:
    """Return the number of blocks of `top:F`: the share rounded up, at least one."""
    return max(1, math.ceil(share * num_blocks - ROUNDING))


def best_scored(scores: Sequence[float | None], count: int) -> list[int]:
    """Return the blocks with the highest scores, ascending; ties go to blocks nearer to the output.

    Returns:
        Indices; fewer than `count` if fewer blocks have a score.
    """
    # The pairs sort by score, then by block number, so that among equal scores the higher block comes first.
    scored = [(score, block) for block, score in enumerate(scores) if score is not None]
    return sorted(block for _, block in sorted(scored, reverse=True)[:count])


def _largest(parsed: Policy, anatomy: ModelAnatomy) -> list[int]:
    """Return as many of the largest blocks as `top:` requests, ascending."""
    sizes = [sum(anatomy.tensors[name].num_elements for name in block) for block in anatomy.blocks]
    return best_scored(sizes, num_of_share(parsed.fraction, anatomy.num_blocks))


def _blocks(parsed: Policy, anatomy: ModelAnatomy, written: str, scores: Sequence[float | None] | None) -> list[int]:
    """Return the indices of the trainable blocks, ascending."""
    count = anatomy.num_blocks
    match parsed.kind:
        case "all":
            return list(range(count))
        case "last" | "first":
            if parsed.count > count:
                raise _out_of_range(written, anatomy, f"{parsed.count} blocks", f"write {parsed.kind}:{count} or all")
            return list(range(count - parsed.count, count) if parsed.kind == "last" else range(parsed.count))
        case "blocks":
            numbers = list(chain.from_iterable(range(low, high + 1) for low, high in parsed.ranges))
            inside = [number for number in numbers if number < count]
            if len(inside) < len(numbers):
                outside = ", ".join(str(number) for number in numbers[len(inside) :][:4])
                near = str(replace(parsed, kind="blocks", count=0, ranges=_runs(inside))) if inside else f"blocks:{count - 1}"
                raise _out_of_range(written, anatomy, f"block {outside}", f"did you mean {near}?")
            return numbers
        case "top":
            wanted = num_of_share(parsed.fraction, count)
            found = best_scored([0.0] * count if scores is None else scores, wanted)
            if len(found) < wanted:
                raise _out_of_range(
                    written, anatomy, f"{wanted} of the blocks by score, and {len(found)} have one", "write last:2"
                )
            return found
        case _:
            return []


def _runs(blocks: list[int]) -> tuple[tuple[int, int], ...]:
    return parse_policy("blocks:" + ",".join(map(str, blocks))).ranges


def _out_of_range(written: str, anatomy: ModelAnatomy, what: str, remedy: str) -> SelectionError:
    count = anatomy.num_blocks
    return SelectionError(
        f"{written!r} asks for {what}; the base has {count} blocks",
        where=anatomy.folder,
        expected=f"blocks 0 to {count - 1}",
        remedy=remedy,
    )


def _new_names(anatomy: ModelAnatomy, task: Task, parsed: Policy) -> list[str]:
    """Return the tensors of a new head, which every policy but `none` trains."""
    if not TASKS[task].head.is_new or parsed.kind == "none":
        return []
    bias = [anatomy.classifier_bias] if anatomy.classifier_bias else []
    return [tensor.name for tensor in anatomy.new_tensors] + [anatomy.classifier_weight, *bias]


def _new_elements(anatomy: ModelAnatomy, task: Task, parsed: Policy, num_classes: int) -> int:
    if not TASKS[task].head.is_new or parsed.kind == "none":
        return 0
    classifier = num_classes * (anatomy.classifier_inputs + bool(anatomy.classifier_bias))
    return classifier + sum(tensor.num_elements for tensor in anatomy.new_tensors)


def _stored_names(anatomy: ModelAnatomy, task: Task) -> Iterable[str]:
    """Return the parameters of the model that is loaded for the task; a new head replaces the output projection."""
    head = (anatomy.head_weight, anatomy.head_bias) if TASKS[task].head.is_new else ()
    return (name for name in anatomy.tensors if name not in head)


def is_norm(anatomy: ModelAnatomy, name: str) -> bool:
    """Return whether a parameter of a block belongs to a norm: a vector of a module that is named as one."""
    module = name.split(".")[-2].lower()
    return len(anatomy.tensors[name].shape) == 1 and ("norm" in module or module.startswith("ln_"))


def _besides(anatomy: ModelAnatomy, parsed: Policy, blocks: list[int], tune: Tune, task: Task) -> dict[str, int]:
    """Return what is trained besides the blocks' matrices and the head: parameter name -> number of elements."""
    names: list[str] = []
    if "embeddings" in parsed.extras:
        names += anatomy.embeddings
    if parsed.with_router and tune == "lora":
        names += [name for block in blocks for name in anatomy.routers[block]]
    if "norms" in parsed.extras:
        names += [name for block in blocks for name in anatomy.blocks[block] if tune == "lora" and is_norm(anatomy, name)]
        names += anatomy.final_norm
    found = {name: anatomy.tensors[name].num_elements for name in names}
    if "new_tokens" in parsed.extras:
        found |= {name: len(anatomy.new_rows) * width for name, width in _new_rows(anatomy, parsed, tune, task).items()}
    return found


def _new_rows(anatomy: ModelAnatomy, parsed: Policy, tune: Tune, task: Task) -> dict[str, int]:
    """Return the parameters that `+new_tokens` trains, [new tokens, width], with their widths: rows of the embeddings and, unless
    it is tied to them or trained whole, of the output projection."""
    if not anatomy.new_rows:
        raise SelectionError(
            "`+new_tokens` trains the rows of new tokens, and the spec names none",
            expected="base.add_tokens: a list of tokens",
            remedy="list them in base.add_tokens, or write +embeddings to train all rows",
        )
    wants_head = parsed.with_head or parsed.kind == "head"
    if wants_head and tune == "lora" and not TASKS[task].head.is_new:
        raise SelectionError(
            f"{parsed}: with LoRA the output projection gets an adapter or rows of new tokens, not both",
            expected="a policy without head, or tune: full",
            remedy="remove +head",
        )
    embedding, head = (name.removesuffix("weight") + NEW_ROWS for name in (anatomy.embeddings[0], anatomy.head_weight))
    rows = {embedding: anatomy.embedding_width}
    return rows if wants_head or anatomy.tied or TASKS[task].head.is_new else rows | {head: anatomy.head_width}


def _trains_embeddings(parsed: Policy) -> bool:
    return not {"embeddings", "new_tokens"}.isdisjoint(parsed.extras)


def _full(
    anatomy: ModelAnatomy, parsed: Policy, blocks: list[int], head: list[str], task: Task, num_classes: int
) -> LayerSelection:
    resting = set[str]() if parsed.with_router else {name for names in anatomy.routers for name in names}
    learning = [name for block in blocks for name in anatomy.blocks[block] if name not in resting] + head
    learning += [anatomy.head_bias] if head and anatomy.head_bias else []
    elements = sum(
        anatomy.tensors[name].num_elements if name in anatomy.tensors else _head_elements(anatomy) for name in learning
    )
    besides = _besides(anatomy, parsed, blocks, "full", task)
    learning += besides
    elements += sum(besides.values())
    new = _new_names(anatomy, task, parsed)
    taken = set(learning)
    return LayerSelection(
        policy=str(parsed),
        tune="full",
        lora_rank=None,
        trainable=tuple(learning + new),
        adapted=(),
        frozen=tuple(name for name in _stored_names(anatomy, task) if name not in taken),
        cut=0 if _trains_embeddings(parsed) else min(blocks, default=anatomy.num_blocks),
        trains_embeddings=_trains_embeddings(parsed),
        blocks=tuple(blocks),
        unties_head=bool(head) and anatomy.tied,
        new_classifier=bool(new),
        num_trainable_parameters=elements + _new_elements(anatomy, task, parsed, num_classes),
    )


def _adapted(
    anatomy: ModelAnatomy,
    parsed: Policy,
    blocks: list[int],
    head: list[str],
    lora_rank: int | None,
    adapter: AdapterOptions,
    task: Task,
    num_classes: int,
) -> LayerSelection:
    if lora_rank is None or lora_rank < 1:
        raise SelectionError(
            f"LoRA on {parsed} with rank {lora_rank}", expected="a rank of at least 1", remedy="give `lora_rank`"
        )
    weights = adaptable(anatomy)
    adapted = [name for block in blocks for name in weights[block] if is_chosen(anatomy, name, adapter.modules)]
    _check_experts(anatomy, adapted, adapter)
    if blocks and not adapted:
        raise SelectionError(
            f"no block of {parsed} has a linear layer of the modules {adapter.modules}",
            where=anatomy.folder,
            expected=f"some of {', '.join(module_names(anatomy))}",
            remedy="choose other modules, or other blocks",
        )
    shapes = [anatomy.matrix_shape(name) for name in (*adapted, *head)]
    elements = sum(ADAPTER_KINDS[adapter.kind].num_elements(shape, lora_rank) for shape in shapes)
    besides = _besides(anatomy, parsed, blocks, "lora", task)
    elements += sum(besides.values())
    new = [*besides, *_new_names(anatomy, task, parsed)]
    taken = {*adapted, *head, *besides}
    return LayerSelection(
        policy=str(parsed),
        tune="lora",
        lora_rank=lora_rank,
        adapter=adapter,
        trainable=tuple(new),
        adapted=tuple(adapted + head),
        frozen=tuple(name for name in _stored_names(anatomy, task) if name not in taken),
        cut=0 if _trains_embeddings(parsed) else min(blocks, default=anatomy.num_blocks),
        trains_embeddings=_trains_embeddings(parsed),
        blocks=tuple(blocks),
        unties_head=bool(head) and anatomy.tied,
        new_classifier=len(new) > len(besides),
        num_trainable_parameters=elements + _new_elements(anatomy, task, parsed, num_classes),
    )


def _check_experts(anatomy: ModelAnatomy, adapted: Iterable[str], adapter: AdapterOptions) -> None:
    """Raise SelectionError for adapters of routed experts that PEFT has no form for."""
    name = next((name for name in adapted if name in anatomy.routed), None)
    if name is None or (ADAPTER_KINDS[adapter.kind].adapts_experts and not adapter.dropout):
        return
    what = f"lora_dropout {adapter.dropout:g}" if adapter.dropout else ADAPTER_KINDS[adapter.kind].title
    raise SelectionError(
        f"{what} on routed experts ({_within_block(anatomy, name)}), which PEFT does not support",
        where=anatomy.folder,
        expected="LoRA or rank-stabilised LoRA without dropout",
        remedy="choose `modules` without the routed experts, or plain LoRA for them",
    )


def _head_elements(anatomy: ModelAnatomy) -> int:
    """Return the number of elements of a tied output projection after it is copied."""
    return anatomy.vocab_size * anatomy.head_width
