"""Measure the cost of remedies against forgetting per training step, side by side in one process.

    scripts/bench remedies --base FOLDER --data gsm8k/train.jsonl [--rows 200] [--steps 7] [--json]

Each remedy beside the same trial without it, step after step in turn, through the whole model: anchors may cost a tenth of a
step, and replay its tokens and nothing more (so its step is compared token for token), in processor time. The Fisher information
is computed once for a selection, in the time that building the engine takes longer.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sweep_points import LORA_RANK, SEED, Sets, Task, make_sets
from sweep_steps import ROW_TOKENS, TOKENS_PER_STEP, Batch, load_our_base, num_tokens, our_step
from transformers.utils import logging

from orchestrator.anatomy import select
from orchestrator.data import TokenizedSet
from orchestrator.spec.models import Tune
from orchestrator.train import open_branch
from orchestrator.train.batches import RowPlan, StepPlan, step_inputs
from orchestrator.train.context import HostContext
from orchestrator.train.integrity import base_fingerprint
from orchestrator.train.model.base import LoadedBase
from orchestrator.train.model.objective import objective_of
from orchestrator.train.ranks import ALONE
from orchestrator.train.training_sets import TrainingSets
from orchestrator.train.trial_engine import build_engine
from orchestrator.work.assignment import TrainRung, WorkContext
from orchestrator.work.execution import DataPaths, ExecutionPlan, TrainSettings
from orchestrator.work.remedies import NOTHING, AnchorPlan, Remedies
from orchestrator.work.trial import TrialSpec

ANCHOR_TIMES, REPLAY_TIMES = 1.10, 1.05
"""The second allows for rows that pack a little worse or better."""


@dataclass(frozen=True)
class Case:
    """A remedy on a choice of layers."""

    layers: str
    tune: Tune
    remedies: Remedies
    at_most: float


CASES = (
    Case("last:2", "full", Remedies(anchor=AnchorPlan(kind="l2sp", strength=30)), ANCHOR_TIMES),
    Case("last:2", "full", Remedies(anchor=AnchorPlan(kind="ewc", strength=30)), ANCHOR_TIMES),
    Case("last:2", "lora", Remedies(anchor=AnchorPlan(kind="product", strength=1)), ANCHOR_TIMES),
    Case("all", "lora", Remedies(anchor=AnchorPlan(kind="product", strength=1)), ANCHOR_TIMES),
    Case("all", "full", Remedies(anchor=AnchorPlan(kind="ewc", strength=30), layer_decay=0.8), ANCHOR_TIMES),
    Case("last:2", "lora", Remedies(replay=0.2), REPLAY_TIMES),
    Case("all", "lora", Remedies(replay=0.2), REPLAY_TIMES),
)


@dataclass
class Bench:
    """The base and the sets of all cases."""

    base: LoadedBase
    sets: Sets
    train: TokenizedSet
    replayed: TokenizedSet
    num_steps: int

    def measure(self, case: Case) -> dict[str, Any]:
        """Seconds of a step with and without, one after the other in turn; per token where tokens are replayed."""
        seconds: dict[bool, list[float]] = {True: [], False: []}
        batches = {with_it: self._batches(case.remedies if with_it else NOTHING) for with_it in (True, False)}
        built: dict[bool, float] = {}
        for _ in range(2):
            for with_it in (False, True):
                seconds[with_it] += self._steps(case, case.remedies if with_it else NOTHING, batches[with_it], built, with_it)
        tokens = {with_it: num_tokens(batches[with_it]) for with_it in batches}
        medians = {with_it: statistics.median(seconds[with_it]) / tokens[with_it] for with_it in seconds}
        return {
            "case": f"{case.layers} {case.tune}: {case.remedies}",
            "times": medians[True] / medians[False],
            "at_most": case.at_most,
            "step_seconds": {str(with_it): statistics.median(seconds[with_it]) for with_it in seconds},
            "tokens": {str(with_it): tokens[with_it] for with_it in tokens},
            "build_seconds": {str(with_it): built[with_it] for with_it in built},
        }

    def _batches(self, remedies: Remedies) -> list[Batch]:
        steps = StepPlan.of(self.train, self.replayed, TOKENS_PER_STEP, SEED, remedies.replay)
        rows = RowPlan(ROW_TOKENS, TOKENS_PER_STEP // ROW_TOKENS, pack=True)
        return next(step_inputs(steps, rows, 0, 1)).micro_batches  # type: ignore[return-value]

    def _steps(
        self, case: Case, remedies: Remedies, batches: Sequence[Batch], built: dict[bool, float], with_it: bool
    ) -> list[float]:
        assignment = self._assignment(case, remedies)
        selection = assignment.selection
        found: list[float] = []
        with open_branch(self.base, selection, lora_alpha=assignment.trial.lora_alpha, seed=SEED) as branch:
            objective = objective_of(self.base, branch.head(), selection.cut)
            started = time.process_time()
            context = HostContext.create(self.base, base_fingerprint(self.base.model), assignment.execution, ALONE)
            sets = TrainingSets(assignment, TokenizedSet.load, context.trunk)
            engine = build_engine(context, assignment.execution, sets, objective, branch)
            built.setdefault(with_it, time.process_time() - started)
            for number in range(1 + self.num_steps):
                started = time.process_time()
                our_step(engine, batches)
                if number:
                    found.append(time.process_time() - started)
            engine.close()
        return found

    def _assignment(self, case: Case, remedies: Remedies) -> TrainRung:
        lora_rank = LORA_RANK if case.tune == "lora" else None
        return TrainRung(
            context=WorkContext(
                settings=TrainSettings(
                    warmup=0, schedule="constant", weight_decay=0, grad_clip=1, tokens_per_step=TOKENS_PER_STEP
                ),
                data=DataPaths(train=str(self.sets.train), eval=str(self.sets.eval), replay=str(self.sets.eval)),
                metric="loss",
            ),
            trial=TrialSpec(
                trial_id="bench",
                number=0,
                layers=case.layers,
                tune=case.tune,
                learning_rate=1e-4,
                lora_rank=lora_rank,
                total_steps=100,
                total_tokens=100 * TOKENS_PER_STEP,
                seed=SEED,
                remedies=remedies,
            ),
            selection=select(self.base.anatomy, case.layers, case.tune, lora_rank, task="completion"),
            execution=ExecutionPlan(
                device="cpu", ranks=1, threads_per_rank=1, executor="torch", row_tokens=ROW_TOKENS, micro_batch_rows=1
            ),
            folder=str(self.sets.train.parent / "trial"),
            rung=0,
            stop_step=1,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with columns question and answer (gsm8k's train file)")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each way and round (two rounds)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remedies-")))
        sets = make_sets(Task(options.base.resolve(), options.data.resolve(), rows=options.rows), folder)
        train, other = TokenizedSet.load(sets.train), TokenizedSet.load(sets.eval)
        base = load_our_base(options.base)
        bench = Bench(base, sets, train, other, options.steps)
        found = [bench.measure(case) for case in CASES]
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{'remedy':<44}{'times':>8}{'at most':>9}  step with and without, to build the engine")
    for line in found:
        step, built = line["step_seconds"], line["build_seconds"]
        said = f"{step['True']:.3f} s, {step['False']:.3f} s; {built['True']:.2f} s, {built['False']:.2f} s"
        verdict = "reached" if line["times"] <= line["at_most"] else "missed"
        print(f"{line['case']:<44}{line['times']:>7.3f}x{line['at_most']:>8.2f}x  {said}  {verdict}")


if __name__ == "__main__":
    main()
