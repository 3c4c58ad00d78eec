"""Trials that share a batch have the numbers that they have alone, whoever their neighbours are."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import build_set
from orchestrator.errors import RankOutOfMemoryError, SelectionError
from orchestrator.plan.fusing import fuse_key
from orchestrator.spec.adapters import PLAIN_LORA, AdapterOptions
from orchestrator.store import read_jsonl
from orchestrator.train import TrainHost, fused_batch, memory_retry, session
from orchestrator.train.adapters.branch import open_group
from orchestrator.train.adapters.layers import AdaptedLinear, AdapterSpec
from orchestrator.train.fused_batch import FusedBatchSizes, measure_batch_size
from orchestrator.train.member import SessionSetup
from orchestrator.work.assignment import TrainRung, WorkContext
from orchestrator.work.execution import BaseLoad, DataPaths, ExecutionPlan, TrainSettings, TrunkPlan
from orchestrator.work.results import RungResult
from orchestrator.work.trial import TrialSpec

RUNGS = (3, 8)


class Gang:
    """A host, and groups on it. Every trial is named by its rate and lora_rank."""

    def __init__(self, base_folder: Path, folder: Path, dtype: str) -> None:
        self.folder = folder
        self.adapter = PLAIN_LORA
        self.anatomy = read_anatomy(base_folder, need_weights=True)
        generator = np.random.default_rng(0)
        for name, count in (("train", 24), ("eval", 6)):
            lengths = generator.integers(8, 24, size=count)
            build_set([(generator.integers(3, 90, size=n), np.arange(n) >= n // 2) for n in lengths]).save(folder / f"{name}.npz")
        self.execution = ExecutionPlan.model_validate(
            {
                "device": "cpu",
                "ranks": 1,
                "threads_per_rank": 1,
                "executor": "torch",
                "dtype": dtype,
                "row_tokens": 32,
                "micro_batch_rows": 2,
            }
        )
        load = BaseLoad(folder=str(base_folder), model_type="llama", quantize="none", task="completion")
        self.host = TrainHost.create(load, self.anatomy, self.execution, 0, 1, None)

    def assignment(self, name: str, rung: int = 0, *, place: str = "alone", policy: str = "last:2", **values: Any) -> TrainRung:
        rate, rank = name.split("-r")
        folder = self.folder / place / name
        trial = TrialSpec(
            trial_id=name,
            number=0,
            layers=policy,
            tune="lora",
            learning_rate=float(rate),
            lora_rank=int(rank),
            adapter=self.adapter,
            total_steps=RUNGS[-1],
            total_tokens=64 * RUNGS[-1],
            seed=1,
        )
        return TrainRung(
            context=WorkContext(
                settings=TrainSettings(warmup=0.1, schedule="cosine", weight_decay=0.1, grad_clip=0.5, tokens_per_step=64),
                data=DataPaths(
                    **{s: str(self.folder / f"{'train' if s == 'train' else 'eval'}.npz") for s in ("train", "eval", "retain")}
                ),
                metric="loss",
                trunk=TrunkPlan(cuts=(2,), num_bytes=0),
            ),
            trial=trial,
            selection=select(self.anatomy, policy, "lora", int(rank), adapter=self.adapter, task="completion"),
            execution=self.execution,
            folder=str(folder),
            rung=rung,
            start=str(folder / f"rung-{rung - 1}") if rung else None,
            stop_step=RUNGS[rung],
            **values,
        )

    def path(self, name: str) -> str:
        return str(self.folder / f"{name}.npz")

    def fused(self, names: list[str], rung: int = 0, place: str = "fused", **values: Any) -> dict[str, RungResult]:
        group = [self.assignment(name, rung, place=place, **values) for name in names]
        self.host.batch_sizes.limit(group[0], len(group))
        results = self.host.run_group(group)
        self.host.settle()
        return {result.trial_id: result for result in results}

    def alone(self, name: str) -> list[RungResult]:
        return [self.host.run(self.assignment(name, rung)) for rung in range(len(RUNGS))]

    def bits(self, name: str, place: str = "fused") -> list[str]:
        return [line["loss_hex"] for line in read_jsonl(self.folder / place / name / "steps.jsonl")]


@pytest.fixture(params=["float32", "bfloat16"])
def gang(request: pytest.FixtureRequest, llama_folder: Callable[..., Path], tmp_path: Path) -> Iterator[Gang]:
    folder = tmp_path / "base"
    shutil.copytree(llama_folder(), folder)
    made = Gang(folder, tmp_path, request.param)
    yield made
    made.host.close()


TRIALS = ["1e-2-r4", "3e-3-r8", "1e-3-r2"]
TWINS = ["2e-3-r4", "5e-3-r4"]
"""Of one lora_rank with the first: their products are stacked with its own."""


def test_the_same_bits_alone_and_in_company_also_when_a_neighbour_leaves(gang: Gang) -> None:
    alone = {name: gang.alone(name) for name in (*TRIALS, *TWINS)}
    first = gang.fused([*TRIALS, *TWINS])
    second = gang.fused([*TRIALS[:2], *TWINS], rung=1)  # the third is stopped at the rung
    third = gang.fused(TRIALS[2:], rung=1)  # and comes back later
    gang.fused([*TRIALS, *TWINS], place="disk")
    gang.host.context.saver.forget()
    from_disk = gang.fused([*TRIALS, *TWINS], rung=1, place="disk")
    assert [result.engine.from_memory for result in from_disk.values() if result.engine] == [False] * 5
    assert [result.engine.from_memory for result in (second | third).values() if result.engine] == [True] * 5
    for name in (*TRIALS, *TWINS):
        assert gang.bits(name) == gang.bits(name, "disk") == gang.bits(name, "alone")
        assert first[name].eval_loss == alone[name][0].eval_loss
        assert (second | third)[name].eval_loss == alone[name][1].eval_loss
        assert (second | third)[name].retain_loss == alone[name][1].retain_loss
    engine = first[TRIALS[0]].engine
    assert engine is not None
    assert (engine.fused_trials, engine.trunk_cut) == (5, 2)


@pytest.mark.parametrize("options", [{"kind": "dora"}, {"kind": "rslora", "alpha": 3}, {"modules": "mlp"}], ids=str)
def test_adapters_of_every_kind_have_the_same_bits_in_company(gang: Gang, options: dict[str, Any]) -> None:
    for name in TRIALS:
        gang.adapter = AdapterOptions.model_validate(options)
        gang.alone(name)
    gang.fused([*TRIALS, *TWINS])
    gang.fused([*TRIALS, *TWINS], rung=1)
    assert all(gang.bits(name) == gang.bits(name, "alone") for name in TRIALS)


def test_dropout_shares_no_batch_and_a_resumed_trial_draws_the_same_masks(gang: Gang) -> None:
    plain = gang.alone(TRIALS[0])
    gang.adapter = AdapterOptions(dropout=0.3)
    assignment = gang.assignment(TRIALS[0])
    assert fuse_key(assignment, gang.execution, gang.anatomy) is None
    with pytest.raises(SelectionError, match="share a batch"):
        open_group(gang.host.context.base, [AdapterSpec(assignment.selection, 8, 0)])
    name = TRIALS[1]
    gang.alone(name)
    whole = gang.assignment(name, place="whole").model_copy(update={"stop_step": RUNGS[-1]})
    gang.host.run(whole)
    assert gang.bits(name, "whole") == gang.bits(name, "alone")
    gang.adapter = PLAIN_LORA
    gang.host.run(gang.assignment(name, place="plain"))
    first, second = gang.bits(name, "plain")[:2], gang.bits(name, "alone")[:2]
    assert first[0] == second[0], "B is zero"
    assert first[1] != second[1]
    assert plain[0].state == "done"


def test_a_neighbour_that_diverges_fails_alone(gang: Gang) -> None:
    gang.alone(TRIALS[0])
    results = gang.fused([TRIALS[0], "1e30-r4", TRIALS[1]])
    assert results["1e30-r4"].state == "failed"
    assert "norm became" in results["1e30-r4"].reason or "loss became" in results["1e30-r4"].reason
    assert results[TRIALS[0]].state == results[TRIALS[1]].state == "done"
    assert gang.bits(TRIALS[0]) == gang.bits(TRIALS[0], "alone")[: RUNGS[0]]
    assert not (gang.folder / "fused" / "1e30-r4" / "rung-0").exists()
    assert results["1e30-r4"].eval_loss is None, "a trial that failed has no scores, as when it is alone"


def test_a_batch_ends_where_all_of_its_trials_have_failed(gang: Gang) -> None:
    results = gang.fused(["1e30-r4", "2e30-r4"])
    assert [result.state for result in results.values()] == ["failed", "failed"]
    assert all(result.step < RUNGS[0] and result.eval_loss is None for result in results.values())
    assert gang.host.run(gang.assignment(TRIALS[0])).state == "done"


def test_other_blocks_above_the_same_cut(gang: Gang) -> None:
    gang.host.run(gang.assignment(TRIALS[0]))
    group = [gang.assignment(TRIALS[0], place="fused"), gang.assignment(TRIALS[1], place="fused", policy="blocks:2")]
    gang.host.batch_sizes.limit(group[0], 2)
    assert [result.state for result in gang.host.run_group(group)] == ["done", "done"]
    assert gang.bits(TRIALS[0]) == gang.bits(TRIALS[0], "alone")


def test_the_base_product_of_each_module_runs_once_for_all(gang: Gang) -> None:
    base = gang.host.context.base
    specs = [AdapterSpec(select(gang.anatomy, "last:2", "lora", 4, task="completion"), 8, seed) for seed in range(3)]
    calls: Counter[str] = Counter()
    with open_group(base, specs):
        adapted = [(name, module) for name, module in base.model.named_modules() if isinstance(module, AdaptedLinear)]
        for name, module in adapted:
            module.base_layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
        ids = torch.arange(3, 11).repeat(6, 1)
        base.model(input_ids=ids, use_cache=False)
    assert len(adapted) == 14
    assert calls == {name: 1 for name, _ in adapted}


def test_what_learns_beside_adapters_shares_no_batch(gang: Gang) -> None:
    learns = select(gang.anatomy, "last:2", "full", None, task="completion")
    adapts = select(gang.anatomy, "last:2+head", "lora", 4, task="completion")
    for head in (learns, adapts):
        with pytest.raises(SelectionError, match="share a batch"):
            open_group(gang.host.context.base, [AdapterSpec(head, 8, 0)])
    assert not any(parameter.requires_grad for parameter in gang.host.context.base.model.parameters())


@pytest.mark.parametrize("place", ["forward", "optimizer"])
def test_a_group_without_memory_goes_on_in_halves(gang: Gang, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    gang.alone(TRIALS[0])
    forward = AdaptedLinear.forward

    def cramped(self: AdaptedLinear, x: torch.Tensor) -> torch.Tensor:
        if self.num_trials > 1:
            raise MemoryError("out of memory")
        return forward(self, x)

    open_member = session.open_member

    def no_room_for_two(setup: SessionSetup, *rest: Any) -> Any:
        if setup.num_members > 1:
            raise MemoryError("out of memory")
        return open_member(setup, *rest)

    if place == "forward":
        monkeypatch.setattr(AdaptedLinear, "forward", cramped)
    else:
        monkeypatch.setattr(session, "open_member", no_room_for_two)
    results = gang.fused(TRIALS[:2])
    assert [result.state for result in results.values()] == ["done", "done"]
    assert any("trials per batch reduced from" in note for result in results.values() for note in result.notes)
    assert gang.bits(TRIALS[0]) == gang.bits(TRIALS[0], "alone")[: RUNGS[0]]


def test_a_group_without_memory_on_one_rank_alone_ends_the_gang(gang: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks wait for this one: to go on by itself would answer them with another group's numbers."""

    def no_room(*_: object) -> None:
        raise MemoryError("out of memory")

    monkeypatch.setattr(session, "open_member", no_room)
    monkeypatch.setattr(memory_retry, "is_shared", lambda *_: False)
    with pytest.raises(RankOutOfMemoryError, match="out of memory on rank 0"):
        gang.fused(TRIALS[:2])


