"""Repeat a run of docs/results.md, from its corpora to its report. Run by `scripts/results`."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

SPECS = Path(__file__).resolve().parent.parent / "docs" / "results"
CUTS = {
    "gsm8k-train.jsonl": ("gsm8k/train.jsonl", slice(0, 960)),
    "gsm8k-test.jsonl": ("gsm8k/test.jsonl", slice(0, 200)),
    "banking77-train.csv": ("banking77/train.csv", slice(0, None, 2)),
}
"""File -> (corpus, which of its rows): a two-core machine's share."""
COMPARED_ON = 4
PER_CLASS = {"banking77-10.csv": 10, "banking77-50.csv": 50, "banking77-all.csv": None}
"""File -> how many rows of each class of banking77 it has at most, from the training set without those of banking77-eval.csv."""


def main() -> None:
    asked = arguments()
    corpora, out = asked.corpora.resolve(), asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for file, (source, rows) in CUTS.items():
        cut(corpora / "data" / source, out / file, rows)
    intents = corpora / "data" / "banking77" / "train.csv"
    for file, most in PER_CLASS.items():
        cut_classes(intents, out / file, lambda rows, most=most: rows[:-COMPARED_ON][:most])
    cut_classes(intents, out / "banking77-eval.csv", lambda rows: rows[-COMPARED_ON:])
    text = (SPECS / f"{asked.name}.yaml").read_text(encoding="utf-8").replace("CORPORA", str(corpora))
    name = asked.name if asked.seed == 0 else f"{asked.name}-seed-{asked.seed}"
    text = text.replace(f"name: {asked.name}\n", f"name: {name}\n").replace("seed: 0}", f"seed: {asked.seed}}}")
    spec = out / f"{name}.yaml"
    spec.write_text(text, encoding="utf-8")
    from orchestrator.cli.commands import main as orchestrator

    orchestrator(["finetune" if "\nfinetune:" in text else "sweep", str(spec)])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/results", description="Repeat a run of docs/results.md.")
    holds = "a folder with data/{gsm8k,banking77,general} and models/english-7m, which are not part of the project"
    parser.add_argument("corpora", metavar="CORPORA", type=Path, help=holds)
    parser.add_argument("out", metavar="OUT", type=Path, help="gets the cut data, the spec with its paths filled in, and the run")
    names = sorted(path.stem for path in SPECS.glob("*.yaml"))
    parser.add_argument("name", metavar="NAME", choices=names, help=f"one of docs/results/*.yaml: {', '.join(names)}")
    parser.add_argument("--seed", type=int, default=0, help="train.seed; other ones than 0 are runs of their own")
    return parser.parse_args()


def cut(source: Path, target: Path, rows: slice) -> None:
    """Write some rows of a JSONL or CSV file; a CSV's rows may run over several lines."""
    with source.open(encoding="utf-8", newline="") as read, target.open("w", encoding="utf-8", newline="") as write:
        if source.suffix == ".jsonl":
            write.writelines(read.readlines()[rows])
            return
        header, *found = csv.reader(read)
        csv.writer(write).writerows([header, *found[rows]])


def cut_classes(source: Path, target: Path, choose: Callable[[list[list[str]]], list[list[str]]]) -> None:
    """Write the chosen rows of each class of a CSV file whose last column is the class."""
    classes: dict[str, list[list[str]]] = {}
    with source.open(encoding="utf-8", newline="") as read, target.open("w", encoding="utf-8", newline="") as write:
        header, *found = csv.reader(read)
        for row in found:
            classes.setdefault(row[-1], []).append(row)
        csv.writer(write).writerows([header, *(row for members in classes.values() for row in choose(members))])


if __name__ == "__main__":
    main()
