"""What a run costs: floating-point operations, GPU-hours, disk. Rough, and said so."""

from __future__ import annotations

from orchestrator.anatomy.values import LayerSelection, ModelAnatomy
from orchestrator.plan.values import DataSize, RunPlan, SearchPlan

PEAK_FLOPS = (
    ("b200", 2250e12),
    ("h200", 989e12),
    ("h100-pcie", 756e12),
    ("h100 pcie", 756e12),
    ("h100", 989e12),
    ("a100", 312e12),
    ("l40s", 362e12),
    ("l40", 181e12),
    ("l4", 121e12),
    ("a10g", 70e12),
    ("a10", 125e12),
    ("4090", 165e12),
    ("v100", 125e12),
    ("t4", 65e12),
)
"""Peak dense bf16 operations a second (fp16 where there is no bf16), from NVIDIA's data sheets; the first name that
occurs in the GPU's name counts."""
ACHIEVED_SHARE = 0.35
"""Share of the peak that a step reaches: assumed, a common figure for training transformers of this size."""
CPU_FLOPS_PER_CORE = 40e9
"""A core in float32 and bf16 at rows of 128 and more: measured, 35 to 42."""
KEPT_CHECKPOINTS = 2
"""Of a trial that saves on the way, the newest; the second is there for the case that the first is damaged."""


def peak_flops(gpu_name: str) -> float | None:
    """Peak dense bf16 operations a second of a GPU by its name; None for one that the table does not have."""
    name = gpu_name.lower()
    return next((flops for key, flops in PEAK_FLOPS if key in name), None)


def forward_flops_per_token(anatomy: ModelAnatomy, row_tokens: int, num_classes: int = 0) -> float:
    """One forward pass: 2 per parameter that multiplies (the embedding look-up does not), and the attention scores.

    Scores and their use cost 2 x 2 x row width x query width a block, computed for the whole row.
    """
    return 2.0 * (_block_matrices(anatomy, 0) + _head_elements(anatomy, num_classes)) + _attention(anatomy, 0, row_tokens)


def train_flops_per_token(
    anatomy: ModelAnatomy, selection: LayerSelection, row_tokens: int, *, checkpointing: bool = False, num_classes: int = 0
) -> float:
    """One training step, per token.

    N parameters multiply, a share k of them above the cut. Forward 2N; gradients of activations from the head down
    to the cut 2kN; gradients of weights 2 per element that learns (and 6 in all per adapter element); checkpointing
    runs the blocks above the cut again, 2kN. So LoRA on every block is 4N, LoRA above the cut 2N + 2kN, and full
    tuning 6N. The backward pass of the attention scores costs twice their forward pass, above the cut.
    """
    forward = forward_flops_per_token(anatomy, row_tokens, num_classes)
    if not selection.trainable and not selection.adapted:
        return forward
    above = _block_matrices(anatomy, selection.cut)
    learning = sum(_elements(anatomy, name, num_classes) for name in selection.trainable if name not in anatomy.embeddings)
    adapters = max(0, selection.num_trainable_parameters - sum(_elements(anatomy, n, num_classes) for n in selection.trainable))
    through = 2.0 * (above + _head_elements(anatomy, num_classes)) if selection.cut < anatomy.num_blocks else 0.0
    cost = forward + through + 2.0 * learning + (6.0 * adapters if selection.adapted else 0.0)
    cost += 2 * _attention(anatomy, selection.cut, row_tokens)
    return cost + (2.0 * above + _attention(anatomy, selection.cut, row_tokens) if checkpointing else 0.0)


def expected_steps(search: SearchPlan) -> float:
    """Steps that a trial trains on average when one in `reduction_factor` goes on past each rung."""
    steps, before = 0.0, 0
    for power, rung in enumerate(search.rung_steps):
        steps += (rung - before) / search.reduction_factor**power
        before = rung
    return steps


def run_flops(plan: RunPlan, anatomy: ModelAnatomy) -> float:
    """Operations of the whole run: trials and controls with their evaluations, or the one training, and the refit."""
    data, classes, width = plan.data, plan.base.num_classes, plan.execution.row_tokens
    checkpointing = plan.execution.checkpointing
    scored = (data.eval_tokens + data.retain_tokens) * forward_flops_per_token(anatomy, width, classes)
    per_step = plan.total_tokens / plan.total_steps

    def training(selection: LayerSelection, steps: float) -> float:
        return (
            train_flops_per_token(anatomy, selection, width, checkpointing=checkpointing, num_classes=classes) * per_step * steps
        )

    if plan.search is None:
        assert plan.finetune is not None
        return training(plan.finetune.selection, plan.total_steps) + 2 * scored
    search = plan.search
    costs = [training(option.selection, 1.0) for option in search.options]
    mean, largest = sum(costs) / len(costs), max(costs)
    trials = search.num_trials * (mean * expected_steps(search) + scored * len(search.rung_steps) / 2)
    controls = min(costs) * plan.total_steps + 3 * scored
    refit = largest * plan.total_steps if search.rung_steps[-1] < plan.total_steps else 0.0
    return trials + controls + refit


def disk_bytes(num_parameters: int, data: DataSize, trainable: list[int], *, num_trials: int, concurrent_trials: int) -> int:
    """Bytes that the run directory grows to.

    The bundle holds the merged model in 16 bit (2 a parameter); each trial keeps what it learned (2 an element,
    in 16 bit), and while it runs its masters and moments (12); the refit keeps two checkpoints (16); tokens take 5.
    """
    largest = max(trainable, default=0)
    mean = sum(trainable) / max(1, len(trainable))
    tokens = data.train_tokens + data.eval_tokens + data.retain_tokens
    trials = num_trials * 2 * mean + concurrent_trials * 12 * largest
    return round(2 * num_parameters + trials + KEPT_CHECKPOINTS * 16 * largest + 5 * tokens)


def _elements(anatomy: ModelAnatomy, name: str, num_classes: int) -> int:
    if name in anatomy.tensors:
        return anatomy.tensors[name].num_elements
    width = {anatomy.classifier_weight: num_classes, anatomy.head_weight: anatomy.vocab_size}.get(name, 0)
    return width * anatomy.hidden_size


def _head_elements(anatomy: ModelAnatomy, num_classes: int) -> int:
    return (num_classes or anatomy.vocab_size) * anatomy.hidden_size


def _block_matrices(anatomy: ModelAnatomy, first: int) -> int:
    return sum(anatomy.tensors[name].num_elements for block in anatomy.linears[first:] for name in block)


def _attention(anatomy: ModelAnatomy, first: int, row_tokens: int) -> float:
    return 4.0 * row_tokens * anatomy.num_heads * anatomy.head_dim * (anatomy.num_blocks - first)
