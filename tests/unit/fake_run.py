"""A run directory with everything in it, made through the real types; each test takes away or spoils what it is about."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.anatomy.values import LayerSelection
from orchestrator.plan.estimates import MemoryEstimate, MemoryTerm
from orchestrator.plan.values import DataSize, FinetunePlan, RejectedWay, RunPlan, SearchPlan, SweepPlan, TrialOption
from orchestrator.transfer.records import (
    ComparisonRecord,
    EngineFigures,
    ModelScores,
    PlanAgainstMeasured,
    PromptComparison,
    RefitRecord,
    RungRecord,
    SweepResult,
    TransferReport,
    TrialRecord,
    VerificationFigures,
)
from orchestrator.work.execution import BaseLoad, ExecutionPlan
from orchestrator.work.results import EngineRecord, RungResult, StepReport
from orchestrator.work.trial import TrialSpec

TOTAL_STEPS, TOKENS_PER_STEP, BASE_LOSS, BASE_RETAIN = 54, 4096, 3.92, 4.081
MIB = 1024**2
PARAMETERS = {"last:2": 1_200_000, "last:4": 2_400_000, "all": 4_800_000, "head": 1_048_576}


def make_option(layers: str, tune: str, lora_rank: int | None) -> TrialOption:
    learns = PARAMETERS[layers] if tune == "full" else PARAMETERS[layers] // 40 * (lora_rank or 1) // 8
    selection = LayerSelection(
        policy=layers,
        tune="lora" if tune == "lora" else "full",
        lora_rank=lora_rank,
        trainable=("model.layers.7.mlp.up_proj.weight",) if tune == "full" else (),
        adapted=("model.layers.7.mlp.up_proj.weight",) if tune == "lora" else (),
        frozen=("model.embed_tokens.weight",),
        cut={"last:2": 6, "last:4": 4, "all": 0, "head": 8}[layers],
        num_trainable_parameters=learns,
    )
    terms = (
        MemoryTerm(name="base weights", num_bytes=12 * MIB, reason="6.1M parameters at 2 bytes"),
        MemoryTerm(name="gradients", num_bytes=4 * learns, reason=f"{learns} learning parameters at 4 bytes"),
        MemoryTerm(name="optimizer states", num_bytes=12 * learns, reason="AdamW: master weight and two moments, 4 bytes each"),
        MemoryTerm(name="activations", num_bytes=150 * MIB, reason="4 rows x 512 tokens x 8 blocks"),
        MemoryTerm(name="logits", num_bytes=64 * MIB, reason="2048 supervised positions x 4096 tokens x 8 bytes"),
    )
    low, high = (1e-4, 5e-3) if tune == "lora" else (1e-5, 5e-4)
    return TrialOption(
        layers=layers,
        tune=selection.tune,
        lora_rank=lora_rank,
        selection=selection,
        memory=MemoryEstimate(terms=terms),
        learning_rate_low=low,
        learning_rate_high=high,
    )


def make_plan(*, search: bool = True, task: str = "completion") -> RunPlan:
    options = tuple(make_option(layers, "lora", rank) for layers in ("last:2", "last:4", "all") for rank in (8, 16))
    options += tuple(make_option(layers, "full", None) for layers in ("head", "last:2", "last:4", "all"))
    execution = ExecutionPlan(
        device="cpu", ranks=1, threads_per_rank=1, executor="torch", row_tokens=512, micro_batch_rows=4, dtype="float32"
    )
    classify = task == "classify"
    shared: dict[str, Any] = {
        "name": "quickstart",
        "spec_sha256": "5d41402abc4b2a76b9719d911017c592ae3f8f2b2a1f0e8ed6f7d1f1f8a4c1de",
        "base": BaseLoad(
            folder="/models/sample",
            model_type="llama",
            quantize="none",
            task="classify" if classify else "completion",
            num_classes=77 if classify else 0,
        ),
        "num_parameters": 6_100_000,
        "data": DataSize(
            train_documents=1200,
            train_tokens=110_592,
            steps_per_epoch=27,
            eval_tokens=9000,
            retain_tokens=16384,
            longest_document_tokens=120,
        ),
        "execution": execution,
        "refit_execution": execution.model_copy(update={"ranks": 2, "executor": "deepspeed", "zero_stage": 2}),
        "num_gangs": 2,
        "base_memory": MemoryEstimate(terms=options[0].memory.terms[:1]),
        "total_steps": TOTAL_STEPS,
        "total_tokens": TOTAL_STEPS * TOKENS_PER_STEP,
        "disk_bytes": 220 * MIB,
        "gpu_hours": None,
        "reasons": (
            "micro-batch 4 rows x 512 tokens x 2 accumulation rounds x 1 rank = 4096 tokens a step",
            "2 gangs: 2 cores, one rank each",
        ),
        "rejected": (RejectedWay(way="4 gangs", reason="there are 2 cores"),),
        "notes": ("CPU only: GPU-hours are not estimated",),
    }
    if not search:
        return FinetunePlan(**shared, finetune=options[3])
    planned = SearchPlan(
        options=options,
        num_trials=16,
        algorithm="optuna",
        scheduler="asha",
        rung_steps=(6, 18, 54),
        total_steps=TOTAL_STEPS,
        reduction_factor=3,
        concurrent_trials=4,
    )
    return SweepPlan(**shared, search=planned)


def make_trial(number: int, layers: str, tune: str, rank: int | None, rate: float, *, state: str = "finished") -> TrialRecord:
    centre = 1.2e-3 if tune == "lora" else 1.5e-4
    distance = abs(math.log10(rate / centre))
    floor = {"last:2": 2.05, "last:4": 1.80, "all": 1.86, "head": 3.1}[layers] + (0.06 if tune == "full" else 0.0)
    final = floor + 0.75 * distance**1.5
    forgetting = {"last:2": 0.02, "last:4": 0.04, "all": 0.11, "head": 0.01}[layers] * (1.0 + 1.6 * math.log10(rate / centre) / 2)
    ends = {"finished": 3, "stopped": 1 + number % 2, "running": 1, "failed": 0}[state]
    rungs = []
    for rung, step in enumerate((6, 18, 54)[:ends]):
        value = final + (BASE_LOSS - final) * math.exp(-step / 12)
        lost = forgetting * step / 54
        rungs.append(
            RungRecord(
                rung=rung,
                step=step,
                tokens=step * TOKENS_PER_STEP,
                train_loss=value - 0.03,
                eval_loss=value,
                metric=value,
                retain_loss=BASE_RETAIN + lost,
                forgetting=lost,
                score=value + max(0.0, lost - 0.1) * 10,
                seconds=(step - (0, 6, 18)[rung]) * 0.11 + 0.4,
            )
        )
    return TrialRecord(
        trial_id=f"t{number:03d}-{number * 7919 % 16**6:06x}",
        number=number,
        layers=layers,
        tune="lora" if tune == "lora" else "full",
        lora_rank=rank,
        learning_rate=rate,
        state=state,  # type: ignore[arg-type]
        reason={
            "failed": "the loss became NaN at step 3 (learning rate 5.0e-04)",
            "stopped": "below the best third at its rung",
            "running": "",
            "finished": "",
        }[state],
        rungs=tuple(rungs),
        total_steps=TOTAL_STEPS,
        trainable_parameters=make_option(layers, tune, rank).selection.num_trainable_parameters,
        gang=number % 2,
        engine=EngineFigures(
            executor="torch",
            engine_class="TorchEngine",
            peak_memory_bytes=(240 + 9 * number) * MIB,
            rank_peak_memory_bytes=((240 + 9 * number) * MIB,),
            predicted_memory_bytes=310 * MIB,
            micro_batch_rows=8,
            device="cpu",
            ordinal=number,
        ),
    )


def make_control(name: str) -> TrialRecord:
    loss = BASE_LOSS if name == "none" else 3.10
    rung = RungRecord(
        step=0 if name == "none" else 54, tokens=0, eval_loss=loss, metric=loss, retain_loss=BASE_RETAIN, forgetting=0.0
    )
    return TrialRecord(
        trial_id=name,
        number=-2 if name == "none" else -1,
        control="none" if name == "none" else "head",
        layers=name,
        tune="full",
        learning_rate=0.0 if name == "none" else 5e-4,
        state="finished",
        rungs=(rung.model_copy(update={"score": loss}),),
        total_steps=0 if name == "none" else 54,
        trainable_parameters=0 if name == "none" else PARAMETERS["head"],
    )


def make_sweep(num_trials: int = 16, **changes: Any) -> SweepResult:
    draw = random.Random(7)
    trials = [make_control("none"), make_control("head")]
    for number in range(num_trials):
        tune = "lora" if number % 3 else "full"
        low, high = (1e-4, 5e-3) if tune == "lora" else (1e-5, 5e-4)
        rate = math.exp(draw.uniform(math.log(low), math.log(high)))
        state = "failed" if number == 9 else "stopped" if draw.random() < 0.5 else "finished"
        rank = draw.choice((8, 16)) if tune == "lora" else None
        trials.append(make_trial(number, draw.choice(("last:2", "last:4", "all")), tune, rank, rate, state=state))
    finished = [trial for trial in trials if trial.control is None and trial.state == "finished"]
    winner = min(finished, key=lambda trial: trial.score or 0.0, default=None)
    values: dict[str, Any] = {
        "name": "quickstart",
        "metric": "loss",
        "higher_is_better": False,
        "max_forgetting": 0.10,
        "trials": tuple(trials),
        "winner_id": winner.trial_id if winner else None,
        "promotion_reason": "the best score among the trials that are not worse than the base and within the bound",
        "advice": ("try rates above 2e-3 with last:4: the best lies near the middle", "add lora rank 32"),
        "num_gangs": 2,
        "base_loads": 2,
        "gang_idle_seconds": 1.9,
        "first_trial_seconds": 11.2,
        "wall_seconds": 74.2,
        "started_at": 1_790_000_000.0,
        "finished_at": 1_790_000_074.2,
    }
    return SweepResult(**(values | changes))


def make_transfer(trial_id: str = "t000", **changes: Any) -> TransferReport:
    values: dict[str, Any] = {
        "verdict": "positive",
        "sentence": "2.09 ± 0.05 nats better than the base, 1.27 ± 0.04 better than head, on 180 test examples",
        "trial_id": trial_id,
        "comparisons": (
            ComparisonRecord(against="none", mean=2.09, low=2.04, high=2.14, method="bootstrap", num_examples=180, p_value=0.0),
            ComparisonRecord(against="head", mean=1.27, low=1.23, high=1.31, method="bootstrap", num_examples=180),
            ComparisonRecord(against="shuffled", mean=0.04, low=-0.02, high=0.10, method="bootstrap", num_examples=180),
        ),
        "scores": (
            ModelScores(model="promoted", metrics={"loss": 1.83, "exact_match": 0.412}, retain_loss=4.12, forgetting=0.04),
            ModelScores(model="none", metrics={"loss": 3.92, "exact_match": 0.0}, retain_loss=4.081, forgetting=0.0),
            ModelScores(model="head", metrics={"loss": 3.10, "exact_match": 0.02}, retain_loss=4.09, forgetting=0.01),
        ),
        "prompts": (
            PromptComparison(
                prompt="Anna has 3 red cups and 4 blue cups.\nHow many cups?",
                expected="7",
                base_answer="The house was by the river, and the",
                tuned_answer="7",
            ),
            PromptComparison(prompt="Which <b>room</b> & where?", base_answer="the\n\nthe the", tuned_answer="the kitchen"),
        ),
        "bundle": "runs/quickstart/bundle",
        "verification": VerificationFigures(
            passed=True,
            kl_bundle=3.1e-5,
            kl_base=1.42,
            limit=0.0284,
            num_prompts=32,
            num_tokens=900,
            seconds=8.4,
            merged_into="original",
        ),
        "refit": RefitRecord(ran=False, reason="the winner had the full budget already"),
        "plan_against_measured": (
            PlanAgainstMeasured(name="memory of a rank", planned=310 * MIB, measured=342 * MIB, unit="bytes"),
            PlanAgainstMeasured(name="a trial of the full budget", planned=7.0, measured=6.1, unit="seconds"),
            PlanAgainstMeasured(name="training speed", planned=30000, measured=34211, unit="tokens/s"),
        ),
        "serve_commands": ("transformers serve runs/quickstart/bundle", "vllm serve runs/quickstart/bundle"),
        "report": "runs/quickstart/report.html",
        "versions": {
            "torch": "2.13.0",
            "ray": "2.60.0",
            "deepspeed": "0.19.8",
            "transformers": "5.23.0",
            "orchestrator": "0.1.0",
        },
    }
    return TransferReport(**(values | changes))


def make_steps(trial: TrialRecord) -> list[StepReport]:
    draw = random.Random(trial.number)
    last = trial.last
    steps = []
    for step in range(1, (last.step if last else 3) + 1):
        loss = (last.metric if last and last.metric else 3.9) * (1 + 0.6 * math.exp(-step / 12)) + draw.gauss(0, 0.08)
        steps.append(
            StepReport(
                step=step,
                epoch=0,
                tokens=step * TOKENS_PER_STEP,
                supervised_tokens=1200,
                loss=loss,
                loss_hex=loss.hex(),
                learning_rate=trial.learning_rate,
                grad_norm=1.0,
                tokens_per_s=34000.0,
                memory_bytes=240 * MIB,
            )
        )
    return steps


def write_trial(folder, trial, *, results, end=None):
    """A trial's folder as the runtime writes it."""
    trial_folder = folder / "trials" / trial.trial_id
    trial_folder.mkdir(parents=True)
    (trial_folder / "trial.json").write_text(json.dumps({"trial": trial.model_dump(mode="json"), "option": 3}))
    for result in results:
        (trial_folder / f"result-{result.rung}.json").write_text(result.model_dump_json())
    if end is not None:
        (trial_folder / "end.json").write_text(json.dumps(end))


