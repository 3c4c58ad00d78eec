"""Floating-point operations per token, term by term. A multiplication and an addition are two operations.

The count matches torch's `FlopCounterMode`: matrix products and attention, not norms, activations and the optimizer; a test
runs real steps under that counter and compares. L is the number of tokens that a token attends over: the width of its row or,
if documents are computed one by one (`plan.memory.activations`), the length of its document. q is the query width (heads x
head size), k the share of the blocks above the cut.
"""

from __future__ import annotations

from orchestrator.anatomy.selection import NEW_ROWS
from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.cost.blocks import (
    BACKWARD_MATMULS,
    FORWARD_MATMULS,
    active_elements,
    again_flops,
    backward_flops,
    block_elements,
    forward_flops,
)
from orchestrator.plan.data_size import DataSize
from orchestrator.plan.estimates import FlopTerm
from orchestrator.plan.memory.activations import attends_by_document
from orchestrator.plan.memory.transient import LOGIT_CHUNK_BYTES
from orchestrator.units import format_count
from orchestrator.work.execution import ExecutionPlan


def forward_flops_per_token(
    anatomy: ModelAnatomy, attended_tokens: float, num_classes: int = 0, *, supervised_share: float = 1.0, first: int = 0
) -> float:
    """Return the operations of one forward pass from block `first` up, with the head at the supervised positions."""
    terms = forward_terms(anatomy, attended_tokens, num_classes, supervised_share=supervised_share, first=first)
    return sum(term.flops for term in terms)


def block_flops_per_token(anatomy: ModelAnatomy, attended_tokens: float, stop: int) -> float:
    """Return the operations of the forward pass of the blocks below `stop`."""
    # All blocks, less those from `stop` up.
    return sum(forward_flops(anatomy, 0, attended_tokens)) - sum(forward_flops(anatomy, stop, attended_tokens))


def forward_terms(
    anatomy: ModelAnatomy, attended_tokens: float, num_classes: int = 0, *, supervised_share: float = 1.0, first: int = 0
) -> tuple[FlopTerm, ...]:
    """Return the terms of the forward pass, from block `first` up if the states that enter it are cached.

    - Matrices: 2 an element (Kaplan et al. 2020, section 2.1). The embedding look-up multiplies nothing. Of routed experts
      a token passes `experts_per_token`, so that share of their elements counts; routers and shared experts count whole.
    - Attention: two products, scores and their use, of 2·L·q each: 4·L·q a block.
    - Head: 2 an element, at supervised positions only (`train.model.objective`); to classify, one position a document.
    """
    blocks, head = forward_flops(anatomy, first, attended_tokens), head_elements(anatomy, num_classes) * supervised_share
    where = "" if supervised_share == 1.0 else f" at {supervised_share:.0%} of the positions"
    width, num_blocks = anatomy.num_heads * anatomy.head_dim, anatomy.num_blocks - first
    elements = f"2 x {format_count(round(block_elements(anatomy, first)))} elements{_experts(anatomy)}"
    scores = f"4 x {attended_tokens:.0f} tokens x {width} query width x {num_blocks} blocks"
    if anatomy.block_costs:
        elements = scores = f"{num_blocks} blocks, counted on the model's class"
    return _kept(
        ("forward, blocks", blocks.matrices, elements),
        ("forward, attention", blocks.attention, scores),
        ("forward, head", 2.0 * head, f"2 x {format_count(head_elements(anatomy, num_classes))} elements{where}"),
    )


