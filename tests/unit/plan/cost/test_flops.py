"""Operations per token against torch's own count of real steps: the objective, branches and checkpointing that training uses.

On a CPU attention runs in a kernel that `FlopCounterMode` does not know. On a GPU, packed rows run in the memory-efficient
kernel and lone ones in the flash kernel, which it does count; the CPU's is counted here by the same formulas. Bases that
`load_base` loads attend by document, as on any CPU; those made from a config take a mask over whole rows, as on a GPU.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from orchestrator.anatomy import LayerSelection, ModelAnatomy, read_anatomy, select
from orchestrator.data import build_set
from orchestrator.plan.cost import flops as flops_module
from orchestrator.plan.cost.flops import (
    attention_width,
    block_flops_per_token,
    forward_flops_per_token,
    runs_head_twice,
    train_terms,
)
from orchestrator.plan.data_size import DataSize
from orchestrator.spec.adapters import AdapterOptions
from orchestrator.train.adapters.branch import open_branch
from orchestrator.train.batches import RowPlan, to_tensors
from orchestrator.train.model import heads as heads_module
from orchestrator.train.model.base import LoadedBase, load_base
from orchestrator.train.model.heads import IGNORED, LanguageModelHead
from orchestrator.train.model.objective import Objective, final_norm_of, objective_of
from orchestrator.train.model.recompute import recomputed
from orchestrator.train.ranks import Ranks
from orchestrator.train.trunk.build import TrunkBuilder
from orchestrator.train.trunk.chunks import MemoryChunks
from orchestrator.work.execution import BaseLoad, ExecutionPlan

aten = torch.ops.aten
ROWS = 2
TOLERANCE = 0.02
"""The plan promises 5%."""


def train_flops_per_token(anatomy: ModelAnatomy, selection: LayerSelection, attended_tokens: float, **how: Any) -> float:
    return sum(term.flops for term in train_terms(anatomy, selection, attended_tokens, **how))


SIZES = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "num_attention_heads": 8}
BASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2, **SIZES},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4, **SIZES, "tie_word_embeddings": True},
}
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32, **SIZES},
    "gemma": {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 32, **SIZES},
    "gemma3": {"model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 16, **SIZES},
    "phi": {"model_type": "phi", **SIZES},
    "phi3": {"model_type": "phi3", "num_key_value_heads": 2, **SIZES, "pad_token_id": 0},
    "gpt-neox": {"model_type": "gpt_neox", **SIZES},
}
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2, **SIZES}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 8, **EXPERTS},
    "qwen2-moe": {
        "model_type": "qwen2_moe",
        "num_experts": 8,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 192,
        **EXPERTS,
    },
}
CHOICES = {
    "lora all": ("all", "lora"),
    "lora last:2": ("last:2", "lora"),
    "lora last:1": ("last:1", "lora"),
    "full last:2": ("last:2", "full"),
    "full all": ("all", "full"),
    "full all+head": ("all+head", "full"),
    "lora blocks:1": ("blocks:1", "lora"),
    "head": ("head", "full"),
}


def forward_formula(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, like(query, key), like(query, value))


def backward_formula(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_out, query, like(query, key), like(query, value))


def like(query: Any, shape: Any) -> list[int]:
    """Keys or values of fewer heads, which several query heads share: each of these multiplies all the same."""
    return [shape[0], query[1], *shape[2:]]


COUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: forward_formula,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_formula,
}


@cache
def made_base(folder: Path, name: str) -> LoadedBase:
    config = AutoConfig.for_model(**{**BASES, **OTHERS}[name], max_position_embeddings=2048)
    set_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
    anatomy = read_anatomy(folder / name, need_weights=True)
    description = BaseLoad(folder=anatomy.folder, model_type=anatomy.model_type, quantize="none", task="completion")
    return load_base(description, anatomy, dtype=torch.float32, device=torch.device("cpu"))


def rows(width: int, vocab: int, supervised: float) -> dict[str, torch.Tensor]:
    """Two documents a row, computed apart or under a mask; the last `supervised` of each row is predicted."""
    ids = torch.randint(3, vocab, (ROWS, width))
    labels = ids.clone()
    labels[:, : round(width * (1 - supervised))] = IGNORED
    return {
        "input_ids": ids,
        "position_ids": (torch.arange(width) % (width // 2)).expand(ROWS, width),
        "labels": labels,
        "document_ids": torch.zeros_like(ids),
        "class_labels": torch.full((ROWS,), -1),
        "lengths": torch.full((ROWS,), width),
    }


def counted(
    base: LoadedBase,
    selection: LayerSelection,
    batch: dict[str, torch.Tensor],
    checkpointing: bool,
    *,
    stored_trunk: bool = False,
) -> float:
    """Operations of one training step, per token; the batch has its `hidden` states where the trunk is stored.

    A fake tensor has no values to select by. There every position is supervised, and nothing is selected.
    """
    with ExitStack() as stack:
        branch = stack.enter_context(open_branch(base, selection, lora_alpha=16, seed=0))
        norm = final_norm_of(branch.model, base.anatomy)
        objective = (
            objective_of(base, branch.head(), selection.cut)
            if stored_trunk
            else Objective(branch.model, branch.backbone(), branch.head(), "completion", final_norm=norm)
        )
        if checkpointing:
            blocks: Any = base.model.get_submodule(base.anatomy.blocks_module)
            stack.enter_context(recomputed(blocks[selection.cut :]))
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            if isinstance(batch["labels"], FakeTensor):
                hidden = branch.backbone()(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
                head, parts = objective._head, objective._parts
                assert isinstance(head, LanguageModelHead)
                head.token_loss_sum(parts, hidden.flatten(0, 1), batch["labels"].flatten()).backward()
            else:
                objective(**batch).backward()
        for _, parameter in branch.learning_parameters():
            parameter.grad = None
    return counter.get_total_flops() / batch["input_ids"].numel()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def chosen(anatomy: ModelAnatomy, choice: str) -> LayerSelection:
    policy, tune = CHOICES[choice]
    return select(anatomy, policy, tune, 8 if tune == "lora" else None, task="completion")  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [128, 512])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", BASES)
def test_a_training_step_takes_what_the_plan_says(folder: Path, name: str, choice: str, checkpointing: bool, width: int) -> None:
    base = made_base(folder, name)
    selection = chosen(base.anatomy, choice)
    found = counted(base, selection, rows(width, base.anatomy.vocab_size, 0.5), checkpointing)
    planned = train_flops_per_token(base.anatomy, selection, width / 2, checkpointing=checkpointing, supervised_share=0.5)
    assert planned == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("policy", ["all", "last:2", "last:1+head"])
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "rslora"},
        {"kind": "dora"},
        {"kind": "dora", "dropout": 0.1},
        {"dropout": 0.1},
        {"modules": "attention"},
        {"modules": "mlp"},
        {"modules": ("o_proj",)},
        {"modules": ("v_proj", "down_proj")},
        {"kind": "dora", "modules": "mlp"},
    ],
    ids=str,
)
def test_adapters_of_every_kind(folder: Path, options: dict[str, Any], policy: str, checkpointing: bool) -> None:
    base = made_base(folder, "llama")
    adapter = AdapterOptions.model_validate(options)
    selection = select(base.anatomy, policy, "lora", 8, adapter=adapter, task="completion")
    found = counted(base, selection, rows(128, base.anatomy.vocab_size, 0.5), checkpointing)
    planned = train_flops_per_token(
        base.anatomy, selection, 64, checkpointing=checkpointing, supervised_share=0.5, forward_tokens=128 * ROWS
    )
    assert planned == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("choice", ["lora all", "full last:2", "full all"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_designs(folder: Path, name: str, choice: str, checkpointing: bool) -> None:
    """Norms on queries and keys, one key-value head, norms after the MLP, fused projections, parallel residuals."""
    base = made_base(folder, name)
    selection = chosen(base.anatomy, choice)
    found = counted(base, selection, rows(128, base.anatomy.vocab_size, 0.5), checkpointing)
    planned = train_flops_per_token(base.anatomy, selection, 64, checkpointing=checkpointing, supervised_share=0.5)
    # Where attention and MLP both read the block's input, LoRA's upper bound is 3.4% of six blocks.
    assert planned == pytest.approx(found, rel=0.04 if choice == "lora all" else 0.001)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("choice", ["lora all", "lora last:2", "full last:2", "full all"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_token_passes_its_own_experts_alone(folder: Path, name: str, choice: str, checkpointing: bool) -> None:
    config = AutoConfig.for_model(**MIXTURES[name], max_position_embeddings=2048)
    config.save_pretrained(folder / name)
    config._experts_implementation = "eager"
    set_seed(0)
    base = described(folder / name, AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    selection = chosen(base.anatomy, choice)
    found = counted(base, selection, rows(128, base.anatomy.vocab_size, 0.5), checkpointing)
    planned = train_flops_per_token(base.anatomy, selection, 128, checkpointing=checkpointing, supervised_share=0.5)
    assert planned == pytest.approx(found, rel=TOLERANCE)


def described(folder: Path, model: Any) -> LoadedBase:
    """As `load_base` leaves it, for a base that has no weights on disk."""
    anatomy = read_anatomy(folder, need_weights=False)
    model.train()
    model.config.use_cache = False
    model.requires_grad_(False)
    description = BaseLoad(folder=anatomy.folder, model_type=anatomy.model_type, quantize="none", task="completion")
    return LoadedBase(model=model, anatomy=anatomy, load=description, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("choice", ["lora last:2", "lora last:1", "full last:2", "head"])
def test_a_step_from_stored_states_takes_no_blocks_below_its_cut(folder: Path, choice: str, checkpointing: bool) -> None:
    """And filling the store takes those blocks once, and no head."""
    base = made_base(folder, "llama")
    selection, plan = chosen(base.anatomy, choice), RowPlan(256, ROWS, pack=True)
    pairs = [(torch.randint(3, base.anatomy.vocab_size, (128,)).numpy(), np.arange(128) >= 64) for _ in range(2 * ROWS)]
    data = build_set(pairs)
    builder = TrunkBuilder(base, objective_of(base, base.model.get_submodule("lm_head")), plan, Ranks(), partitioned=False)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        states = builder.build(data, {selection.cut: MemoryChunks()})[selection.cut]
    below = block_flops_per_token(base.anatomy, 128, selection.cut)
    assert below == pytest.approx(counter.get_total_flops() / data.num_tokens, rel=0.001)
    (rows_of_step,) = plan.batches(data, np.arange(2 * ROWS))
    batch = to_tensors(rows_of_step, torch.device("cpu"), states)
    found = counted(base, selection, batch, checkpointing, stored_trunk=True)
    how: dict[str, Any] = {"checkpointing": checkpointing, "supervised_share": rows_of_step.num_supervised / data.num_tokens}
    planned = train_flops_per_token(base.anatomy, selection, 128, stored_trunk=True, **how)
    assert planned == pytest.approx(found, rel=0.01)
    whole = counted(base, selection, {name: part for name, part in batch.items() if name != "hidden"}, checkpointing)
    assert whole - found == pytest.approx(below, rel=0.001)


@pytest.mark.parametrize("name", BASES)
def test_scoring_takes_one_forward_pass(folder: Path, name: str) -> None:
    base = made_base(folder, name)
    batch = rows(256, base.anatomy.vocab_size, 0.25)
    parts = base.model.get_submodule(base.anatomy.backbone), base.model.get_submodule("lm_head")
    objective = Objective(base.model, *parts, "text", final_norm=final_norm_of(base.model, base.anatomy))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        objective(**batch, each=True)
    planned = forward_flops_per_token(base.anatomy, 128, supervised_share=0.25)
    assert planned == pytest.approx(counter.get_total_flops() / batch["input_ids"].numel(), rel=0.01)


@pytest.mark.parametrize("policy", ["all", "all+head"])
def test_a_head_with_an_adapter_in_several_chunks_is_computed_twice(
    folder: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain one never is."""
    base = made_base(folder, "llama")
    selection = select(base.anatomy, policy, "lora", 8, task="completion")
    batch, vocab = rows(256, base.anatomy.vocab_size, 1.0), base.anatomy.vocab_size
    once = counted(base, selection, batch, False)
    for module in (heads_module, flops_module):
        monkeypatch.setattr(module, "LOGIT_CHUNK_BYTES", 4 * vocab * 100)
    found = counted(base, selection, batch, False)
    execution = ExecutionPlan.model_validate(
        {"device": "cpu", "ranks": 1, "threads_per_rank": 1, "executor": "torch", "row_tokens": 256, "micro_batch_rows": ROWS}
    )
    twice = runs_head_twice(base.anatomy, selection, execution, size())
    assert twice == (policy == "all+head")
    planned = [train_flops_per_token(base.anatomy, selection, 128, head_twice=head_twice) for head_twice in (False, twice)]
    assert planned[1] - planned[0] == pytest.approx(found - once, rel=0.02)
    assert planned[1] == pytest.approx(found, rel=TOLERANCE)


