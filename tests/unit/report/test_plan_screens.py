"""The plan on a screen of 100 columns: shipped jobs on several clusters, with and without the derivations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.anatomy import read_anatomy, resolve_base
from orchestrator.plan import estimate_data_size, make_plan, plan_lines
from orchestrator.plan.values import ClusterDescription, NodeDescription, RunPlan
from orchestrator.report import plan_view
from orchestrator.spec import load_spec, spec_sha256
from orchestrator.units import GIB, format_flops

SPECS = Path(__file__).parents[3] / "jobs" / "specs"
CLUSTERS = {
    "four-nodes": [(4, 8, 80, "NVIDIA H100 80GB HBM3", 2.5)],
    "unlike": [(3, 8, 80, "NVIDIA A100-SXM4-80GB", None), (5, 4, 45, "NVIDIA RTX 6000 Ada Generation with a long name", None)],
    "unknown": [(4, 8, 96, "Quantum 9000", 1.0)],
    "cores": [(1, 0, 0, "", None)],
}


def cluster(name: str) -> ClusterDescription:
    nodes = (
        NodeDescription(
            count=count,
            num_cpus=96,
            num_gpus=gpus,
            gpu_memory_bytes=memory * GIB,
            gpu_name=gpu,
            gpu_hour_price=price,
            memory_bytes=1000 * GIB,
        )
        for count, gpus, memory, gpu, price in CLUSTERS[name]
    )
    return ClusterDescription(nodes=tuple(nodes), source=name)


def planned(spec_name: str, cluster_name: str) -> RunPlan:
    loaded = load_spec(SPECS / f"{spec_name}.yaml")
    spec = loaded.spec
    anatomy = read_anatomy(resolve_base(spec.base.model, loaded.folder), need_weights=False)
    size = estimate_data_size(40_000_000, 80_000, spec, num_classes=4 if spec.task == "classify" else 0)
    return make_plan(loaded, anatomy, size, cluster(cluster_name), job="sweep", spec_sha256=spec_sha256(spec, "sweep"))


def screen(plan: RunPlan, *, explain: bool = False) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(plan_view(plan, explain=explain))
    return console.export_text()


@pytest.mark.parametrize("explain", [False, True], ids=["short", "explained"])
@pytest.mark.parametrize(
    ("spec", "on"),
    [
        ("llama-70b-zero3", "four-nodes"),
        ("llama-8b-qlora", "four-nodes"),
        ("llama-8b-qlora", "unlike"),
        ("llama-8b-qlora", "unknown"),
        ("quickstart", "cores"),
        ("classify", "cores"),
    ],
)
def test_no_line_is_longer_than_100_columns(spec: str, on: str, explain: bool) -> None:
    lines = screen(planned(spec, on), explain=explain).splitlines()
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines), "nothing is cut off"


def test_the_short_screen_says_what_it_takes() -> None:
    plan = planned("llama-8b-qlora", "four-nodes")
    shown = " ".join(screen(plan).split())
    cost = plan.cost
    assert cost is not None
    assert f"GPU-hours {cost.gpu_hours:.3g} with early stopping, {cost.gpu_hours_without_stopping:.3g} without" in shown
    assert f"price {cost.price:,.2f} at 2.5 per GPU-hour" in shown
    assert "32 gangs of 1 GPU, each inside one node" in shown
    assert format_flops(cost.options[0].flops_per_token) in shown
    assert "Operations of one token" not in shown


def test_the_explanation_has_every_term_with_its_reason() -> None:
    """Every figure of the plan's estimates, and the words that say where it comes from."""
    plan = planned("llama-70b-zero3", "four-nodes")
    shown = "".join(screen(plan, explain=True).split())
    cost, placement = plan.cost, plan.placement
    assert cost is not None
    assert placement is not None
    reasons = [term.reason for option in plan.search.options for term in option.memory.terms]
    reasons += [term.reason for option in cost.options for term in option.terms]
    reasons += [part.reason for part in (*cost.operations, *cost.disk)]
    reasons += [rejected.way for rejected in plan.rejected]
    reasons += [cost.rate.source, *placement.sentences, *plan.reasons]
    # Words that wrap stand between other columns' blanks; without blanks, a long reason's head is enough.
    missing = [reason for reason in reasons if "".join(reason.split())[:40] not in shown]
    assert missing == []


def test_an_unknown_gpu_is_said_and_nothing_is_made_up() -> None:
    plan = planned("llama-8b-qlora", "unknown")
    shown = screen(plan, explain=True)
    assert "unknown: the GPU's peak rate is not in the table" in shown
    assert "price" not in shown
    assert any("GPU-hours unknown" in line for line in plan_lines(plan))


def test_a_plan_of_an_older_version_can_be_shown(make: Any) -> None:
    plan = make.plan()
    assert plan.cost is None
    assert "220.0 MiB" in screen(plan, explain=True)


def test_the_log_has_the_hours_and_the_price() -> None:
    plan = planned("llama-8b-qlora", "four-nodes")
    (line,) = [line for line in plan_lines(plan) if line.startswith("  cost ")]
    assert plan.cost is not None
    assert f"{plan.cost.gpu_hours:.3g} GPU-hours ({plan.cost.gpu_hours_without_stopping:.3g} without early stopping)" in line
    assert f"{plan.cost.price:,.2f} for the GPUs" in line


@pytest.mark.parametrize(
    ("operations", "written"),
    [(12, "12 FLOP"), (2.24e10, "22.4 GFLOP"), (6.4e11, "640 GFLOP"), (9.9e16, "99 PFLOP"), (3e21, "3000 EFLOP")],
)
def test_operations_for_people(operations: float, written: str) -> None:
    assert format_flops(operations) == written
