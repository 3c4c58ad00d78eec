"""Floating-point operations per token, term by term. A multiplication and an addition are two operations.

The count matches torch's `FlopCounterMode`: matrix products and attention, not norms, activations and the optimizer; a test
runs real steps under that counter and compares. L is the number of tokens that a token attends over: the width of its row or,
if documents are computed one by one (`plan.memory.activations`), the length of its document. q is the query width (heads x
head size), k the share of the blocks above the cut.
"""

from __future__ import annotations

from orchestrator.anatomy.selection import is_attention
from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.data_size import DataSize
from orchestrator.plan.estimates import FlopTerm
from orchestrator.plan.memory.activations import FUSED_PROJECTIONS, attends_by_document
from orchestrator.plan.memory.transient import LOGIT_CHUNK_BYTES
from orchestrator.units import format_count
from orchestrator.work.execution import ExecutionPlan

BACKWARD_MATMULS, FORWARD_MATMULS = 5, 2
"""Matrix products of a fused attention kernel. Forward: scores, and their product with the values; backward: the scores again,
then the gradients of the scores, values, queries and keys (Dao et al. 2022, FlashAttention, algorithm 4;
`sdpa_backward_flop_count` in torch.utils.flop_counter counts the same). Both are counted for whole rows: a mask saves no
counted operation."""

QUERY_KEY_VALUE = (
    *("q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin"),
    *FUSED_PROJECTIONS,
)
"""Modules whose input is the input of a block's attention: a layout whose projections have other names must add them here."""

ENDING_IN_DROPOUT = ("gpt2", "opt")
"""Decoders that apply dropout of 0.1 to each block's output unless their config says otherwise (transformers' defaults): a
layout that does so too must be added here."""


def forward_flops_per_token(
    anatomy: ModelAnatomy, attended_tokens: float, num_classes: int = 0, *, supervised_share: float = 1.0, first: int = 0
) -> float:
    """Return the operations of one forward pass from block `first` up, with the head at the supervised positions."""
    terms = forward_terms(anatomy, attended_tokens, num_classes, supervised_share=supervised_share, first=first)
    return sum(term.flops for term in terms)


def block_flops_per_token(anatomy: ModelAnatomy, attended_tokens: float, stop: int) -> float:
    """Return the operations of the forward pass of the blocks below `stop`."""
    return sum(
        sign * (2.0 * block_elements(anatomy, first) + _attention(anatomy, first, attended_tokens))
        # All blocks, less those from `stop` up: the helpers count from a block to the top.
        for first, sign in ((0, 1.0), (stop, -1.0))
    )


