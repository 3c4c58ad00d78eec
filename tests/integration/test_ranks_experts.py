"""Routed experts over two real processes under ZeRO-2 and ZeRO-3, against one process that knows nothing of DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from orchestrator.anatomy import read_anatomy
from orchestrator.spec.adapters import AdapterOptions

from .test_ranks import NUM_STEPS, Matrix, make_base, make_sets, plan

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

EXPERTS = AdapterOptions(modules=("all", "experts"))
WAYS = {"one": None, "z2": 2, "z3": 3}


def make_experts(folder: Path) -> None:
    """A dense block and two with many experts for few tokens, so that a rank has experts without any; with a load-balancing
    loss."""
    make_base(folder)  # for its tokenizer
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        num_experts=32,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
        output_router_logits=True,
        router_aux_loss_coef=0.05,
        initializer_range=0.2,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("experts")
    make_experts(folder / "base")
    make_sets(folder)
    matrix = Matrix(folder, read_anatomy(folder / "base", need_weights=True))
    for way, stage in WAYS.items():
        execution = plan(stage, dtype="float32")
        matrix.host("none", execution)
        matrix.trial(f"{way}-lora", execution, adapter=EXPERTS)
        matrix.trial(f"{way}-full", execution, tune="full", policy="last:2+router")
        matrix.trial(f"{way}-again", execution, adapter=EXPERTS)
        matrix.trial(f"{way}-resumed", execution, adapter=EXPERTS, stop=2)
        matrix.trial(f"{way}-resumed", execution, adapter=EXPERTS, start=f"{way}-resumed/rung-0", rung=1)
    matrix.trial("z3-checkpointing", plan(3, dtype="float32", checkpointing=True), adapter=EXPERTS)
    matrix.run(1)
    matrix.run(2)
    return matrix


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("way", ["z2", "z3"])
def test_two_ranks_learn_what_one_learns(matrix: Matrix, way: str, tune: str) -> None:
    ours, alone = matrix.losses(f"{way}-{tune}"), matrix.losses(f"one-{tune}")
    assert len(ours) == len(alone) == NUM_STEPS
    # Each rank's micro-batches are balanced for themselves, as they are in one process.
    np.testing.assert_allclose(ours, alone, rtol=1e-4)
    assert alone[-1] < alone[0] - 1e-2
    saved, expected = matrix.artifact(f"{way}-{tune}"), matrix.artifact(f"one-{tune}")
    assert {name: tensor.shape for name, tensor in saved.items()} == {name: tensor.shape for name, tensor in expected.items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_trial_after_others_or_resumed_learns_the_same_bits(matrix: Matrix, way: str) -> None:
    assert matrix.bits(f"{way}-again") == matrix.bits(f"{way}-lora") == matrix.bits(f"{way}-resumed")


def test_recomputed_blocks_learn_the_same(matrix: Matrix) -> None:
    np.testing.assert_allclose(matrix.losses("z3-checkpointing"), matrix.losses("one-lora"), rtol=1e-4)