def test_a_policy_by_score_counts_every_gradient_from_block_0_on(folder: Path) -> None:
    """Its blocks are unknown yet, and it is planned as its worst case: no gradient is left out in block 0."""
    anatomy = made_base(folder, "llama").anatomy
    worst = select(anatomy, "all", "lora", 8, task="completion")
    pending = worst.model_copy(update={"pending": True, "adapted": tuple(name for name in worst.adapted if ".0." not in name)})
    (passing,) = (term.flops for term in train_terms(anatomy, pending, 16.0) if term.name == "gradients of activations")
    assert passing >= 2.0 * sum(anatomy.tensors[name].num_elements for block in anatomy.linears for name in block)


def size(**values: Any) -> DataSize:
    known = {"train_documents": 9, "train_tokens": 999, "steps_per_epoch": 9, "eval_tokens": 99, "retain_tokens": 0}
    return DataSize.model_validate(known | {"longest_document_tokens": 256} | values)


def test_documents_are_apart_on_cpus_alone(folder: Path) -> None:
    """A GPU computes whole rows; so does whoever does not know the documents' lengths."""
    anatomy = made_base(folder, "llama").anatomy
    values = {"ranks": 1, "threads_per_rank": 1, "executor": "torch", "row_tokens": 256, "micro_batch_rows": ROWS}
    cpu, gpu = (ExecutionPlan.model_validate(values | {"device": device}) for device in ("cpu", "cuda"))
    assert attention_width(anatomy, cpu, size(document_tokens=90.5)) == 90.5
    assert attention_width(anatomy, gpu, size(document_tokens=90.5)) == 256
    assert attention_width(anatomy, cpu, size()) == 256
    assert attention_width(anatomy, cpu, size(document_tokens=90.5, num_classes=2)) == 256


