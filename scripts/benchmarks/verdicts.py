"""Measure the error rates of verdicts with a known truth: repetitions with seeds of their own.

    scripts/bench verdicts --base FOLDER --corpora FOLDER [--cases negative rivals labels] [--repetitions 20] [--processes 1]
                           [--out verdicts.jsonl]

negative: 24 rows of gsm8k whose answers are random letters, learned hard: what comes of it is worse than the base, as 500
    clean rows say each time. Promoted by the rule, once on clean rows and once on rows as noisy as those that were learned; then
    the better-scored trial is judged on clean test rows. An error is a verdict `positive`.
rivals: two trainings of one configuration with different seeds, one judged against the other as if it were a control: by the
    examples alone, as a run with one seed must; as wide as two seeds differ, by five seeds of one side, as a run on few
    examples does; and three against three, by Student's interval over the seeds. An error is a verdict `positive` or `negative`.
labels: as many rows of each of six intents of banking77, their labels permuted, judged against the class prior. An error is a
    verdict `positive`.

Trained and scored by the gang's own host, in this process, and judged by the functions that a run is judged by.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import csv
import json
import math
import random
import statistics
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from verdicts_bench import Bench, Point, Row

from orchestrator.store import append_jsonl
from orchestrator.transfer import Comparison, between_trained, over_seeds, promote, verdict
from orchestrator.transfer.seeds import student_t_quantile

MAX_CHARACTERS = 300
"""Maximum characters of a gsm8k row, so that it fits and hundreds are scored in seconds."""
NUM_ROWS, NUM_EVAL, NUM_TEST, NUM_TRUTH = 24, 24, 40, 500
"""Rows of `negative`: to learn, to promote on, to judge on, and to say what a model is really worth."""
FEWER_TEST = 12
NUM_RIVAL_ROWS = 24
RIVAL_SIZES = (12, 60, 200)
LABEL_SIZES = (120, 240)
NUM_CLASSES, ROWS_PER_CLASS = 6, 20
NUM_SEEDS = 3
ERRORS = {"negative": ("positive",), "rivals": ("positive", "negative"), "labels": ("positive",)}
KINDS = ("positive", "no gain", "inconclusive", "negative")
COLUMNS = {"prompt": "question", "completion": "answer"}

Repetition = dict[str, Any]


HARD = (Point("head", "full", 1e-3, 4), Point("last:1", "full", 2e-3, 4))
"""Settings that the rows of `negative` are trained with."""
RIVAL = Point("last:1", "lora", 5e-3, 3, 8)
LABELLED = Point("last:2", "full", 1e-3, 4)


def told(comparison: Comparison) -> dict[str, Any]:
    found = verdict(comparison)
    return {"verdict": found.kind, "mean": comparison.mean, "low": comparison.low, "high": comparison.high}


def short_rows(corpora: Path, *counts: int) -> list[list[Row]]:
    """Short rows of gsm8k, in an order drawn once, cut into parts of so many."""
    lines = (corpora / "data" / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if len(row["question"]) + len(row["answer"]) <= MAX_CHARACTERS]
    random.Random(0).shuffle(rows)
    drawn = iter(rows)
    return [[next(drawn) for _ in range(count)] for count in counts]


def noisy(rows: Sequence[Row], seed: int) -> list[Row]:
    """Answers of random letters, in words as long as before."""
    draw = random.Random(seed)

    def word(length: int) -> str:
        return "".join(draw.choice(string.ascii_lowercase) for _ in range(length))

    return [row | {"answer": " ".join(word(len(each)) for each in row["answer"].split())} for row in rows]


def negative(base: Path, corpora: Path, seeds: Sequence[int], folder: Path) -> Iterator[Repetition]:
    learned, noise, clean = short_rows(corpora, 160, 60, NUM_TRUTH + 100)
    bench = Bench(base, "completion", COLUMNS, noisy(learned, 0), [*noisy(noise, 1), *clean], folder)
    untouched = bench.base()
    for seed in seeds:
        draw = random.Random(seed)
        rows = draw.sample(range(len(learned)), NUM_ROWS)
        clean_rows = draw.sample(range(len(noise), len(noise) + len(clean)), len(clean))
        promoted_on = {"clean": clean_rows[:NUM_EVAL], "noisy": draw.sample(range(len(noise)), NUM_EVAL)}
        test = clean_rows[NUM_EVAL : NUM_EVAL + NUM_TEST]
        trials = [bench.trained(point, rows, seed) for point in HARD]
        found: Repetition = {"seed": seed, "promoted": {}, "words": {}}
        for name, part in promoted_on.items():
            records = [trial.record(number, HARD[number], part) for number, trial in enumerate(trials)]
            compared = {r.trial_id: t.against(untouched, part, seed) for r, t in zip(records, trials, strict=True)}
            found["promoted"][name] = promote(records, untouched.record(-1, None, part), math.inf, comparisons=compared).trial_id
            judged = trials[min(records, key=lambda record: record.score or math.inf).number]
            for size in (FEWER_TEST, NUM_TEST):
                word = told(judged.against(untouched, test[:size], seed))
                found["words"][f"best on {name} rows, {size} test rows"] = word
        found["truth"] = [told(trial.against(untouched, clean_rows[-NUM_TRUTH:], seed)) for trial in trials]
        yield found
    bench.close()


def rivals(base: Path, corpora: Path, seeds: Sequence[int], folder: Path) -> Iterator[Repetition]:
    learned, held = short_rows(corpora, 480, max(RIVAL_SIZES))
    bench = Bench(base, "completion", COLUMNS, learned, held, folder)
    for seed in seeds:
        draw = random.Random(seed)
        rows = draw.sample(range(len(learned)), NUM_RIVAL_ROWS)
        test = draw.sample(range(len(held)), len(held))
        trials = [bench.trained(RIVAL, rows, 2 * NUM_SEEDS * seed + number) for number in range(2 * NUM_SEEDS)]
        words: dict[str, Any] = {}
        for size in RIVAL_SIZES:
            sides = zip(trials[:NUM_SEEDS], trials[NUM_SEEDS:], strict=True)
            pairs = [one.against(other, test[:size], seed) for one, other in sides]
            words[f"one seed each, {size} test rows"] = told(pairs[0])
            own = [trial.against(trials[-1], test[:size], seed) for trial in trials[:-1]]
            wide = between_trained(own[0], over_seeds(range(len(own)), [each.mean for each in own]))
            words[f"{len(own)} seeds against one, {size} test rows"] = told(wide)
            words[f"{NUM_SEEDS} seeds each, {size} test rows"] = told(mean_of(pairs))
        yield {"seed": seed, "words": words}
    bench.close()


def mean_of(pairs: Sequence[Comparison]) -> Comparison:
    """The mean over pairs of seeds, with Student's interval over them."""
    means = [pair.mean for pair in pairs]
    half = student_t_quantile(len(means) - 1) * statistics.stdev(means) / len(means) ** 0.5
    mean = statistics.mean(means)
    return pairs[0].model_copy(update={"mean": mean, "low": mean - half, "high": mean + half})


