from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.anatomy import LayerSelection
from orchestrator.data import TokenizedSet, build_set
from orchestrator.errors import OutOfMemoryError
from orchestrator.train.adapters.branch import Branch, open_branch
from orchestrator.train.batches import RowPlan, StepPlan, step_inputs
from orchestrator.train.engines.torch_engine import TorchEngine
from orchestrator.train.loop import EngineRounds, LoopState, LoopTrial, train_steps
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.objective import Objective, final_norm_of
from orchestrator.train.ranks import Ranks
from orchestrator.work.execution import TrainSettings
from orchestrator.work.results import StepReport
from orchestrator.work.trial import TrialSpec

SETTINGS = TrainSettings(warmup=0.0, schedule="constant", weight_decay=0.0, grad_clip=1.0, tokens_per_step=64)


def documents(count: int = 24) -> TokenizedSet:
    generator = np.random.default_rng(0)
    lengths = generator.integers(8, 24, size=count)
    return build_set([(generator.integers(3, 97, size=n), np.arange(n) >= n // 2) for n in lengths])


def trial(rate: float = 1e-2, seed: int = 0) -> TrialSpec:
    return TrialSpec(
        trial_id="t", number=0, layers="last:1", tune="lora", learning_rate=rate, total_steps=9, total_tokens=999, seed=seed
    )


@pytest.fixture
def branch(
    llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase], selection_on: Callable[..., LayerSelection]
) -> Iterator[Branch]:
    base = base_of(llama_folder())
    with open_branch(base, selection_on(base, "last:1"), lora_alpha=8, seed=0) as opened:
        yield opened


def objective_of(branch: Branch) -> Objective:
    norm = final_norm_of(branch.model, branch.base.anatomy)
    return Objective(branch.model, branch.backbone(), branch.head(), "completion", final_norm=norm)


def engine_on(branch: Branch) -> TorchEngine:
    return TorchEngine(objective_of(branch), branch.learning_parameters(), weight_decay=0.0, grad_clip=1.0)


def run_trial(
    engine: TorchEngine, *, stop: int = 4, rows: int = 2, rate: float = 1e-2, state: LoopState | None = None
) -> tuple[LoopTrial, list[StepReport]]:
    reports: list[StepReport] = []
    made = LoopTrial(engine, trial(rate), SETTINGS, lambda report, _: reports.append(report), state or LoopState())
    plan, first = StepPlan(documents(), SETTINGS.tokens_per_step, 0), made.state.step
    steps = step_inputs(plan, RowPlan(32, rows, pack=True), first, stop)
    train_steps([made], EngineRounds(engine, torch.device("cpu")), steps, Ranks())
    return made, reports


def run(engine: TorchEngine, **how: Any) -> list[StepReport]:
    made, reports = run_trial(engine, **how)
    assert not made.failure
    return reports


def test_steps_go_on_over_epochs_and_from_anywhere() -> None:
    plan = StepPlan(documents(), 64, 5)
    first = plan.steps_from(0)
    all_steps = [next(first) for _ in range(3 * len(plan.epoch(0)))]
    assert {epoch for epoch, _ in all_steps} >= {0, 1, 2}
    for start in (0, 1, len(plan.epoch(0)), len(plan.epoch(0)) + 3):
        again = StepPlan(documents(), 64, 5).steps_from(start)
        for epoch, expected in all_steps[start : start + 4]:
            found_epoch, found = next(again)
            assert found_epoch == epoch
            np.testing.assert_array_equal(found, expected)
    assert sorted(np.concatenate(plan.epoch(0)).tolist()) == list(range(24))


def test_reports_say_what_happened(branch: Branch) -> None:
    reports = run(engine_on(branch))
    data = documents()
    plan = StepPlan(data, SETTINGS.tokens_per_step, 0)
    tokens = 0
    for report, (epoch, chosen) in zip(reports, plan.steps_from(0), strict=False):
        tokens += int(data.lengths[chosen].sum())
        assert (report.epoch, report.tokens) == (epoch, tokens)
        assert report.supervised_tokens == int(data.num_supervised[chosen].sum())
        assert float.fromhex(report.loss_hex) == report.loss
        assert report.learning_rate == 1e-2
        assert report.grad_norm > 0
        assert report.memory_bytes > 0
    assert [report.step for report in reports] == [1, 2, 3, 4]


def test_rows_in_a_micro_batch_do_not_matter(
    llama_folder: Callable[..., Path], base_of: Callable[..., LoadedBase], selection_on: Callable[..., LayerSelection]
) -> None:
    """One token loss is as heavy as another, however they are cut into rounds."""
    base = base_of(llama_folder())
    losses = []
    for rows in (1, 2, 8):
        with open_branch(base, selection_on(base, "last:1"), lora_alpha=8, seed=0) as branch:
            losses.append([(report.loss, report.grad_norm) for report in run(engine_on(branch), rows=rows)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)


def test_the_loss_is_the_mean_over_the_supervised_tokens(branch: Branch) -> None:
    engine, data = engine_on(branch), documents()
    (first, *_) = StepPlan(data, SETTINGS.tokens_per_step, 0).epoch(0)
    total = 0.0
    for document in first:
        ids, supervised = data.document(int(document))
        tokens = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            logits = branch.model(input_ids=tokens[None]).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        total += losses[torch.from_numpy(supervised[1:])].sum().item()
    (report,) = run(engine, stop=1)
    assert report.loss == pytest.approx(total / data.num_supervised[first].sum(), rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_trial_before_the_update(branch: Branch) -> None:
    engine = engine_on(branch)
    run(engine, stop=1)
    for _, parameter in branch.learning_parameters():
        parameter.data.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in engine.state_dict().items()}
    made, reports = run_trial(engine, stop=3, state=LoopState(1, 60))
    assert made.failure is not None
    assert made.failure.kind == "non_finite"
    assert "training loss became nan" in made.failure.message
    assert (made.state, reports) == (LoopState(1, 60), []), "it takes no step, nor a later one"
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state_dict().items())


class Cramped(TorchEngine):
    """An engine on a machine where more than one row does not fit."""

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if len(batch["input_ids"]) > 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return super().loss(batch)


def test_memory_that_runs_out_is_told_from_other_errors(branch: Branch) -> None:
    engine = Cramped(objective_of(branch), branch.learning_parameters(), weight_decay=0.0, grad_clip=1.0)
    with pytest.raises(OutOfMemoryError, match="micro-batch of 2 rows"):
        run(engine, stop=1, rows=2)
    assert len(run(engine, stop=1, rows=1)) == 1
    engine.loss = lambda batch: 1 / 0  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        run(engine, stop=1, rows=1)
