"""A sweep of ours beside the same sweep as the libraries' documents show it: step, pause between trials, whole.

    scripts/bench sweep [step] [compile] [fused] [memory] [idle] [whole] --base FOLDER --data gsm8k/train.jsonl [--rows 1000]
                        [--trials 16] [--epochs 2] [--no-early-stopping] [--stock FILE] [--run FOLDER] [--work FOLDER] [--json]

`step`: a training step of LoRA on the last quarter of the blocks; the bound is the ratio of operations, counted on both
sides. `compile`: a full micro-batch of ours as it is and with compiled blocks, and what compiling takes. `fused`: eight such
trials in one batch; `memory`: what they take. `idle`: how long a place stands without training between two trials. `whole`:
the sweep, from its start to the end of its last trial. Without names all. `--stock` reads what `scripts/bench stock_sweep`
wrote instead of running it, `--run` a finished run of ours; both must be of the same settings. `--work` keeps what both sides
leave. There are as many cores as trials at a time, and every trial has one thread. A whole comparison of sixteen trials on two
cores wants a quiet machine: its speed is printed before and after each side.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from sweep_fused import NUM_TRIALS, measure_fused, measure_memory
from sweep_points import Sets, Task, add_task_options, make_sets, pin
from sweep_sides import Side, gemm_gflops, read_ours, read_stock, run_ours, run_stock
from sweep_steps import OURS, STOPPED, WAYS, measure_compiled, measure_steps, sweep_flops
from transformers.utils import logging

Made = TypeVar("Made")
SECTIONS = ("step", "compile", "fused", "memory", "idle", "whole")
FUSED_TIMES, MEMORY_TIMES = 1.3, 1.2
SHARE_OF_BOUND = 0.8
IDLE_TIMES, IDLE_SECONDS = 50.0, 0.1
WHOLE_TIMES, WINNER_TIMES = 3.0, 5.0


@dataclass(frozen=True)
class Measured:
    """A line of the result."""

    name: str
    value: float | None
    """None: it was not reached."""
    unit: str = "x"
    goal: float | None = None
    bound: float | None = None
    """Theoretical limit."""
    at_most: bool = False
    """True if lower is better."""
    note: str = ""

    @property
    def reached(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value is not None and (self.value <= self.goal if self.at_most else self.value >= self.goal)


@dataclass
class Sweeps:
    """Both sides' whole sweeps, run or read once, when a section first asks for them."""

    task: Task
    sets: Sets
    folder: Path
    run: Path | None
    stock: Path | None
    machine_gflops: dict[str, float] = field(default_factory=dict)
    _ours: Side | None = None
    _stock: Side | None = None

    def ours(self) -> Side:
        if self._ours is None:
            run = self.run or self._timed("ours", lambda: run_ours(self.task, self.folder))
            self._ours = read_ours(run)
        return self._ours

    def theirs(self) -> Side:
        if self._stock is None:
            file = self.stock or self.folder / "stock.json"
            if self.stock is None:
                self._timed("stock", lambda: run_stock(self.task, file))
            self._stock = read_stock(file, self.task, self.sets)
        return self._stock

    def _timed(self, name: str, make: Callable[[], Made]) -> Made:
        self.machine_gflops[f"before {name}"] = gemm_gflops()
        made = make()
        self.machine_gflops[f"after {name}"] = gemm_gflops()
        return made


def step_section(sweeps: Sweeps, num_steps: int) -> list[Measured]:
    found = measure_steps(sweeps.task, sweeps.sets, num_steps)
    seconds, flops = found["step_seconds"], found["step_flops"]
    what = f"{found['layers']}, {found['tokens']} tokens, median of {found['times']}"
    lines = [Measured(f"step of {way}", seconds[way], "s", note=f"{flops[way] / 1e9:.1f} GFLOP; {what}") for way in WAYS]
    for way in WAYS[1:]:
        bound = flops[way] / flops[OURS]
        goal = SHARE_OF_BOUND * bound
        lines.append(Measured(f"ours against {way}", seconds[way] / seconds[OURS], goal=goal, bound=bound))
    return lines


def compile_section(sweeps: Sweeps) -> list[Measured]:
    lines = []
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(sweeps.folder / "inductor")  # nothing is kept from before
    for layers, times in measure_compiled(sweeps.task, sweeps.sets).items():
        if times.failed:
            lines.append(Measured(f"{layers}: compiled", None, note=times.failed))
            continue
        lines += [
            Measured(f"{layers}: a full micro-batch", times.eager_seconds, "s"),
            Measured(f"{layers}: the same, compiled", times.compiled_seconds, "s"),
            Measured(f"{layers}: compiled against not", times.eager_seconds / times.compiled_seconds),
            Measured(f"{layers}: compiling", times.compile_seconds, "s", note="but for what the lines above have compiled"),
        ]
    return lines


def idle_section(sweeps: Sweeps) -> list[Measured]:
    ours, theirs = sweeps.ours().between_trials, sweeps.theirs().between_trials
    if not ours:
        return [
            Measured("a warm gang between two trials", None, "s", IDLE_SECONDS, at_most=True, note="no two trials on one gang")
        ]
    pause, start = statistics.median(ours), statistics.median(theirs)
    return [
        Measured("a warm gang between two trials", pause, "s", IDLE_SECONDS, at_most=True, note=f"median of {len(ours)}"),
        Measured("stock: from a trial's creation to its first step", start, "s", note=f"median of {len(theirs)}"),
        Measured("ours against stock", start / pause, goal=IDLE_TIMES),
    ]