def train_terms(
    anatomy: ModelAnatomy,
    selection: LayerSelection,
    attended_tokens: float,
    *,
    checkpointing: bool = False,
    num_classes: int = 0,
    supervised_share: float = 1.0,
    head_twice: bool = False,
    stored_trunk: bool = False,
    forward_tokens: float = float("inf"),
) -> tuple[FlopTerm, ...]:
    """Return the terms of one training step, per token. N elements multiply, a share k of them above the cut.

    - The forward pass, 2N (`forward_terms`); with a stored trunk 2kN, and no attention below the cut.
    - Gradients of activations, from the loss down to the cut: 2 an element of the head and of the blocks there; none
      where only the head is trained. Below the cut nothing has a gradient, so with adapters the matrices of the block at the cut
      give their input none as far as nothing before them is adapted (`_without_gradient`).
    - Gradients of weights: 2 per trainable element. So full tuning is 6N, LoRA on every block 4N, above a cut 2N + 2kN.
    - Adapters: 6 an element (forward, and both gradients), those on that input counted as if they gave it one.
    - What adapters compute once in a forward pass, however many of `forward_tokens` it has (`AdapterKind.elements_per_pass`): 2.
    - A frozen layer that must also run on what dropout leaves of its input (`AdapterKind.runs_layer_on_its_input`): 4 an
      element of the adapted matrices, forward and the gradient of activations.
    - Attention's backward: 5 products where forward has 2, above the cut.
    - Checkpointing runs the blocks above the cut again: 2 an element, adapters too, and attention's forward.
      torch stops as soon as all that backward needs is there, which a block's last matrix is not part of unless it is
      adapted (`_last_matrix`).
    - A head that does not make its gradient with its loss (`train.model.loss`) and whose logits take several chunks is
      checkpointed too: 2 an element again (`runs_head_twice`).
    """
    first = selection.cut if stored_trunk else 0
    forward = forward_terms(anatomy, attended_tokens, num_classes, supervised_share=supervised_share, first=first)
    if not selection.trainable and not selection.adapted:
        return forward  # the control `none` is only evaluated
    blocks = anatomy.num_blocks - selection.cut
    head = head_elements(anatomy, num_classes) * supervised_share
    learning = _learning_elements(anatomy, selection, num_classes, supervised_share)
    in_blocks, on_head = adapter_elements(anatomy, selection)
    backward = backward_flops(anatomy, selection, attended_tokens)
    rerun_in_blocks, rerun_on_head = _elements_run_again(anatomy, selection, supervised_share)
    again = sum(again_flops(anatomy, selection, attended_tokens)) + 2.0 * (in_blocks + rerun_in_blocks) if checkpointing else 0.0
    per_pass = adapter_elements_per_pass(anatomy, selection) * (1 + checkpointing) / forward_tokens
    passing = backward.matrices + 2.0 * head if blocks else 0.0
    head_again = 2.0 * (head + on_head * supervised_share) if head_twice else 0.0
    return forward + _kept(
        (
            "gradients of activations",
            passing,
            f"2 x ({format_count(round(backward.matrices / 2))} elements in {blocks} blocks + the head)",
        ),
        ("gradients of weights", 2.0 * learning, f"2 x {format_count(round(learning))} trainable elements"),
        *_adapter_terms(in_blocks + on_head * supervised_share, per_pass, forward_tokens, rerun_in_blocks + rerun_on_head),
        ("attention backward", backward.attention, _attention_backward(anatomy, blocks)),
        ("blocks again", again, f"checkpointing: the forward pass of {blocks} blocks repeated"),
        ("head again", head_again, "logits in several chunks, each recomputed for its gradient"),
    )


def _attention_backward(anatomy: ModelAnatomy, blocks: int) -> str:
    if anatomy.block_costs:
        return f"{blocks} blocks, counted on the model's class"
    return f"{BACKWARD_MATMULS} matrix products where the forward pass has {FORWARD_MATMULS}, in {blocks} blocks"


def _adapter_terms(
    elements: float, elements_per_pass: float, forward_tokens: float, rerun_elements: float
) -> tuple[tuple[str, float, str], ...]:
    """Return the terms of adapters, per token: their products, what they compute once per pass, frozen layers run again."""
    return (
        ("adapters", 6.0 * elements, f"6 x {format_count(round(elements))} elements, forward and both gradients"),
        ("adapters, once per pass", 2.0 * elements_per_pass, f"over the {forward_tokens:.0f} tokens of a pass"),
        ("frozen layers on dropped-out inputs", 4.0 * rerun_elements, f"4 x {format_count(round(rerun_elements))} elements"),
    )


def runs_head_twice(anatomy: ModelAnatomy, selection: LayerSelection, execution: ExecutionPlan, data: DataSize) -> bool:
    """Return whether logits are computed again in the backward pass: for a head with an adapter, or a partitioned one, whose
    float32 logits of a micro-batch need several chunks. Any other head computes its gradient together with the loss."""
    own_rows = any(name.endswith(NEW_ROWS) for name in selection.trainable)
    adapted = own_rows or anatomy.head_weight in selection.adapted
    plain = not adapted and not (execution.executor == "deepspeed" and execution.zero_stage == 3)
    positions = execution.micro_batch_rows * execution.row_tokens * data.supervised_share
    return not (data.num_classes or plain) and 4 * positions * anatomy.vocab_size > LOGIT_CHUNK_BYTES


