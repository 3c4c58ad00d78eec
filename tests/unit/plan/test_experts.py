"""What a plan says of routed experts: sizes and operations of adapters, copies, balance, what shares a batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.anatomy import ModelAnatomy, select
from orchestrator.anatomy.config import find_layout, read_config
from orchestrator.anatomy.reader import implied_anatomy
from orchestrator.plan.cost.flops import adapter_elements, adapter_elements_per_pass
from orchestrator.plan.fusing import may_share
from orchestrator.plan.memory.activations import kept_by_adapter
from orchestrator.plan.memory.experts import expert_footprint, expert_terms
from orchestrator.plan.memory.footprint import learning_counts
from orchestrator.spec.adapters import AdapterOptions

HIDDEN, INNER, EXPERTS, CHOSEN, RANK = 16, 8, 6, 2, 4


@pytest.fixture
def anatomy(tmp_path: Path) -> ModelAnatomy:
    values = {
        "model_type": "qwen3_moe",
        "vocab_size": 40,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "dtype": "float32",
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "moe_intermediate_size": INNER,
        "output_router_logits": True,
    }
    layout = find_layout(values)
    assert layout is not None
    return implied_anatomy(read_config(tmp_path, values, layout))


def test_adapters_of_experts_are_counted_by_expert(anatomy: ModelAnatomy) -> None:
    selection = select(anatomy, "last:1", "lora", RANK, adapter=AdapterOptions(modules="experts"), task="completion")
    up, down = 2 * INNER + HIDDEN, INNER + HIDDEN
    assert selection.num_trainable_parameters == EXPERTS * RANK * (up + down)
    assert sum(learning_counts(anatomy, selection)) == selection.num_trainable_parameters
    assert adapter_elements(anatomy, selection) == (CHOSEN * RANK * (up + down), 0)
    kept = [kept_by_adapter(anatomy, selection, name) for name in selection.adapted]
    assert kept == [CHOSEN * (HIDDEN + 8), CHOSEN * (INNER + 8)]  # rows, and what a rank of 4 is filled up to
    assert not may_share(anatomy, select(anatomy, "last:1", "lora", RANK, task="completion"))


def test_a_class_that_computes_its_experts_itself_needs_copies(anatomy: ModelAnatomy) -> None:
    assert anatomy.experts is not None
    alone = anatomy.model_copy(update={"experts": anatomy.experts.model_copy(update={"grouped": False, "balance": 0.0})})
    selection = select(alone, "last:2", "lora", RANK, adapter=AdapterOptions(modules="experts"), task="completion")
    copies = EXPERTS * 3 * INNER * HIDDEN * 4
    found = expert_footprint(alone, selection, 4)
    assert (found.copied_bytes, found.copied_block_bytes) == (2 * copies, copies)
    assert [sum(term.num_bytes for term in expert_terms(found, 100, checkpointing=again)) for again in (False, True)] == [
        3 * copies,
        2 * copies,
    ]
    assert adapter_elements(alone, selection) == (0, 0)
    assert adapter_elements_per_pass(alone, selection) == 3 * RANK * 2 * copies // 4
    assert not expert_footprint(anatomy, selection, 4).copied_bytes


def test_the_load_balancing_loss_follows_the_config(anatomy: ModelAnatomy) -> None:
    assert anatomy.experts is not None
    assert anatomy.experts.balance == 0.001
    selection = select(anatomy, "last:2", "lora", RANK, task="completion")
    assert expert_footprint(anatomy, selection, 4).balance_token_bytes == 2 * EXPERTS * 12


def test_full_leaves_routers_out_unless_asked(anatomy: ModelAnatomy) -> None:
    router = "model.layers.2.mlp.gate.weight"
    without, asked = (select(anatomy, policy, "full", None, task="completion") for policy in ("last:1", "last:1+router"))
    assert router in without.frozen
    assert router in asked.trainable
    assert set(asked.trainable) - set(without.trainable) == {router}
    assert asked.policy == "last:1+router"
