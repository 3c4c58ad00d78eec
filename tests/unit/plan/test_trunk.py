"""Which hidden states are stored: what that saves, what it costs, and what refuses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.anatomy import ModelAnatomy, read_anatomy
from orchestrator.plan import make_plan, plan_lines
from orchestrator.plan.cost.estimate import expected_rungs, expected_steps
from orchestrator.plan.cost.flops import attention_width, block_flops_per_token
from orchestrator.plan.estimates import Rate
from orchestrator.plan.trunk import READ_BYTES_PER_S, plan_trunk
from orchestrator.plan.values import RunPlan

SETS = 400_000 + 40_000 + 16_384
"""Tokens of the fixture's sets."""
STATE_BYTES = 2 * 4096
"""Of a token of the 8b in bf16."""


@pytest.fixture(scope="session")
def plan(base: Any, job: Any, data: Any, gpus: Any) -> Any:
    """A plan from sections of a spec, on eight H100s unless told; by name or anatomy the base, `kind` the job."""

    def build(
        name: str | ModelAnatomy = "8b", *, kind: Any = "sweep", on: Any = None, size: Any = None, **sections: Any
    ) -> RunPlan:
        anatomy = base(name) if isinstance(name, str) else name
        return make_plan(job(**sections), anatomy, size or data(), on or gpus(), job=kind, spec_sha256="0" * 64)

    return build


def cuts_of(found: RunPlan) -> tuple[int, ...]:
    return found.trunk.cuts if found.trunk is not None else ()


def amounts(found: RunPlan) -> dict[str, float]:
    assert found.cost is not None
    return {part.name: part.amount for part in found.cost.operations}


def sweep(*layers: str, **more: Any) -> dict[str, Any]:
    return {"search": {"layers": list(layers), "tune": ["lora"], **more}}


def finetune(layers: str, epochs: float) -> dict[str, Any]:
    return {"kind": "finetune", "finetune": {"layers": layers}, "train": {"epochs": epochs}}


@pytest.mark.parametrize(
    ("sections", "cuts", "said"),
    [
        (sweep("last:2"), (30, 32), "activations entering blocks 30, 32 are cached for 456k tokens"),
        (sweep("last:1", "last:2", "last:8"), (24, 30, 31, 32), "activations entering blocks 24, 30, 31, 32 are cached"),
        (sweep("blocks:8-11"), (8, 32), "are cached"),
        (sweep("last:2", "all"), (30, 32), "are cached"),
        (finetune("last:2", 1), (), "computed at every step: storing it would take more time than it saves"),
        (finetune("last:2", 2), (30,), "activations entering block 30 are cached for 456k tokens, 3.5 GiB, saving about"),
        (finetune("last:2", 8), (30,), "saving about 6.14 forward passes"),
        (finetune("all", 8), (), "every trial trains from the first block up: there is no trunk (frozen lower blocks) to store"),
        (finetune("first:2", 8), (), "every trial trains from the first block up"),
        (sweep("last:2") | {"resources": {"cache_bytes": 0}}, (), "resources.cache_bytes is 0"),
        (sweep("last:2") | {"resources": {"cache_bytes": 10**6}}, (), "computed at every step: one cut takes 3.5 GiB"),
    ],
)  # fmt: skip
def test_what_is_stored_and_why(plan: Any, sections: dict[str, Any], cuts: tuple[int, ...], said: str) -> None:
    found = plan(**sections)
    assert cuts_of(found) == cuts
    assert found.trunk is None or found.trunk.num_bytes == len(cuts) * SETS * STATE_BYTES
    assert [note for note in found.notes if said in note], found.notes
    shown = " ".join(" ".join(plan_lines(found)).split())
    assert said in shown


def test_a_sweep_of_all_blocks_leaves_the_trunk_to_its_control(plan: Any) -> None:
    """The control `head` is one training and begins above the last block: alone it pays from the second pass on."""
    assert cuts_of(plan(**sweep("all"))) == (32,)
    assert cuts_of(plan(**sweep("all"), train={"epochs": 0.5})) == ()