def attention_width(anatomy: ModelAnatomy, execution: ExecutionPlan, data: DataSize) -> float:
    """Return the number of tokens that a token attends over: those of its row, or only those of its document. A mask saves no
    counted operation."""
    if data.document_tokens is None or not attends_by_document(
        anatomy, execution.device, one_document_per_row=data.num_classes > 0
    ):
        return execution.row_tokens
    return min(data.document_tokens, execution.row_tokens)


def head_elements(anatomy: ModelAnatomy, num_classes: int = 0) -> int:
    """Return the elements of the output projection, or of the classifier."""
    return num_classes * anatomy.classifier_inputs if num_classes else anatomy.vocab_size * anatomy.head_width


def adapter_elements(anatomy: ModelAnatomy, selection: LayerSelection) -> tuple[int, int]:
    """Return the elements of adapters that a token is multiplied with: (in the blocks, on the head)."""
    kind, lora_rank = selection.adapter_kind, selection.lora_rank or 0
    stored = [name for name in selection.adapted if name != anatomy.head_weight]
    head = (anatomy.vocab_size, anatomy.head_width)
    on_head = kind.multiplied_elements(head, lora_rank) if len(stored) < len(selection.adapted) else 0
    in_blocks, copied, routed = 0, set(_copied(anatomy, selection)), anatomy.routed
    for name in stored:
        elements = kind.multiplied_elements(anatomy.matrix_shape(name), lora_rank)
        per_token = anatomy.experts.experts_per_token if anatomy.experts and name in routed else 1
        in_blocks += 0 if name in copied else elements * per_token
    return in_blocks, on_head


def adapter_elements_per_pass(anatomy: ModelAnatomy, selection: LayerSelection) -> int:
    """Return the multiply-adds of all adapters in a forward pass that do not depend on its number of tokens; for adapted copies
    of experts also those of the gradients of A and B, which are of the same size each."""
    kind, lora_rank, copied = selection.adapter_kind, selection.lora_rank or 0, set(_copied(anatomy, selection))
    products = sum(3 * lora_rank * anatomy.tensors[name].num_elements for name in copied)
    return products + sum(kind.elements_per_pass(anatomy.matrix_shape(name), lora_rank) for name in selection.adapted)


def _copied(anatomy: ModelAnatomy, selection: LayerSelection) -> list[str]:
    """Return the weights of which every pass makes a copy with their adapters, whose gradient then is that of the copy."""
    grouped = anatomy.experts is None or anatomy.experts.grouped
    return [] if grouped else [name for name in selection.adapted if name in anatomy.routed]


def _elements_run_again(anatomy: ModelAnatomy, selection: LayerSelection, supervised_share: float) -> tuple[float, float]:
    """Return the elements of frozen matrices that dropout makes run twice: (in the blocks, on the head)."""
    if not (selection.adapter.dropout and selection.adapter_kind.runs_layer_on_its_input):
        return 0.0, 0.0
    in_blocks = sum(anatomy.tensors[name].num_elements for name in selection.adapted if name != anatomy.head_weight)
    return in_blocks, head_elements(anatomy) * supervised_share if anatomy.head_weight in selection.adapted else 0.0


def _learning_elements(anatomy: ModelAnatomy, selection: LayerSelection, num_classes: int, supervised_share: float) -> float:
    """Return the trainable elements whose gradients are matrix products."""
    learning = {*selection.trainable, *_copied(anatomy, selection)}
    blocks = sum(active_elements(anatomy, name) for block in anatomy.blocks for name in block if name in learning)
    heads = {anatomy.classifier_weight} if num_classes else {anatomy.head_weight}
    return blocks + (head_elements(anatomy, num_classes) * supervised_share if heads & learning else 0.0)


def _experts(anatomy: ModelAnatomy) -> str:
    experts = anatomy.experts
    return f", {experts.experts_per_token} of {experts.num_experts} experts" if experts else ""


def _kept(*terms: tuple[str, float, str]) -> tuple[FlopTerm, ...]:
    return tuple(FlopTerm(name=name, flops=flops, reason=reason) for name, flops, reason in terms if flops)