def fused_section(sweeps: Sweeps, num_steps: int) -> list[Measured]:
    lines = []
    for number, size in enumerate(measure_fused(sweeps.task, sweeps.sets, num_steps)):
        seconds = size["trial_seconds"]
        best = min(seconds, key=lambda width: seconds[width])
        told = ", ".join(f"{width}: {1e3 * each:.1f} ms" for width, each in seconds.items())
        name = f"{NUM_TRIALS} trials, {size['rows']} x {size['row_tokens']} tokens ({size['tokens']}), {best} in a batch"
        lines.append(
            Measured(name, seconds[1] / seconds[best], goal=1.0 if number else FUSED_TIMES, note=f"a trial by width {told}")
        )
    return lines


def memory_section(sweeps: Sweeps) -> list[Measured]:
    found = measure_memory(sweeps.task, sweeps.sets)
    allowed = found["alone"] + NUM_TRIALS * found["held_by_a_trial"]
    note = f"{found['fused'] / 2**20:.0f} MiB against {allowed / 2**20:.0f} MiB"
    return [Measured(f"{NUM_TRIALS} fused trials", found["fused"] / allowed, goal=MEMORY_TIMES, at_most=True, note=note)]


def whole_section(sweeps: Sweeps) -> list[Measured]:
    ours, theirs = sweeps.ours(), sweeps.theirs()
    flops_ours = sweep_flops(sweeps.task, sweeps.sets, ours.trained)[OURS]
    flops_theirs = sweep_flops(sweeps.task, sweeps.sets, theirs.trained)[STOPPED]
    bound, times = flops_theirs / flops_ours, theirs.search_seconds / ours.search_seconds
    their_time, our_time = theirs.seconds_to(theirs.best_loss), ours.seconds_to(theirs.best_loss)
    lines = [
        Measured("our sweep", ours.search_seconds, "s", note=f"{len(ours.losses)} rungs; best loss {ours.best_loss:.3f}"),
        Measured("stock sweep", theirs.search_seconds, "s", note=f"{len(theirs.losses)} rungs; best loss {theirs.best_loss:.3f}"),
        Measured("ours against stock", times, goal=WHOLE_TIMES, note="to the end of the last trial; our controls included"),
        Measured("stock: to its winner's loss", their_time, "s"),
        Measured("ours: to a loss as good", our_time, "s", note=f"loss {theirs.best_loss:.3f} or less"),
        Measured("the same, ours against stock", their_time / our_time if their_time and our_time else None, goal=WINNER_TIMES),
    ]
    if not sweeps.task.early_stopping:
        share = SHARE_OF_BOUND * bound
        lines.append(Measured("all trials to their end, against the operations", times, goal=share, bound=bound))
    total = ours.details["seconds_to_bundle"]
    lines += [Measured("ours, with bundle, verification and verdict", total, "s")] if total else []
    lines += [Measured(f"our gangs: {name}", seconds, "s") for name, seconds in ours.details["gang_seconds"].items()]
    return lines


def show(section: str, lines: list[Measured]) -> None:
    print(f"\n{section:<52}{'value':>10}  {'goal':>10}  {'bound':>8}")
    for line in lines:
        value = "never" if line.value is None else f"{line.value:.3f} {line.unit}"
        goal = "" if line.goal is None else f"{'<=' if line.at_most else '>='} {line.goal:.3g}"
        bound = "" if line.bound is None else f"{line.bound:.2f}"
        verdict = {None: "", True: "reached", False: "missed"}[line.reached]
        print(f"  {line.name:<50}{value:>10}  {goal:>10}  {bound:>8}  {verdict:<8} {line.note}".rstrip())


def main() -> None:
    options = _options()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        sys.exit(f"no section {', '.join(sorted(unknown))}; there are: {', '.join(SECTIONS)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    task = Task.of(options)
    pin(task)
    with ExitStack() as stack:
        folder = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sweep-")))
        folder.mkdir(parents=True, exist_ok=True)
        sweeps = Sweeps(task, make_sets(task, folder), folder, options.run, options.stock)
        makers: dict[str, Callable[[], list[Measured]]] = {
            "step": lambda: step_section(sweeps, options.steps),
            "compile": lambda: compile_section(sweeps),
            "fused": lambda: fused_section(sweeps, options.steps),
            "memory": lambda: memory_section(sweeps),
            "idle": lambda: idle_section(sweeps),
            "whole": lambda: whole_section(sweeps),
        }
        found = {section: makers[section]() for section in SECTIONS if section in (options.sections or SECTIONS)}
    if options.json:
        lines = {section: [asdict(line) | {"reached": line.reached} for line in part] for section, part in found.items()}
        print(json.dumps({"settings": task.settings(), "machine_gflops": sweeps.machine_gflops, "sections": lines}, indent=1))
        return
    for section, part in found.items():
        show(section, part)
    for when, gflops in sweeps.machine_gflops.items():
        print(f"machine {when}: {gflops:.1f} GFLOP/s on one thread")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    add_task_options(parser)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each way and round (two rounds)")
    parser.add_argument("--stock", type=Path, help="stock_sweep's JSON, instead of running it")
    parser.add_argument("--run", type=Path, help="a finished run of ours, instead of running it")
    parser.add_argument("--work", type=Path, help="an empty folder for what both sides leave; a passing one without it")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