def labels(base: Path, corpora: Path, seeds: Sequence[int], folder: Path) -> Iterator[Repetition]:
    for seed in seeds:
        learned, held = permuted_intents(corpora, random.Random(seed))
        own = folder / str(seed)
        own.mkdir()
        bench = Bench(base, "classify", {"text": "text", "label": "label"}, learned, held, own)
        prior, tuned = bench.base(), bench.trained(LABELLED, range(len(learned)), seed)
        bench.close()
        words = {
            f"by {unit}, {size} test rows": told(tuned.against(prior, range(size), seed, by_answer=unit == "accuracy"))
            for unit in ("accuracy", "loss")
            for size in LABEL_SIZES
        }
        yield {"seed": seed, "words": words}


def permuted_intents(corpora: Path, draw: random.Random) -> list[list[Row]]:
    """To learn and to hold out: rows of intents drawn by chance, as many of each, the labels permuted among them."""
    texts: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for name, by_intent in texts.items():
        with (corpora / "data" / "banking77" / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                by_intent.setdefault(row["category"], []).append(row["text"])
    intents = draw.sample(sorted(intent for intent, of in texts["train"].items() if len(of) >= ROWS_PER_CLASS), NUM_CLASSES)
    found: list[list[Row]] = []
    for name, count in (("train", ROWS_PER_CLASS), ("test", max(LABEL_SIZES) // NUM_CLASSES)):
        chosen = [text for intent in intents for text in texts[name][intent][:count]]
        permuted = [intent for intent in intents for _ in range(count)]
        draw.shuffle(chosen)
        draw.shuffle(permuted)
        found.append([{"text": text, "label": label} for text, label in zip(chosen, permuted, strict=True)])
    return found


CASES = {"negative": negative, "rivals": rivals, "labels": labels}


def repeat(case: str, base: Path, corpora: Path, seeds: Sequence[int], out: Path | None) -> list[Repetition]:
    found: list[Repetition] = []
    with tempfile.TemporaryDirectory(prefix=f"verdicts-{case}-") as name:
        for repetition in CASES[case](base, corpora, seeds, Path(name)):
            found.append({"case": case, **repetition})
            if out is not None:
                append_jsonl(out, found[-1])
            print(f"{case}, seed {repetition['seed']}: {time.process_time():.0f} s of the processor", file=sys.stderr, flush=True)
    return found


def show(repetitions: Sequence[Repetition]) -> None:
    print(f"{'case':<10}{'judged by':<38}" + "".join(f"{kind:>14}" for kind in (*KINDS, "errors")))
    for case in dict.fromkeys(each["case"] for each in repetitions):
        own = [each for each in repetitions if each["case"] == case]
        for setting in own[0]["words"]:
            counts = Counter(each["words"][setting]["verdict"] for each in own)
            figures = [counts[kind] for kind in KINDS] + [sum(counts[kind] for kind in ERRORS[case])]
            print(f"{case:<10}{setting:<38}" + "".join(f"{figure:>14}" for figure in figures))
    noise = [each for each in repetitions if each["case"] == "negative"]
    if noise:
        show_truth(noise)
    pairs = [word["mean"] for each in repetitions if each["case"] == "rivals" for word in [largest(each)]]
    if pairs:
        spread = statistics.mean(mean**2 for mean in pairs) ** 0.5
        print(f"rivals: two seeds differ by {spread:.4f} nats per token on {max(RIVAL_SIZES)} rows (root of the mean square)")


def largest(repetition: Repetition) -> dict[str, Any]:
    return repetition["words"][f"one seed each, {max(RIVAL_SIZES)} test rows"]


def show_truth(noise: Sequence[Repetition]) -> None:
    for number, point in enumerate(HARD):
        truths = [each["truth"][number] for each in noise]
        below = sum(truth["high"] < 0 for truth in truths)
        means = sorted(truth["mean"] for truth in truths)
        print(
            f"negative: {point.layers} on {NUM_TRUTH} clean rows: {means[0]:+.3f} to {means[-1]:+.3f} nats per token, "
            f"surely below the base in {below} of {len(truths)}"
        )
    for name in ("clean", "noisy"):
        promoted = sum(each["promoted"][name] is not None for each in noise)
        print(f"negative: promoted on {name} rows: {promoted} of {len(noise)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--corpora", type=Path, required=True, help="a folder with data/{gsm8k,banking77}")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--repetitions", type=int, default=20, help="with the seeds 0, 1, ...")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="every repetition's figures, a line each")
    options = parser.parse_args()
    given = options.base.resolve(), options.corpora.resolve()
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        parts = [range(first, options.repetitions, options.processes) for first in range(options.processes)]
        futures = [pool.submit(repeat, case, *given, part, options.out) for case in options.cases for part in parts if part]
        repetitions = [repetition for future in futures for repetition in future.result()]
    show(repetitions)


if __name__ == "__main__":
    main()
