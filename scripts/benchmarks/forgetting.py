"""Measure the effect of remedies against forgetting: the same trial with and without them, seed by seed.

    scripts/bench forgetting --base FOLDER --data gsm8k/train.jsonl --retain FOLDER [--rows 320] [--seeds 3] [--layers last:4]
                             [--rate 6e-4] [--epochs 2] [--processes 2] [--out forgetting.json]

Every trial is scored four times on its way, on the target and on retention text that nobody learns from, so that trials can be
compared at equal target loss: where two paths have come down to the same loss, what each had forgotten by then. A remedy's
figures are those of its strength that forgets least among those whose target loss ends within 2% of the plain trial's, chosen on
the mean over the seeds. Intervals are Student's, over seeds.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import itertools
import json
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from orchestrator.anatomy import read_anatomy, select
from orchestrator.data import data_size, prepare_data
from orchestrator.plan import schedule as steps
from orchestrator.spec import LoadedSpec, load_spec
from orchestrator.transfer.seeds import student_t_quantile
from orchestrator.work.assignment import EvaluateBase, TrainRung, WorkContext
from orchestrator.work.execution import BaseLoad, DataPaths, ExecutionPlan, TrainSettings
from orchestrator.work.remedies import NOTHING, AnchorPlan, Remedies
from orchestrator.work.trial import TrialSpec

NUM_SCORES = 4
WITHIN = 1.02
PLAIN = "nothing"


def anchored(kind: Any, strength: float) -> Remedies:
    return Remedies(anchor=AnchorPlan(kind=kind, strength=strength))


FAMILIES: dict[str, list[Remedies]] = {
    PLAIN: [NOTHING],
    "replay": [Remedies(replay=share) for share in (0.1, 0.3)],
    "l2sp": [anchored("l2sp", strength) for strength in (100.0, 300.0)],
    "ewc": [anchored("ewc", strength) for strength in (100.0, 300.0)],
    "layer decay": [Remedies(layer_decay=factor) for factor in (0.8,)],
}


@dataclass(frozen=True)
class Settings:
    """Settings that all trials share."""

    base: str
    folder: str
    layers: str
    rate: float
    tokens_per_step: int
    total_steps: int
    total_tokens: int
    row_tokens: int
    micro_batch_rows: int


def write_spec(options: argparse.Namespace, folder: Path) -> LoadedSpec:
    rows = options.data.read_text(encoding="utf-8").splitlines()[: options.rows]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    spec = {
        "name": "forgetting",
        "base": {"model": str(options.base.resolve())},
        "task": "completion",
        "data": {
            "train": "train.jsonl",
            "eval": 0.1,
            "test": 0.02,
            "retain": str(options.retain.resolve()),
            "columns": {"prompt": "question", "completion": "answer"},
            "max_tokens": 512,
            "retain_tokens": 8192,
        },
        "train": {"epochs": options.epochs, "tokens_per_step": 4096, "replay": 0.1},
        "finetune": {"layers": options.layers, "tune": "full", "learning_rate": options.rate},
    }
    (folder / "spec.yaml").write_text(json.dumps(spec), encoding="utf-8")
    return load_spec(folder / "spec.yaml")


def run_trial(settings: Settings, remedies: Remedies, seed: int) -> dict[str, Any]:
    """One trial in a process of its own: (target loss, forgetting) at each score, the untouched base first."""
    from orchestrator.train import TrainHost

    folder = Path(settings.folder)
    anatomy = read_anatomy(Path(settings.base), need_weights=True)
    execution = ExecutionPlan(
        device="cpu",
        ranks=1,
        threads_per_rank=1,
        executor="torch",
        row_tokens=settings.row_tokens,
        micro_batch_rows=settings.micro_batch_rows,
    )
    load = BaseLoad(folder=settings.base, model_type=anatomy.model_type, quantize="none", task="completion")
    host = TrainHost.create(load, anatomy, execution, 0, 1, None)
    trial_folder = folder / "trials" / f"{remedies or PLAIN}-{seed}".replace(" ", "-").replace("·", "+")
    path: list[tuple[float, float]] = []
    base_loss = 0.0
    start: str | None = None
    for rung in range(NUM_SCORES + 1):
        stop = settings.total_steps * rung // NUM_SCORES
        shared: dict[str, Any] = {
            "context": WorkContext(
                settings=TrainSettings(
                    warmup=0.05, schedule="cosine", weight_decay=0.0, grad_clip=1.0, tokens_per_step=settings.tokens_per_step
                ),
                data=DataPaths(**{name: str(folder / "sets" / f"{name}.npz") for name in ("train", "eval", "retain", "replay")}),
                metric="loss",
            ),
            "trial": TrialSpec(
                trial_id=trial_folder.name,
                number=0,
                control="none" if rung == 0 else None,
                layers=settings.layers,
                tune="full",
                learning_rate=settings.rate,
                total_steps=settings.total_steps,
                total_tokens=remedies.total_tokens(settings.total_tokens),
                seed=seed,
                remedies=remedies,
            ),
            "selection": select(anatomy, "none" if rung == 0 else settings.layers, "full", None, task="completion"),
            "execution": execution,
            "folder": str(trial_folder),
            "rung": rung,
        }
        work = TrainRung(**shared, start=start, stop_step=stop) if rung else EvaluateBase(**shared)
        result = host.run_trial(work)
        assert result.state == "done", result.reason
        assert result.eval_loss is not None
        assert result.retain_loss is not None
        base_loss = result.retain_loss if rung == 0 else base_loss
        path.append((result.eval_loss, result.retain_loss - base_loss))
        start = result.checkpoint if rung else None
    host.close()
    return {"remedies": str(remedies) or PLAIN, "seed": seed, "path": path}


def at_loss(path: list[tuple[float, float]], loss: float) -> float | None:
    """Return the forgetting when the path first reached a target loss; None if it never did."""
    for (before, lost_before), (after, lost_after) in itertools.pairwise(path):
        if after <= loss < before:
            share = (before - loss) / (before - after)
            return lost_before + share * (lost_after - lost_before)
    return None


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of the 95% interval)"""
    if len(values) < 2:
        return values[0], float("nan")
    return statistics.mean(values), student_t_quantile(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def summarise(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each remedy: its end, and its forgetting over the plain trial's at the largest target loss of both ends."""
    paths = {(trial["remedies"], trial["seed"]): trial["path"] for trial in trials}
    seeds = sorted({trial["seed"] for trial in trials})
    lines: list[dict[str, Any]] = []
    for family, members in FAMILIES.items():
        for remedies in members:
            name = str(remedies) or PLAIN
            ends = [paths[name, seed][-1] for seed in seeds]
            plain = [paths[PLAIN, seed][-1] for seed in seeds]
            equal: list[float] = []
            for seed in seeds:
                own, other = paths[name, seed], paths[PLAIN, seed]
                level = max(own[-1][0], other[-1][0])
                pair = at_loss(own, level), at_loss(other, level)
                if pair[0] is not None and pair[1]:
                    equal.append(pair[0] / pair[1])
            lines.append(
                {
                    "family": family,
                    "remedies": name,
                    "target_loss": interval([loss for loss, _ in ends]),
                    "forgetting": interval([lost for _, lost in ends]),
                    "target_over_plain": interval([own[0] / other[0] for own, other in zip(ends, plain, strict=True)]),
                    "forgetting_over_plain": interval([own[1] / other[1] for own, other in zip(ends, plain, strict=True)]),
                    "forgetting_at_equal_loss": interval(equal) if equal else None,
                }
            )
    return lines


def show(lines: list[dict[str, Any]]) -> None:
    print(f"{'remedy':<16}{'target loss':>18}{'forgetting':>20}{'target/plain':>18}{'forgotten/plain':>18}{'at equal loss':>18}")
    for line in lines:
        figures = [line[name] for name in ("target_loss", "forgetting", "target_over_plain", "forgetting_over_plain")]
        figures.append(line["forgetting_at_equal_loss"] or (float("nan"), float("nan")))
        print(f"{line['remedies']:<16}" + "".join(f"{mean:>10.3f} ± {half:.3f}" for mean, half in figures))
    allowed = [line for line in lines if line["remedies"] != PLAIN and line["target_over_plain"][0] <= WITHIN]
    for family in dict.fromkeys(line["family"] for line in allowed):
        best = min((line for line in allowed if line["family"] == family), key=lambda line: line["forgetting_over_plain"][0])
        mean, half = best["forgetting_over_plain"]
        word = "halves" if mean <= 0.5 else "does not halve"
        print(f"{family}: {best['remedies']} {word} the forgetting within 2% of the target loss: {mean:.2f} ± {half:.2f} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with columns question and answer (gsm8k's train file)")
    parser.add_argument("--retain", type=Path, required=True, help="text that the base knows: a file or a folder")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", default="last:4")
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="every trial's path, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forgetting-") as name:
        folder = Path(name)
        loaded = write_spec(options, folder)
        anatomy = read_anatomy(options.base.resolve(), need_weights=True)
        size = data_size(prepare_data(loaded, Path(anatomy.folder), folder / "sets"), loaded.spec, folder / "sets")
        settings = Settings(
            base=str(options.base.resolve()),
            folder=str(folder),
            layers=options.layers,
            rate=options.rate,
            tokens_per_step=loaded.spec.train.tokens_per_step,
            total_steps=steps.total_steps(loaded.spec, size),
            total_tokens=steps.total_tokens(loaded.spec, size),
            row_tokens=steps.row_tokens(loaded.spec, anatomy, size),
            micro_batch_rows=8,
        )
        jobs = [(remedies, seed) for seed in range(options.seeds) for members in FAMILIES.values() for remedies in members]
        with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            futures = [pool.submit(run_trial, settings, remedies, seed) for remedies, seed in jobs]
            trials = [future.result() for future in futures]
    if options.out is not None:
        options.out.write_text(json.dumps(trials, indent=1) + "\n", encoding="utf-8")
    show(summarise(trials))


if __name__ == "__main__":
    main()