def trial_spec(number=0, control=None):
    return TrialSpec(
        trial_id=f"t{number:03d}" if control is None else control,
        number=number,
        control=control,
        layers="last:4",
        tune="lora",
        lora_rank=16,
        learning_rate=1e-3,
        total_steps=54,
        total_tokens=221184,
        seed=0,
    )


def rung_result(trial_id, rung, loss, retain, **changes):
    values = {
        "trial_id": trial_id,
        "rung": rung,
        "step": (6, 18, 54)[rung],
        "tokens": 1000,
        "state": "done",
        "eval_loss": loss,
        "metrics": {"loss": loss},
        "retain_loss": retain,
        "train_seconds": 2.0,
        "eval_seconds": 0.5,
        "engine": EngineRecord(
            executor="deepspeed",
            engine_class="DeepSpeedEngine",
            zero_stage=2,
            ranks=2,
            partitioned_bytes=1000,
            trainable_parameters=4242,
            peak_memory_bytes=2000,
            live_engines=1,
            base_loads=1,
            ordinal=rung,
        ),
    }
    return RungResult(**(values | changes))


@dataclass
class FakeRun:
    """What is to be written; None leaves the file out."""

    plan: RunPlan | None = field(default_factory=make_plan)
    sweep: SweepResult | None = field(default_factory=make_sweep)
    transfer: TransferReport | None = field(default_factory=make_transfer)
    steps: bool = True
    events: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"time": 1_790_000_001.0, "kind": "micro_batch_halved", "message": "8 rows did not fit; 4 rows", "trial_id": "t003"},
            {"time": 1_790_000_030.0, "kind": "gang_replaced", "message": "gang 1 lost a rank", "gang": 1},
        ]
    )
    summary: dict[str, Any] | None = field(
        default_factory=lambda: {
            "train_rows": 1200,
            "eval_rows": 150,
            "dropped": [{"row": 17, "reason": "longer than 512 tokens"}, {"row": 40, "reason": "stands in test too"}],
            "tokenizer_sha256": "9f86d081884c7d65",
        }
    )
    spec_text: str = "name: quickstart\nsearch:\n  metric: loss\n  max_forgetting: 0.1\n"

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in (("plan.json", self.plan), ("sweep.json", self.sweep), ("transfer.json", self.transfer)):
            if value is not None:
                (folder / name).write_text(value.model_dump_json())
        (folder / "spec.yaml").write_text(self.spec_text)
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in self.events))
        if self.summary is not None:
            (folder / "data").mkdir(exist_ok=True)
            (folder / "data" / "summary.json").write_text(json.dumps(self.summary))
        for trial in self.sweep.trials if self.sweep and self.steps else ():
            if trial.control is None:
                trial_folder = folder / "trials" / trial.trial_id
                trial_folder.mkdir(parents=True, exist_ok=True)
                lines = "".join(step.model_dump_json() + "\n" for step in make_steps(trial))
                (trial_folder / "steps.jsonl").write_text(lines)
        return folder


@pytest.fixture
def fake_run(tmp_path: Path) -> Callable[..., Path]:
    """`fake_run(transfer=None)` writes a run directory with the given parts and returns its folder."""
    return lambda **parts: FakeRun(**parts).write(tmp_path / "quickstart")


@pytest.fixture
def make() -> SimpleNamespace:
    """The makers of this file: `make.sweep(winner_id=None)`, `make.trial(...)`, ..."""
    return SimpleNamespace(
        control=make_control,
        option=make_option,
        plan=make_plan,
        steps=make_steps,
        sweep=make_sweep,
        transfer=make_transfer,
        trial=make_trial,
    )
