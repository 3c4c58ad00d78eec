"""The sweep as the libraries' own documents show it: Ray Tune, a `TorchTrainer` a trial, Hugging Face's `Trainer`, PEFT.

    scripts/bench stock_sweep --base FOLDER --data gsm8k/train.jsonl [--rows 1000] [--trials 16] [--epochs 2]
                              [--rungs plan|half-epochs] [--adapters bfloat16|float32] [--no-early-stopping] [--out stock.json]

It is given all that is known to help it: batches of like length, bf16 weights and adapters, a stable name for every trial
(without one a killed trial starts again from nothing), polling ten times as often as by default, and logical CPUs to spare,
since every trial that ASHA stops leaves its placement group behind (ray#54305) and the sweep would stand still for want of
places.
Points, token ids, labels, steps and rungs are those of our own side (sweep_points.py).
"""

from __future__ import annotations

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}

import argparse
import json
import logging
import math
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import train, tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from stock_trial import train_one
from sweep_points import SEED, Point, Sets, Task, add_task_options, make_sets, pin

LOGICAL_CPUS = 64
ADJUSTED = "eval_token_loss"


def drive_one(config: dict[str, Any]) -> None:
    """A Tune trial: one worker group of Ray Train, as Ray's document on tuning with Train has it."""
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    trainer = TorchTrainer(
        train_one,
        train_loop_config=config,
        scaling_config=train.ScalingConfig(num_workers=1, use_gpu=False, resources_per_worker={"CPU": 1}),
        run_config=train.RunConfig(
            name=f"trial-{tune.get_context().get_trial_id()}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
            checkpoint_config=train.CheckpointConfig(num_to_keep=1),
        ),
    )
    trainer.fit()


class Watch(tune.Callback):
    """When trials end, by the driver's clock: then their place is free for the next."""

    def __init__(self) -> None:
        self.ends: dict[str, float] = {}
        self.reports: dict[str, list[dict[str, Any]]] = {}

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        self.reports.setdefault(trial.trial_id, []).append(result | {"heard_at": time.time()})

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.ends[trial.trial_id] = time.time()

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.ends[trial.trial_id] = time.time()


def run_stock_sweep(task: Task, sets: Sets, folder: Path, adapters: str) -> dict[str, Any]:
    """The whole sweep; what it took and what it found."""
    started = time.time()
    ray.init(num_cpus=LOGICAL_CPUS, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    watch = Watch()
    config = {"sets": asdict(sets), "base": str(task.base), "storage": str(folder / "train"), "seed": SEED, "adapters": adapters}
    last_pace = sets.reduction_factor ** (len(sets.rungs) - 1)
    stops = task.early_stopping and len(sets.rungs) > 1
    try:
        grid = tune.Tuner(
            drive_one,
            param_space={**config, "point": tune.grid_search([list(point) for point in task.points])},
            tune_config=tune.TuneConfig(
                metric=ADJUSTED,
                mode="min",
                max_concurrent_trials=task.concurrent,
                scheduler=AsyncHyperBandScheduler(
                    time_attr="pace", grace_period=1, max_t=last_pace, reduction_factor=sets.reduction_factor
                )
                if stops
                else FIFOScheduler(),
            ),
            run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0, callbacks=[watch]),
        ).fit()
        wall_seconds = time.time() - started
    finally:
        ray.shutdown()
    trials = _trials(task, watch, started)
    scored = [trial for trial in trials if trial["rungs"] and math.isfinite(trial["rungs"][-1]["eval_loss"])]
    best = min(scored, key=lambda trial: trial["rungs"][-1]["eval_loss"], default=None)
    return {
        "settings": task.settings(),
        "adapters": adapters,
        "rung_steps": list(sets.rungs),
        "started_at": started,
        "wall_seconds": wall_seconds,
        "errors": [str(error).splitlines()[-1] for error in grid.errors],
        "best": best,
        "trials": trials,
    }


def _trials(task: Task, watch: Watch, started: float) -> list[dict[str, Any]]:
    """Each trial, in the order of their first steps. A trial is created when a place is free: with the sweep, or where
    another one ended."""
    firsts = sorted(watch.reports.items(), key=lambda pair: pair[1][0]["first_step_at"])
    free = sorted(watch.ends.values())
    trials = []
    for number, (trial_id, reports) in enumerate(firsts):
        created = started if number < task.concurrent else free[number - task.concurrent]
        point = Point(*reports[0]["config"]["point"])
        begun = [created, *(report["finished_at"] for report in reports)]
        trials.append(
            {
                "layers": point.layers,
                "learning_rate": point.learning_rate,
                "created_at": created,
                "seconds_to_first_step": reports[0]["first_step_at"] - created,
                "ended_at": watch.ends.get(trial_id),
                "rungs": [
                    {
                        "step": int(report["step"]),
                        "eval_loss": report[ADJUSTED],
                        "seconds": report["finished_at"] - max(before, report["first_step_at"]),
                        "finished_at": report["heard_at"],
                    }
                    for before, report in zip(begun, reports, strict=False)
                ],
            }
        )
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_options(parser)
    parser.add_argument("--rungs", choices=("plan", "half-epochs"), default="plan", help="where trials are compared")
    parser.add_argument("--adapters", choices=("bfloat16", "float32"), default="bfloat16", help="bfloat16 is the quicker one")
    parser.add_argument("--out", type=Path, help="the JSON file; printed without it")
    options = parser.parse_args()
    task = Task.of(options)
    pin(task)
    with tempfile.TemporaryDirectory(prefix="stock-sweep-") as name:
        sets = make_sets(task, Path(name))
        if options.rungs == "half-epochs":
            sets = _with_half_epochs(sets)
        found = run_stock_sweep(task, sets, Path(name), options.adapters)
    written = json.dumps(found, indent=1)
    if options.out is None:
        print(written)
        return
    options.out.write_text(written + "\n", encoding="utf-8")
    rungs = sum(len(trial["rungs"]) for trial in found["trials"])
    print(f"{found['wall_seconds']:.1f} s for {len(found['trials'])} trials and {rungs} rungs: {options.out}", file=sys.stderr)


def _with_half_epochs(sets: Sets) -> Sets:
    """A rung at each half of an epoch. ASHA's rungs are then every one of them, in powers of its reduction factor."""
    last, half = sets.rungs[-1], max(1, round(sets.steps_per_epoch / 2))
    steps = tuple(step for step in range(half, last, half) if last - step >= half / 2)
    return Sets(sets.train, sets.eval, sets.num_train, sets.steps_per_epoch, (*steps, last))


if __name__ == "__main__":
    main()