def forward_terms(
    anatomy: ModelAnatomy, attended_tokens: float, num_classes: int = 0, *, supervised_share: float = 1.0, first: int = 0
) -> tuple[FlopTerm, ...]:
    """Return the terms of the forward pass, from block `first` up if the states that enter it are cached.

    - Matrices: 2 an element (Kaplan et al. 2020, section 2.1). The embedding look-up multiplies nothing. Of routed experts
      a token passes `experts_per_token`, so that share of their elements counts; routers and shared experts count whole.
    - Attention: two products, scores and their use, of 2·L·q each: 4·L·q a block.
    - Head: 2 an element, at supervised positions only (`train.model.objective`); to classify, one position a document.
    """
    blocks, head = block_elements(anatomy, first), head_elements(anatomy, num_classes) * supervised_share
    where = "" if supervised_share == 1.0 else f" at {supervised_share:.0%} of the positions"
    width = anatomy.num_heads * anatomy.head_dim
    return _kept(
        ("forward, blocks", 2.0 * blocks, f"2 x {format_count(round(blocks))} elements{_experts(anatomy)}"),
        (
            "forward, attention",
            _attention(anatomy, first, attended_tokens),
            f"4 x {attended_tokens:.0f} tokens x {width} query width x {anatomy.num_blocks - first} blocks",
        ),
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
    above, blocks = block_elements(anatomy, selection.cut), anatomy.num_blocks - selection.cut
    head = head_elements(anatomy, num_classes) * supervised_share
    learning = _learning_elements(anatomy, selection, num_classes, supervised_share)
    in_blocks, on_head = adapter_elements(anatomy, selection)
    attention = _attention(anatomy, selection.cut, attended_tokens)
    without_gradient, skips_attention = _without_gradient(anatomy, selection)
    passing = above - without_gradient
    skipped_attention = _attention(anatomy, anatomy.num_blocks - 1, attended_tokens) if skips_attention else 0.0
    rerun_in_blocks, rerun_on_head = _elements_run_again(anatomy, selection, supervised_share)
    skipped = sum(_last_matrix(anatomy, selection, block) for block in range(selection.cut, anatomy.num_blocks))
    again = 2.0 * (above - skipped + in_blocks + rerun_in_blocks) + attention if checkpointing else 0.0
    per_pass = adapter_elements_per_pass(anatomy, selection) * (1 + checkpointing) / forward_tokens
    all_passing = 2.0 * (passing + head) if blocks else 0.0
    head_again = 2.0 * (head + on_head * supervised_share) if head_twice else 0.0
    return forward + _kept(
        ("gradients of activations", all_passing, f"2 x ({format_count(round(passing))} elements in {blocks} blocks + the head)"),
        ("gradients of weights", 2.0 * learning, f"2 x {format_count(round(learning))} trainable elements"),
        *_adapter_terms(in_blocks + on_head * supervised_share, per_pass, forward_tokens, rerun_in_blocks + rerun_on_head),
        (
            "attention backward",
            (attention - skipped_attention) * BACKWARD_MATMULS / FORWARD_MATMULS,
            f"{BACKWARD_MATMULS} matrix products where the forward pass has {FORWARD_MATMULS}, in {blocks} blocks",
        ),
        ("blocks again", again, f"checkpointing: the forward pass of {blocks} blocks repeated"),
        ("head again", head_again, "logits in several chunks, each recomputed for its gradient"),
    )


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
    plain = anatomy.head_weight not in selection.adapted and not (execution.executor == "deepspeed" and execution.zero_stage == 3)
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


def block_elements(anatomy: ModelAnatomy, first: int) -> float:
    """Return the elements that a token is multiplied with in the blocks from `first` up; of routed experts only its own."""
    return sum(_active(anatomy, name) for block in anatomy.blocks[first:] for name in block)


def head_elements(anatomy: ModelAnatomy, num_classes: int = 0) -> int:
    """Return the elements of the output projection, or of the classifier."""
    return (num_classes or anatomy.vocab_size) * anatomy.hidden_size


def adapter_elements(anatomy: ModelAnatomy, selection: LayerSelection) -> tuple[int, int]:
    """Return the elements of adapters that a token is multiplied with: (in the blocks, on the head)."""
    kind, lora_rank = selection.adapter_kind, selection.lora_rank or 0
    stored = [name for name in selection.adapted if name != anatomy.head_weight]
    head = (anatomy.vocab_size, anatomy.hidden_size)
    on_head = kind.multiplied_elements(head, lora_rank) if len(stored) < len(selection.adapted) else 0
    return sum(kind.multiplied_elements(anatomy.matrix_shape(name), lora_rank) for name in stored), on_head


def adapter_elements_per_pass(anatomy: ModelAnatomy, selection: LayerSelection) -> int:
    """Return the multiply-adds of all adapters in a forward pass that do not depend on its number of tokens."""
    kind, shapes = selection.adapter_kind, map(anatomy.matrix_shape, selection.adapted)
    return sum(kind.elements_per_pass(shape, selection.lora_rank or 0) for shape in shapes)


def _elements_run_again(anatomy: ModelAnatomy, selection: LayerSelection, supervised_share: float) -> tuple[float, float]:
    """Return the elements of frozen matrices that dropout makes run twice: (in the blocks, on the head)."""
    if not (selection.adapter.dropout and selection.adapter_kind.runs_layer_on_its_input):
        return 0.0, 0.0
    in_blocks = sum(anatomy.tensors[name].num_elements for name in selection.adapted if name != anatomy.head_weight)
    return in_blocks, head_elements(anatomy) * supervised_share if anatomy.head_weight in selection.adapted else 0.0


def _active(anatomy: ModelAnatomy, name: str) -> float:
    """Return the elements of a block's parameter that one token is multiplied with; none for a norm or a bias."""
    tensor = anatomy.tensors[name]
    if len(tensor.shape) < 2:
        return 0.0
    experts = anatomy.experts
    if experts is None or not any(name in block for block in anatomy.stacked):
        return float(tensor.num_elements)
    return tensor.num_elements * experts.experts_per_token / experts.num_experts


def _learning_elements(anatomy: ModelAnatomy, selection: LayerSelection, num_classes: int, supervised_share: float) -> float:
    """Return the trainable elements whose gradients are matrix products."""
    learning = set(selection.trainable)
    blocks = sum(_active(anatomy, name) for block in anatomy.blocks for name in block if name in learning)
    heads = {anatomy.classifier_weight} if num_classes else {anatomy.head_weight}
    return blocks + (head_elements(anatomy, num_classes) * supervised_share if heads & learning else 0.0)


def _last_matrix(anatomy: ModelAnatomy, selection: LayerSelection, block: int) -> int:
    """Return the elements of a block's last matrix if nothing after it keeps anything for backward, so it is not recomputed.

    This is so in decoders whose blocks end in `x + down(...)`; a norm after it, dropout, or a weighted sum of experts keeps
    something. An adapted matrix is recomputed: peft computes it before the adapter, whose inputs backward needs.
    """
    sparse = bool(anatomy.stacked and anatomy.stacked[block])
    # By name: a layout with another name for a norm after the MLP must be added here.
    norm_after = anatomy.kind == "encoder" or any("post_feedforward" in name for name in anatomy.blocks[block])
    if sparse or norm_after or anatomy.model_type in ENDING_IN_DROPOUT:
        return 0
    last = anatomy.linears[block][-1]
    return 0 if last in selection.adapted else anatomy.tensors[last].num_elements


def _without_gradient(anatomy: ModelAnatomy, selection: LayerSelection) -> tuple[int, bool]:
    """Return what has no gradient in the block at the cut, since nothing before it is trained: the elements of the matrices
    whose inputs have none, and whether attention itself has none.

    A block runs through the query, key and value matrices, attention, its output matrix, the first matrices of the MLP and
    its last one. A parallel MLP reads what attention reads: where attention is adapted, the gradient of its input is counted
    although it is not computed, an upper bound.
    """
    names = anatomy.blocks[selection.cut] if selection.cut < anatomy.num_blocks else ()
    linears = anatomy.linears[selection.cut] if names else ()
    # The second-last component of a parameter's name is its module: `model.layers.0.self_attn.q_proj.weight` -> `q_proj`.
    readers = [name for name in linears if name.split(".")[-2] in QUERY_KEY_VALUE]
    # A policy by score is planned with its cut at 0 while its blocks are unknown: there, everything may have a gradient.
    if selection.pending or not readers or set(names) & set(selection.trainable):
        return 0, False
    after = [name for name in linears if is_attention(anatomy, name) and name not in readers]
    mlp = [name for name in linears if not is_attention(anatomy, name)]
    adapted, elements = set(selection.adapted), 0
    for stage in (readers, after, mlp[:-1], mlp[-1:]):
        elements += sum(anatomy.tensors[name].num_elements for name in stage)
        if adapted & set(stage):
            break
    return elements, not adapted & set(readers)


def _attention(anatomy: ModelAnatomy, first: int, attended_tokens: float) -> float:
    return 2.0 * FORWARD_MATMULS * attended_tokens * anatomy.num_heads * anatomy.head_dim * (anatomy.num_blocks - first)


def _experts(anatomy: ModelAnatomy) -> str:
    experts = anatomy.experts
    return f", {experts.experts_per_token} of {experts.num_experts} experts" if experts else ""


def _kept(*terms: tuple[str, float, str]) -> tuple[FlopTerm, ...]:
    return tuple(FlopTerm(name=name, flops=flops, reason=reason) for name, flops, reason in terms if flops)
