"""Measure the time to the first step of a sweep's first trial, and the idle time of gangs between trials.

Runs a sweep of six trials over two rungs on the sample, or reads a finished run: scripts/bench gangs [RUN]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from orchestrator.report.timeline import side_by_side
from orchestrator.store import read_json
from orchestrator.work.results import RungResult

SPEC = """
name: gangs
base: {{model: sample}}
task: completion
data:
  train: {data}/train.jsonl
  eval: {data}/eval.jsonl
  test: {data}/test.jsonl
  max_tokens: 64
  eval_rows: 30
  test_rows: 30
train: {{epochs: 1, tokens_per_step: 2048}}
search: {{layers: ["last:1", "last:2"], tune: [lora], lora_rank: [8], trials: 6}}
output: {output}
"""


def run_sample_sweep(folder: Path) -> Path:
    from orchestrator.report import open_view
    from orchestrator.runtime import run_sweep
    from orchestrator.samples import SAMPLE_DATA
    from orchestrator.spec import load_spec

    spec = folder / "spec.yaml"
    spec.write_text(SPEC.format(data=SAMPLE_DATA, output=folder), encoding="utf-8")
    return run_sweep(load_spec(spec), view=open_view(stream=sys.stderr)).run_folder


def gaps_between_assignments(results: list[RungResult]) -> list[float]:
    """Seconds from the end of an assignment to the start of the next on the same gang."""
    gaps: list[float] = []
    for gang in {result.gang for result in results}:
        served = sorted((result for result in results if result.gang == gang), key=lambda result: result.started_at)
        gaps += [after.started_at - before.finished_at for before, after in pairwise(served)]
    return gaps


def pauses_between_trials(results: list[RungResult]) -> list[float]:
    """Seconds from the last evaluation of one trial to the first step of another on the same gang.

    The one is saved and the other opened in them. A result says how long opening and saving took together: half of that is
    taken for either. The untouched base, which is only evaluated, is left out.
    """
    pauses: list[float] = []
    for gang in {result.gang for result in results}:
        served = sorted((result for result in results if result.gang == gang), key=lambda result: result.started_at)
        pauses += [
            after.started_at - before.finished_at + (_kept_seconds(before) + _kept_seconds(after)) / 2
            for before, after in pairwise(served)
            if before.trial_id != after.trial_id and before.train_seconds and after.train_seconds
        ]
    return pauses


def _kept_seconds(result: RungResult) -> float:
    """Spent on opening and saving the trial."""
    return result.finished_at - result.started_at - result.train_seconds - result.eval_seconds


def read_results(run: Path) -> list[RungResult]:
    return side_by_side([RungResult.model_validate(read_json(file)) for file in run.glob("trials/t*/result-*.json")])


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(sys.argv[1]) if len(sys.argv) > 1 else run_sample_sweep(Path(scratch))
        submitted = read_json(run / "run.json")["submissions"][0]
        results = read_results(run)
    first = min(results, key=lambda result: result.started_at)
    first_step_s = first.started_at - submitted + first.train_seconds / max(1, first.step)
    gaps = gaps_between_assignments(results)
    print(f"time to the first step of the first trial   {first_step_s:8.2f} s")
    print(f"gang idle between two assignments, median   {statistics.median(gaps):8.3f} s   ({len(gaps)} gaps)")
    print(f"gang idle between two assignments, longest  {max(gaps):8.3f} s")
    pauses = pauses_between_trials(results)
    if pauses:
        print(f"from one trial's scores to another's steps  {statistics.median(pauses):8.3f} s   ({len(pauses)} pauses)")
    busy = sum(result.finished_at - result.started_at for result in results)
    print(f"share of a gang's time that was idle        {sum(gaps) / (sum(gaps) + busy):8.1%}")


if __name__ == "__main__":
    main()
