"""What a layer policy becomes on one base."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.errors import SelectionError
from orchestrator.spec.models import Task, Tune
from orchestrator.spec.policy import Policy, parse_policy


def select(
    anatomy: ModelAnatomy, policy: str, tune: Tune, lora_rank: int | None, *, task: Task, num_classes: int = 0
) -> LayerSelection:
    """Sort every parameter into trainable, adapted and frozen, and find the cut.

    Blocks mean all their parameters for `full` (norms, biases, experts too) and all their linear layers for
    `lora` (a router and routed experts are none). Embeddings and the final norm stay frozen. `+head` (or `head`)
    adds the output projection, for `full` with its bias; a tied one is untied first. `classify` has no output
    projection: it trains its own new classifier under every policy but `none`, together with what else the checkpoint
    lacks (`ModelAnatomy.new_tensors`); there `head` is that classifier alone, which `full` trains whatever `tune` says.

    Raises:
        SelectionError: no policy, a block that the base does not have, LoRA without a rank, an encoder for a
            task that writes text, fewer than two classes.
    """
    parsed = parse_policy(policy)
    if parsed.kind == "top":
        raise SelectionError(f"{policy!r}: choosing blocks by score is not supported yet", remedy="write for example last:2")
    if task == "classify":
        parsed = Policy(parsed.kind, parsed.count, parsed.ranges)
        if num_classes < 2 and parsed.kind != "none":
            raise SelectionError(f"{num_classes} classes", expected="at least two", remedy="check the label column")
    elif anatomy.kind == "encoder":
        raise SelectionError(
            f"task {task!r} on {anatomy.model_type!r}, an encoder, which writes no text",
            expected="a decoder, or `task: classify`",
            remedy="take a base that writes text, of the llama, mistral or qwen layout for example",
        )
    blocks = _blocks(parsed, anatomy, policy)
    wants_head = parsed.with_head or parsed.kind == "head"
    head = [anatomy.head_weight] if wants_head and task != "classify" else []
    if tune == "lora" and (blocks or head):
        return _lora(anatomy, parsed, blocks, head, lora_rank, task, num_classes)
    return _full(anatomy, parsed, blocks, head, task, num_classes)


def _blocks(parsed: Policy, anatomy: ModelAnatomy, written: str) -> list[int]:
    """Numbers of the blocks that learn, ascending."""
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
                near = (
                    str(Policy("blocks", ranges=_runs(inside), with_head=parsed.with_head)) if inside else f"blocks:{count - 1}"
                )
                raise _out_of_range(written, anatomy, f"block {outside}", f"did you mean {near}?")
            return numbers
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
    """What `classify` makes anew and trains."""
    if task != "classify" or parsed.kind == "none":
        return []
    bias = [anatomy.classifier_bias] if anatomy.classifier_bias else []
    return [tensor.name for tensor in anatomy.new_tensors] + [anatomy.classifier_weight, *bias]


def _new_elements(anatomy: ModelAnatomy, task: Task, parsed: Policy, num_classes: int) -> int:
    if task != "classify" or parsed.kind == "none":
        return 0
    classifier = num_classes * (anatomy.hidden_size + bool(anatomy.classifier_bias))
    return classifier + sum(tensor.num_elements for tensor in anatomy.new_tensors)


def _stored_names(anatomy: ModelAnatomy, task: Task) -> Iterable[str]:
    """Parameters of the model that is loaded for the task: `classify` loads no output projection."""
    head = (anatomy.head_weight, anatomy.head_bias) if task == "classify" else ()
    return (name for name in anatomy.tensors if name not in head)


def _full(
    anatomy: ModelAnatomy, parsed: Policy, blocks: list[int], head: list[str], task: Task, num_classes: int
) -> LayerSelection:
    learning = [name for block in blocks for name in anatomy.blocks[block]] + head
    learning += [anatomy.head_bias] if head and anatomy.head_bias else []
    elements = sum(
        anatomy.tensors[name].num_elements if name in anatomy.tensors else _head_elements(anatomy) for name in learning
    )
    new = _new_names(anatomy, task, parsed)
    taken = set(learning)
    return LayerSelection(
        policy=str(parsed),
        tune="full",
        lora_rank=None,
        trainable=tuple(learning + new),
        adapted=(),
        frozen=tuple(name for name in _stored_names(anatomy, task) if name not in taken),
        cut=min(blocks, default=anatomy.num_blocks),
        unties_head=bool(head) and anatomy.tied,
        new_classifier=bool(new),
        num_trainable_parameters=elements + _new_elements(anatomy, task, parsed, num_classes),
    )


def _lora(
    anatomy: ModelAnatomy,
    parsed: Policy,
    blocks: list[int],
    head: list[str],
    lora_rank: int | None,
    task: Task,
    num_classes: int,
) -> LayerSelection:
    if lora_rank is None or lora_rank < 1:
        raise SelectionError(
            f"LoRA on {parsed} with rank {lora_rank}", expected="a rank of at least 1", remedy="give `lora_rank`"
        )
    adapted = [name for block in blocks for name in anatomy.linears[block]]
    axes = sum(sum(anatomy.tensors[name].shape) for name in adapted)
    axes += len(head) * (anatomy.vocab_size + anatomy.hidden_size)
    new = _new_names(anatomy, task, parsed)
    taken = {*adapted, *head}
    return LayerSelection(
        policy=str(parsed),
        tune="lora",
        lora_rank=lora_rank,
        trainable=tuple(new),
        adapted=tuple(adapted + head),
        frozen=tuple(name for name in _stored_names(anatomy, task) if name not in taken),
        cut=min(blocks, default=anatomy.num_blocks),
        unties_head=bool(head) and anatomy.tied,
        new_classifier=bool(new),
        num_trainable_parameters=lora_rank * axes + _new_elements(anatomy, task, parsed, num_classes),
    )


def _head_elements(anatomy: ModelAnatomy) -> int:
    """A tied output projection, once it is a copy of its own."""
    return anatomy.vocab_size * anatomy.hidden_size