# -- published shapes, without their memory ---------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
SHAPES = {
    "llama-3.1-8b": (32, {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}),
    "llama-3.1-70b": (80, {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}),
    "mixtral-8x7b": (
        32,
        {**LLAMA, "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
        | {"num_attention_heads": 32, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
}


def shape_config(folder: Path, name: str, num_blocks: int) -> Any:
    """The config, written to `folder`. Experts are multiplied as gathered stacks, whose shapes hang on no values."""
    config = AutoConfig.for_model(**SHAPES[name][1], num_hidden_layers=num_blocks)
    config.save_pretrained(folder)
    config._experts_implementation = "batched_mm"
    return config


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("choice", ["lora all", "full all", "full all+head"])
@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes(folder: Path, name: str, choice: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on two and on four blocks; each further block adds what those two added."""
    # A fake module cannot be moved, and is where it should be.
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)
    num_blocks, shape = SHAPES[name]
    width, vocab, counts = 2048, shape["vocab_size"], {}
    for few in (2, 4):
        with FakeTensorMode(allow_non_fake_inputs=True):
            config = shape_config(folder / f"{name}-{few}", name, few)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
            base = described(folder / f"{name}-{few}", model)
            counts[few] = counted(base, chosen(base.anatomy, choice), rows(width, vocab, 1.0), checkpointing)
    whole = counts[2] + (num_blocks - 2) * (counts[4] - counts[2]) / 2
    shape_config(folder / name, name, num_blocks)
    anatomy = read_anatomy(folder / name, need_weights=False)
    planned = train_flops_per_token(anatomy, chosen(anatomy, choice), width, checkpointing=checkpointing)
    assert planned == pytest.approx(whole, rel=TOLERANCE)
