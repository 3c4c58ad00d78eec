"""Operations per token against the closed forms, and what follows from them."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.anatomy import select
from orchestrator.plan.cost import disk_bytes, expected_steps, peak_flops, train_flops_per_token
from orchestrator.plan.values import SearchPlan


def parts(anatomy: Any, first: int = 0) -> tuple[float, float, float]:
    """(matrices of blocks from `first`, head, attention forward per token at width 512)."""
    matrices = sum(anatomy.tensors[name].num_elements for block in anatomy.linears[first:] for name in block)
    attention = 4 * 512 * anatomy.num_heads * anatomy.head_dim * (anatomy.num_blocks - first)
    return matrices, anatomy.vocab_size * anatomy.hidden_size, attention


@pytest.mark.parametrize("policy", ["all", "last:8"])
def test_lora_costs_2n_and_2kn(base: Any, policy: str) -> None:
    llama = base("8b")
    selection = select(llama, policy, "lora", 16, task="completion")
    blocks, head, attention = parts(llama)
    above, _, attention_above = parts(llama, selection.cut)
    expected = 2 * (blocks + head) + 2 * (above + head) + 6 * selection.num_trainable_parameters + attention + 2 * attention_above
    assert train_flops_per_token(llama, selection, 512) == pytest.approx(expected)


def test_full_tuning_costs_6n_but_for_the_frozen_head(base: Any) -> None:
    llama = base("8b")
    selection = select(llama, "all+head", "full", None, task="completion")
    blocks, head, attention = parts(llama)
    assert train_flops_per_token(llama, selection, 512) == pytest.approx(6 * (blocks + head) + 3 * attention, rel=1e-3)


def test_checkpointing_runs_the_blocks_above_the_cut_again(base: Any) -> None:
    llama = base("8b")
    selection = select(llama, "last:8", "lora", 16, task="completion")
    above, _, attention_above = parts(llama, selection.cut)
    plain, again = (train_flops_per_token(llama, selection, 512, checkpointing=on) for on in (False, True))
    assert again - plain == pytest.approx(2 * above + attention_above)


def test_a_head_alone_sends_nothing_through_the_blocks(base: Any) -> None:
    llama = base("8b")
    selection = select(llama, "head", "full", None, task="completion")
    blocks, head, attention = parts(llama)
    assert train_flops_per_token(llama, selection, 512) == pytest.approx(2 * blocks + 4 * head + attention)


def test_operations_agree_with_torchs_counter(base: Any) -> None:
    """One LoRA step of the tiny base above a cut, counted by FlopCounterMode: within 5%."""
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    from torch.utils.flop_counter import FlopCounterMode

    llama, rows, width = base("tiny"), 2, 256
    config = transformers.AutoConfig.from_pretrained(llama.folder, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=8, target_modules=names, layers_to_transform=[2, 3])
    model = peft.get_peft_model(model, lora)
    ids = torch.zeros(rows, width, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    selection = select(llama, "last:2", "lora", 8, task="completion")
    assert train_flops_per_token(llama, selection, width) == pytest.approx(counter.get_total_flops() / (rows * width), rel=0.05)


@pytest.mark.parametrize(("rungs", "steps"), [((90,), 90), ((10, 30, 90), 10 + 20 / 3 + 60 / 9)])
def test_early_stopping_halves_the_expected_steps(rungs: tuple[int, ...], steps: float) -> None:
    search = SearchPlan(
        options=(), num_trials=9, algorithm="random", scheduler="asha", rung_steps=rungs, total_steps=90,
        reduction_factor=3, concurrent_trials=1,
    )  # fmt: skip
    assert expected_steps(search) == pytest.approx(steps)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("?", None),
    ],
)
def test_peak_rates(name: str, flops: float | None) -> None:
    assert peak_flops(name) == flops


def test_disk_holds_the_bundle_and_every_trial(data: Any) -> None:
    size = data(train_tokens=0, eval_tokens=0, retain_tokens=0)
    assert disk_bytes(1000, size, [10, 30], num_trials=4, concurrent_trials=2) == 2000 + 4 * 2 * 20 + 2 * 12 * 30 + 2 * 16 * 30
