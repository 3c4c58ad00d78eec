"""The sample is whole, small, honest about itself, and exactly what its generator writes."""

from __future__ import annotations

import json
import re

import pytest

from orchestrator.samples import SAMPLE_BASE, SAMPLE_DATA
from scripts.sample_base import task

MAX_BASE_BYTES = 14 * 1024**2
SPLITS = ("train", "eval", "test")


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (SAMPLE_DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def card_number(name: str) -> float:
    found = re.search(rf"^\| {re.escape(name)} \| ([-+.\de]+) \|$", (SAMPLE_BASE / "README.md").read_text(), re.MULTILINE)
    assert found, f"the card has no row {name!r}"
    return float(found[1])


@pytest.mark.parametrize("name", SPLITS)
def test_committed_split_is_what_the_generator_writes(name: str) -> None:
    assert rows(name) == task.splits()[name]


def test_no_prompt_occurs_twice() -> None:
    prompts = [row["prompt"].casefold() for name in SPLITS for row in rows(name)]
    assert len(prompts) == len(set(prompts))


def test_answers_cannot_be_guessed() -> None:
    answers = [row["completion"] for row in rows("test")]
    assert max(map(answers.count, answers)) / len(answers) < 0.05


def test_answer_follows_from_the_prompt() -> None:
    """Each slot's word is named by exactly one thing that is said, so that answers of other prompts are wrong."""
    for row in (row for name in SPLITS for row in rows(name)):
        prompt = f" {row['prompt'].casefold().rstrip('.')} "
        for slot, word in zip((task.HEARERS, task.TOPICS, task.TIMES), row["completion"].strip("| ").split(" | "), strict=True):
            said = [value for value, ways in slot.items() if any(f" {way.casefold()} " in prompt for way in ways)]
            assert said == [word], row


def test_bars_mark_answers_only() -> None:
    assert all("|" not in row["text"] for row in rows("retain"))
    assert all("|" not in row["prompt"] for name in SPLITS for row in rows(name))


def test_data_readme_counts_its_rows() -> None:
    readme = (SAMPLE_DATA / "README.md").read_text(encoding="utf-8")
    for name in (*SPLITS, "retain"):
        assert f"| `{name}.jsonl` | {len(rows(name))} |" in readme
    assert any(json.dumps(row) in readme for row in rows("test")), "the example is not a row of test"


def test_retention_rows_are_text() -> None:
    assert all(set(row) == {"text"} and 0 < len(row["text"].split()) <= 300 for row in rows("retain"))


def test_base_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in SAMPLE_BASE.iterdir()) <= MAX_BASE_BYTES


def test_base_config_suits_4_bit_blocks() -> None:
    config = json.loads((SAMPLE_BASE / "config.json").read_text())
    assert config["hidden_size"] % 64 == 0
    assert config["intermediate_size"] % 64 == 0
    assert config["num_hidden_layers"] >= 8
    assert config["num_key_value_heads"] < config["num_attention_heads"]


def test_card_states_measured_numbers() -> None:
    assert 1.0 < card_number("held-out loss, nats per token") < 6.0
    assert 3_000_000 <= card_number("parameters") <= 7_000_000
    steps, step_tokens = card_number("training steps"), card_number("tokens per step")
    assert steps * step_tokens == card_number("training tokens, repeats counted")


def test_paths_are_folders_of_the_package() -> None:
    assert SAMPLE_BASE.is_dir()
    assert SAMPLE_DATA.is_dir()
