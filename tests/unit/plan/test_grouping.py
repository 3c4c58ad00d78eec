"""Who may share a batch with whom."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.anatomy import read_anatomy, select
from orchestrator.plan.fusing import FuseKey, concurrent_trials, fuse_key
from orchestrator.samples import SAMPLE_BASE
from orchestrator.work.assignment import EvaluateBase, MeasureShift, ScoreBlocks, TimeCompiling, TrainRung, Work, WorkContext
from orchestrator.work.execution import DataPaths, ExecutionPlan, TrainSettings
from orchestrator.work.measurements import CompilePlan, ProbePlan, ShiftPlan
from orchestrator.work.memory_ladder import MemoryLadder, SmallerExecution
from orchestrator.work.remedies import AnchorPlan, Remedies
from orchestrator.work.trial import TrialSpec

ANATOMY = read_anatomy(SAMPLE_BASE, need_weights=False)
PLANNED = ExecutionPlan(device="cpu", ranks=1, threads_per_rank=1, executor="torch", row_tokens=64, micro_batch_rows=4)
SETTINGS = TrainSettings(warmup=0, schedule="constant", weight_decay=0, grad_clip=0, tokens_per_step=512)
SMALLER = MemoryLadder().step(PLANNED, "out of memory")
assert isinstance(SMALLER, SmallerExecution)


def assignment(
    policy: str = "last:2", lora_rank: int = 8, learning_rate: float = 1e-3, trial: dict[str, Any] | None = None, **values: Any
) -> TrainRung:
    tune = (trial or {}).get("tune", "lora")
    spec = TrialSpec(
        trial_id=f"{policy} {lora_rank} {learning_rate}",
        number=0,
        layers=policy,
        tune=tune,
        learning_rate=learning_rate,
        lora_rank=lora_rank,
        total_steps=36,
        total_tokens=36 * 512,
        seed=0,
    )
    made = TrainRung(
        context=WorkContext(settings=SETTINGS, data=DataPaths(train="train.npz", eval="eval.npz"), metric="loss"),
        trial=spec.model_copy(update=trial or {}),
        selection=select(ANATOMY, policy, tune, lora_rank if tune == "lora" else None, task="completion"),
        execution=PLANNED,
        folder=f"trials/{policy}",
        rung=0,
        stop_step=4,
    )
    shared = {name: values.pop(name) for name in list(values) if name in WorkContext.model_fields}
    return made.model_copy(update={**values, "context": made.context.model_copy(update=shared)})


def key(of: Work) -> FuseKey | None:
    return fuse_key(of, PLANNED, ANATOMY)


CLASSIFIER = select(ANATOMY, "last:2", "lora", 8, task="classify", num_classes=3)


@pytest.mark.parametrize(
    "alone",
    [
        {"trial": {"control": "shuffled"}},
        {"trial": {"tune": "full"}},
        {"selection": CLASSIFIER},
        {"policy": "last:2+head"},
        {"execution": PLANNED.model_copy(update={"executor": "deepspeed"}), "planned": None},
        {"execution": SMALLER.execution},
        {"metric": "exact_match"},
        {"metric": "package.module:function"},
    ],
    ids=[
        "a control",
        "full",
        "a classifier too",
        "the head too",
        "deepspeed",
        "reduced",
        "generates",
        "anything",
    ],
)
def test_what_runs_alone(alone: dict[str, Any]) -> None:
    found = assignment(**{name: value for name, value in alone.items() if name != "planned"})
    planned = found.execution if "planned" in alone else PLANNED
    assert fuse_key(found, planned, ANATOMY) is None


def test_ranks_that_share_the_documents_share_batches_too() -> None:
    two = PLANNED.model_copy(update={"ranks": 2})
    assert fuse_key(assignment(execution=two), two, ANATOMY) == fuse_key(assignment(lora_rank=4, execution=two), two, ANATOMY)
    assert fuse_key(assignment(execution=two), two, ANATOMY) is not None


@pytest.mark.parametrize(
    "own",
    [{"learning_rate": 2e-3}, {"lora_rank": 4}, {"start": "rung-9"}, {"keep_optimizer": False}, {"policy": "blocks:2-7"}],
    ids=["rate", "lora_rank", "start", "kept", "other blocks above one cut"],
)
def test_what_a_trial_may_have_of_its_own(own: dict[str, Any]) -> None:
    first = assignment(policy=f"last:{len(ANATOMY.linears) - 2}")
    other = {"policy": first.trial.layers} | own
    assert key(assignment(**other)) == key(first) is not None


@pytest.mark.parametrize(
    "other",
    [
        {"policy": "last:1"},
        {"trial": {"seed": 1}},
        {"rung": 1, "stop_step": 12},
        {"stop_step": 12},
        {"settings": SETTINGS.model_copy(update={"grad_clip": 1.0})},
        {"data": DataPaths(train="other.npz", eval="eval.npz")},
        {"metric": "perplexity"},
    ],
    ids=["cut", "seed", "rung", "end", "settings", "data", "metric"],
)
def test_what_must_be_equal(other: dict[str, Any]) -> None:
    assert None is not key(assignment(**other)) != key(assignment())


class NewRemedies(Remedies):
    """Remedies with a field that nobody declared as applied per trial."""

    label_smoothing: float = 0.0


def test_trials_with_another_replay_do_not_share_a_batch_and_with_another_anchor_or_decay_do() -> None:
    def with_remedies(remedies: Remedies) -> FuseKey | None:
        return key(assignment(trial={"remedies": remedies}))

    anchor = AnchorPlan(kind="product", strength=3.0)
    assert with_remedies(Remedies(anchor=anchor, layer_decay=0.8)) == with_remedies(Remedies()) is not None
    assert None is not with_remedies(Remedies(replay=0.1)) != with_remedies(Remedies())


def test_a_new_remedy_is_not_fused_across_trials_unless_it_is_declared_per_trial() -> None:
    smoothed, plain = (key(assignment(trial={"remedies": NewRemedies(label_smoothing=s)})) for s in (0.1, 0.0))
    assert None is not smoothed != plain


def test_trials_are_started_ahead_by_one_a_gang() -> None:
    assert [concurrent_trials(40, gangs, fused) for gangs, fused in ((1, 1), (2, 1), (2, 4))] == [2, 4, 10]
    assert concurrent_trials(3, 2, 4) == 3


def test_evaluations_and_measurements_run_alone() -> None:
    rung = assignment()
    context, trial, selection = rung.context, rung.trial, rung.selection
    shared = {"context": context, "execution": PLANNED}
    assert key(rung) is not None
    assert key(EvaluateBase(**shared, trial=trial, selection=selection, folder="trials/none")) is None
    assert key(ScoreBlocks(**shared, seed=0, plan=ProbePlan(num_batches=1, rows=1))) is None
    assert key(MeasureShift(**shared, seed=0, plan=ShiftPlan(cuts=(1,), num_documents=4))) is None
    timing = TimeCompiling(**shared, seed=0, plan=CompilePlan(option=0, reason=""), trial=trial, selection=selection)
    assert key(timing) is None
