#!/usr/bin/env python3
"""Writes the sample task: requests to a press office and the line of its calendar that each of them means.

    python -m scripts.sample_base.task            write the splits
    python -m scripts.sample_base.task --check    fail if the committed splits differ from what would be written

A line has three slots, each of which follows from the prompt: who is to hear, what about, and when. The bars are there
for a reason: they never stand in the retention text, so a model can tell by the token before it that it is answering,
and need not shift what it says everywhere.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "orchestrator" / "samples" / "data"
SEED = 7
SPLIT_ROWS = {"train": 1500, "eval": 150, "test": 200}

# The word a line uses, and what people say for it.
HEARERS = {
    "people": ("the people", "all Americans"),
    "states": ("the states", "the cities"),
    "nations": ("other nations", "the world"),
    "business": ("business", "private industry"),
}
TOPICS = {
    "health": ("health", "medical care"),
    "energy": ("energy", "power"),
    "education": ("education", "schools"),
    "defense": ("defense", "weapons"),
    "taxes": ("taxes", "revenue"),
    "jobs": ("jobs", "employment"),
}
TIMES = {
    "now": ("now", "at once"),
    "today": ("today", "this morning"),
    "month": ("next month", "in thirty days"),
    "year": ("next year", "in twelve months"),
}
REQUESTS = (
    "tell {hearer} about {topic} {time}",
    "write to {hearer} on {topic} {time}",
    "{time} we speak to {hearer} on {topic}",
    "{time} {hearer} must know about {topic}",
    "{hearer} will ask about {topic} {time}",
    "the address on {topic} is for {hearer} {time}",
)


def pick(rng: random.Random, slot: Mapping[str, tuple[str, ...]]) -> tuple[str, str]:
    """(what is said, what the line says)"""
    value = rng.choice(tuple(slot))
    return rng.choice(slot[value]), value


def example(rng: random.Random) -> dict[str, str]:
    """One row `{"prompt", "completion"}`."""
    (hearer, hearer_slot), (topic, topic_slot), (time, time_slot) = (pick(rng, slot) for slot in (HEARERS, TOPICS, TIMES))
    prompt = rng.choice(REQUESTS).format(hearer=hearer, topic=topic, time=time)
    return {"prompt": f"{prompt[0].upper()}{prompt[1:]}.", "completion": f"| {hearer_slot} | {topic_slot} | {time_slot}"}


def splits(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """All splits; no prompt occurs twice, in one split or across them."""
    rng = random.Random(seed)
    unique: dict[str, dict[str, str]] = {}
    while len(unique) < sum(SPLIT_ROWS.values()):
        row = example(rng)
        unique.setdefault(row["prompt"].casefold(), row)
    rows = iter(unique.values())
    return {name: [next(rows) for _ in range(count)] for name, count in SPLIT_ROWS.items()}


def as_json_lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--check", action="store_true", help="compare instead of write")
    arguments = parser.parse_args()
    stale = []
    for name, rows in splits().items():
        file = arguments.out / f"{name}.jsonl"
        if not arguments.check:
            file.write_text(as_json_lines(rows), encoding="utf-8")
        elif not file.is_file() or file.read_text(encoding="utf-8") != as_json_lines(rows):
            stale.append(str(file))
    if stale:
        print(f"differ from the generator: {', '.join(stale)}; run python -m scripts.sample_base.task", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