def test_dropout_does_not_hinder_it(plan: Any, data: Any, cores: Any, tmp_path: Path) -> None:
    """Nothing is dropped out below a cut (`Objective.train`)."""
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 64, "vocab_size": 512}
    config |= {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    bert = read_anatomy(tmp_path, need_weights=False)
    assert bert.dropout
    sections = sweep("last:2") | {"task": "classify", "data": {"max_tokens": 256}, "train": {"epochs": 8}}
    found = plan(bert, on=cores(), size=data(num_classes=3, longest_document_tokens=200), **sections)
    assert cuts_of(found) == (2, 4)


def test_a_budget_for_one_cut_takes_the_one_that_saves_most(plan: Any) -> None:
    """Both choices get as many trials; below the higher cut lie more blocks."""
    room = SETS * STATE_BYTES
    sections = sweep("last:2", "last:12")
    assert cuts_of(plan(**sections)) == (20, 30, 32)
    for num_bytes, cuts in ((room - 1, ()), (room, (30,)), (2 * room, (20, 30)), (3 * room, (20, 30, 32))):
        found = plan(**sections, resources={"cache_bytes": num_bytes})
        assert cuts_of(found) == cuts
        assert found.trunk is None or found.trunk.max_bytes == num_bytes


def test_the_two_keys_reach_the_run(plan: Any) -> None:
    found = plan(**sweep("last:2"), resources={"cache_folder": "/scratch/states", "cache_bytes": 10**12})
    assert (found.trunk.folder, found.trunk.max_bytes) == ("/scratch/states", 10**12)
    alone = plan(**sweep("last:2"))
    assert (alone.trunk.folder, alone.trunk.max_bytes) == ("", None)


def test_states_that_are_read_slower_than_made_are_not_stored(plan: Any, base: Any, job: Any) -> None:
    """What a token's states take to read against what its blocks take to compute; where no rate is known, operations decide."""
    found, anatomy = plan(**finetune("last:2", 8)), base("8b")
    spec = job(**{name: part for name, part in finetune("last:2", 8).items() if name != "kind"}).spec
    width = attention_width(anatomy, found.execution, found.data)
    even = block_flops_per_token(anatomy, width, 30) * READ_BYTES_PER_S / STATE_BYTES
    for peak, cuts in ((even / 3, (30,)), (even, ()), (10 * even, ()), (None, (30,))):
        rate = Rate(device="test", peak_flops=peak, achieved_share=1.0, source="test")
        trunk, reason = plan_trunk(found, spec, anatomy, rate)
        assert (trunk.cuts if trunk is not None else ()) == cuts, reason


def test_the_forward_pass_that_fills_it_is_a_part_of_the_cost(plan: Any, base: Any) -> None:
    with_it, without = (plan(**sweep("last:2", "last:8"), resources={"cache_bytes": size}) for size in ("auto", 0))
    anatomy, width = base("8b"), with_it.execution.row_tokens
    assert amounts(with_it)["trunk"] == pytest.approx(SETS * block_flops_per_token(anatomy, width, 32))
    assert "trunk" not in amounts(without)
    assert with_it.gpu_hours < without.gpu_hours / 2
    assert with_it.cost.gpu_hours_without_stopping < without.cost.gpu_hours_without_stopping / 2


def test_operations_of_a_choice_begin_at_its_cut(plan: Any, base: Any) -> None:
    with_it, without = (plan(**sweep("last:2", "last:8", "all"), resources={"cache_bytes": size}) for size in ("auto", 0))
    anatomy, width = base("8b"), with_it.execution.row_tokens
    below = [block_flops_per_token(anatomy, width, cut) for cut in (30, 24, 0)]
    for stored, computed, blocks in zip(with_it.cost.options, without.cost.options, below, strict=True):
        assert computed.flops_per_token - stored.flops_per_token == pytest.approx(blocks, abs=1.0)
    search = with_it.search
    trained = search.num_trials * expected_steps(search) * with_it.total_tokens / with_it.total_steps * sum(below) / 3
    saved = amounts(without)["trials"] - amounts(with_it)["trials"]
    assert saved == pytest.approx(trained)
    scored = amounts(without)["scoring"] - amounts(with_it)["scoring"]
    assert scored == pytest.approx(search.num_trials * expected_rungs(search) * (40_000 + 16_384) * sum(below) / 3)