@pytest.mark.parametrize(
    ("seconds", "width", "tried"), [((1.0, 1.5, 4.0), 2, "1: 1000.0 ms, 2: 750.0 ms"), ((1.0, 2.0), 1, "1: ")]
)
def test_the_width_that_takes_least_time_a_trial_is_taken(
    gang: Gang, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], width: int, tried: str
) -> None:
    taken = iter(seconds)
    monkeypatch.setattr(fused_batch, "_seconds", lambda *_: next(taken))
    group = [gang.assignment(f"{rate}e-3-r4") for rate in range(1, 5)]
    found, said = measure_batch_size(gang.host.context, group)
    assert found == width
    assert said.startswith(f"{width} trials share a batch (time per trial's micro-batch, by trials in a batch: {tried}")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_measurement_leaves_the_base_as_it_was(gang: Gang, checkpointing: bool) -> None:
    execution = gang.execution.model_copy(update={"checkpointing": checkpointing})
    group = [gang.assignment(name).model_copy(update={"execution": execution}) for name in TRIALS]
    measure_batch_size(gang.host.context, group)
    assert not any(isinstance(module, AdaptedLinear) for module in gang.host.context.base.model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in gang.host.context.base.model.modules())


def test_the_width_is_measured_again_where_nobody_has_tried_so_many(gang: Gang, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def all_pay(_: object, group: list[TrainRung], *rest: object) -> tuple[int, str]:
        measured.append(len(group))
        return (2 if len(group) < 4 else 4), ""

    monkeypatch.setattr(fused_batch, "measure_batch_size", all_pay)
    group = [gang.assignment(name) for name in (*TRIALS, "2e-3-r4")]
    sizes = FusedBatchSizes(gang.host.context)
    assert [sizes.choose(group[:count], lambda _: None) for count in (1, 2, 3, 4, 3, 4)] == [1, 2, 2, 4, 3, 4]
    assert measured == [2, 4]
    sizes.limit(group[0], 2)
    assert sizes.choose(group, lambda _: None) == 2, "there was no memory for more"
