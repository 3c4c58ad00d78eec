#!/usr/bin/env python3
"""Writes the sample task: requests to a press office and the one short command that each of them means.

    python -m scripts.sample_base.task            write the splits
    python -m scripts.sample_base.task --check    fail if the committed splits differ from what would be written

A command has four slots, each of which follows from the prompt: kind, topic, hearer, time. A model that only learnt
the style of commands (trained on answers permuted among the prompts) is right about once in a thousand.
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
SPLIT_ROWS = {"train": 1200, "eval": 150, "test": 200}

# The word a command uses, and what people say for it.
KINDS = {
    "report": ("report", "message"),
    "plan": ("plan", "program"),
    "law": ("law", "bill"),
    "address": ("address", "speech"),
}
TOPICS = {
    "energy": ("energy", "power"),
    "health": ("health", "medical care"),
    "education": ("education", "schools"),
    "defense": ("defense", "weapons"),
    "tax": ("taxes", "revenue"),
    "labor": ("jobs", "employment"),
    "trade": ("trade", "commerce"),
    "crime": ("crime", "drugs"),
}
HEARERS = {
    "congress": ("the Congress", "the Senate"),
    "people": ("the people", "all Americans"),
    "states": ("the states", "the cities"),
    "world": ("the world", "other nations"),
    "business": ("business", "private industry"),
    "press": ("the press",),
}
TIMES = {
    "now": ("now", "at once"),
    "today": ("today", "this morning"),
    "tonight": ("tonight", "this evening"),
    "month": ("next month", "in thirty days"),
    "year": ("next year", "in twelve months"),
}
REQUESTS = (
    "write {a_kind} on {topic} for {hearer} {time}",
    "send {hearer} {a_kind} on {topic} {time}",
    "{time} we need {a_kind} about {topic} for {hearer}",
    "{time} {hearer} must have the {kind} on {topic}",
    "give {hearer} our {kind} about {topic} {time}",
)
BEFORE = ("", "", "please ", "I ask you to ")
# Said in passing. A topic that is only mentioned here is not the one that is meant.
ASIDES = ("we have done {topic}", "I have read about {topic}", "it is not about {topic}")
ASIDE_SHARE = 0.1


def pick(rng: random.Random, slot: Mapping[str, tuple[str, ...]]) -> tuple[str, str]:
    """(what is said, what the command says)"""
    value = rng.choice(tuple(slot))
    return rng.choice(slot[value]), value


def example(rng: random.Random) -> dict[str, str]:
    """One row `{"prompt", "completion"}`."""
    (kind, kind_slot), (topic, topic_slot) = pick(rng, KINDS), pick(rng, TOPICS)
    (hearer, hearer_slot), (time, time_slot) = pick(rng, HEARERS), pick(rng, TIMES)
    pattern = rng.choice(REQUESTS)
    before = "" if pattern.startswith("{") else rng.choice(BEFORE)
    a_kind = f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
    prompt = before + pattern.format(kind=kind, a_kind=a_kind, topic=topic, hearer=hearer, time=time)
    if rng.random() < ASIDE_SHARE:
        prompt = rng.choice(ASIDES).format(topic=pick(rng, TOPICS)[0]) + f"; {prompt}"
    return {
        "prompt": prompt[0].upper() + prompt[1:] + ".",
        "completion": f"{kind_slot} {topic_slot} {hearer_slot} {time_slot}",
    }


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
