"""Measure the cost of scoring the blocks, relative to a whole trial of every choice of a sweep.

    scripts/bench probe [SPEC] [--steps 3] [--json]

The base and the data are the spec's, on one core; without one, those of the quickstart. The probe runs as the plan has it;
of each choice a few steps are trained and taken times the length of a trial. Processor seconds of one pinned thread, which
are wall seconds on an idle machine and are not disturbed on a busy one. A first probe warms up.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator.anatomy import ModelAnatomy, read_anatomy, resolve_base
from orchestrator.data import data_size, prepare_data
from orchestrator.plan import make_plan, make_trial, train_rung, with_scores, work_context
from orchestrator.plan.values import ClusterDescription, NodeDescription, RunPlan
from orchestrator.spec import LoadedSpec, load_spec
from orchestrator.train import TrainHost
from orchestrator.units import GIB
from orchestrator.work.assignment import ScoreBlocks, TrainRung, Work
from orchestrator.work.execution import DataPaths, TrainSettings

QUICKSTART = Path(__file__).resolve().parents[2] / "jobs" / "specs" / "quickstart.yaml"
ONE_CORE = ClusterDescription(nodes=(NodeDescription(num_cpus=1, memory_bytes=8 * GIB),))


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench probe", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("spec", nargs="?", type=Path, default=QUICKSTART)
    parser.add_argument("--steps", type=int, default=3, help="steps of each choice")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    loaded = load_spec(options.spec)
    with tempfile.TemporaryDirectory() as name:
        result = measure(loaded, Path(name), options.steps)
    print(json.dumps(result) if options.json else _text(result))


def measure(loaded: LoadedSpec, folder: Path, num_steps: int) -> dict[str, Any]:
    """Processor seconds of the probe and of a trial of every choice, `num_steps` of it measured."""
    spec = loaded.spec
    anatomy = read_anatomy(resolve_base(spec.base.model, loaded.folder), need_weights=True)
    size = data_size(prepare_data(loaded, Path(anatomy.folder), folder), spec, folder)
    plan = make_plan(loaded, anatomy, size, ONE_CORE, job="sweep", spec_sha256="")
    assert plan.probe is not None, "the spec has one choice of blocks, or says search.probe: false"
    host = TrainHost.create(plan.base, anatomy, plan.execution, 0, 1, None)
    work = _Work(loaded, plan, anatomy, folder)
    scoring = ScoreBlocks(context=work.context, execution=plan.execution, seed=spec.train.seed, plan=plan.probe)
    _cpu_seconds(host, scoring)  # warms up
    seconds, measured = _cpu_seconds(host, scoring)
    assert not measured.found.failed, measured.found.failed
    plan = with_scores(plan, spec, anatomy, measured.found)
    trials: dict[str, float] = {}
    for number, option in enumerate(plan.search.options):
        spec_of = make_trial(plan, option, option.learning_rate_low, number, spec.train.seed)
        took, result = _cpu_seconds(host, work.rung(spec_of, option.selection, num_steps))
        assert result.state == "done", result.reason
        trials[f"{option.layers} {option.tune}"] = took / result.tokens * plan.total_tokens
    host.close()
    planned = plan.probe.share_of_trial if plan.probe else 0.0
    shares = {name: seconds / took for name, took in trials.items()}
    return {"probe_s": seconds, "planned_share": planned, "trial_s": trials, "share": shares, "largest": max(shares.values())}


class _Work:
    """Assignments over the prepared data."""

    def __init__(self, loaded: LoadedSpec, plan: RunPlan, anatomy: ModelAnatomy, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        train = loaded.spec.train
        settings = TrainSettings(
            warmup=train.warmup,
            schedule=train.schedule,
            weight_decay=train.weight_decay,
            grad_clip=train.grad_clip,
            tokens_per_step=train.tokens_per_step,
        )

        data = DataPaths(train=str(folder / "train.npz"), eval=str(folder / "eval.npz"))
        self.context = work_context(plan, settings=settings, data=data, metric="loss")

    def rung(self, trial: Any, selection: Any, stop_step: int) -> TrainRung:
        return train_rung(
            self._plan,
            self.context,
            trial,
            selection,
            folder=str(self._folder / trial.trial_id),
            stop_step=stop_step,
            keep_optimizer=False,
            evaluate=False,
        )


def _cpu_seconds(host: TrainHost, assignment: Work) -> tuple[float, Any]:
    started = time.process_time()
    result = host.run(assignment)
    took = time.process_time() - started
    return took, result


def _text(result: dict[str, Any]) -> str:
    lines = [f"probe {result['probe_s']:.2f} s, planned as {result['planned_share']:.1%} of the cheapest trial's operations"]
    lines += [
        f"{name:<20}{took:>9.1f} s a trial, the probe {result['share'][name]:.2%}" for name, took in result["trial_s"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
