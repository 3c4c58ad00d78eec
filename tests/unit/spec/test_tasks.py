"""The table of tasks is complete, and nothing outside it asks for a task's name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest

from orchestrator.data.reading.guess import FINDERS
from orchestrator.spec.models import ColumnsSpec, JobSpec
from orchestrator.spec.tasks import (
    HEADS,
    METRICS,
    RETENTION_TASKS,
    TASKS,
    HeadKind,
    Task,
    higher_is_better,
    loss_unit,
    metric_facts,
)
from orchestrator.train.evaluation import TEXT_METRICS

PACKAGE = Path(__file__).resolve().parents[3] / "orchestrator"
OWN = {"spec/tasks.py"}


def test_every_task_and_every_head_has_a_row() -> None:
    assert set(TASKS) == set(get_args(Task))
    assert set(HEADS) == set(get_args(HeadKind))
    assert {traits.head.kind for traits in TASKS.values()} == set(HEADS)


@pytest.mark.parametrize("task", TASKS)
def test_a_row_names_what_the_spec_knows(task: Task) -> None:
    traits = TASKS[task]
    columns = set(ColumnsSpec().model_dump())
    assert traits.columns
    assert {*traits.columns, *traits.optional_columns} <= columns
    assert traits.question in columns
    assert traits.metrics[0] == "loss"
    assert set(traits.metrics) <= set(METRICS)
    assert traits.formats
    assert traits.has_answers == any(METRICS[metric].generated for metric in traits.metrics)
    assert traits.head.supervises == ("documents" if traits.has_labels else "tokens")


def test_every_built_in_metric_fits_some_task() -> None:
    assert {metric for traits in TASKS.values() for metric in traits.metrics} == set(METRICS)
    assert not higher_is_better("loss")
    assert higher_is_better("accuracy")
    assert higher_is_better("package.module:function")


def test_the_columns_of_every_task_can_be_guessed_and_every_text_metric_computed() -> None:
    assert set(FINDERS) == set(TASKS)
    assert set(TEXT_METRICS) == {name for name, metric in METRICS.items() if metric.generated}


def test_the_facts_about_a_metric_that_no_search_compares_by() -> None:
    assert not metric_facts("perplexity").generated
    assert metric_facts("package.module:function").generated
    assert metric_facts("package.module:function").title == "package.module:function"


def test_retention_text_is_read_by_tasks_that_predict_tokens() -> None:
    assert {task for task, traits in TASKS.items() if traits.head.scores_retention} == set(RETENTION_TASKS)


def test_a_loss_is_counted_in_what_the_task_supervises() -> None:
    assert loss_unit("completion") == "nats per token"
    assert loss_unit("classify") == "nats per document"
    assert loss_unit("of a later version") == "nats per token"


def test_a_spec_gives_the_traits_of_its_task() -> None:
    for task, traits in TASKS.items():
        spec = JobSpec.model_validate({"name": "x", "base": {"model": "sample"}, "task": task, "data": {"train": "x.jsonl"}})
        assert spec.traits is traits


def comparisons_with_a_task(path: Path) -> list[int]:
    """Lines that compare something with a task's name: any of the two names that mean nothing else, or `text` or `completion`
    where a task is on the other side."""
    found: list[int] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            constants = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
            names = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            about_task = any(name.lower().strip("_").endswith("task") for name in names) or "task" in constants
            if "classify" in constants or (about_task and constants & set(TASKS)):
                found.append(node.lineno)
        elif isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant) and node.value.value in TASKS:
            found.append(node.value.lineno)
        elif isinstance(node, ast.arg) and node.arg in ("classify", "is_chat"):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_compares_with_a_tasks_name(path: Path) -> None:
    if str(path.relative_to(PACKAGE)) not in OWN:
        assert comparisons_with_a_task(path) == [], "ask for a trait (spec/tasks.py), which says why"


@pytest.mark.parametrize(
    "line",
    ['task == "classify"', 'self._task != "text"', 'spec.task in ("chat", "text")', 'read(x)["task"] == "completion"'],
)
def test_the_rule_finds_a_comparison(tmp_path: Path, line: str) -> None:
    file = tmp_path / "code.py"
    file.write_text(f"x = {line}\n")
    assert comparisons_with_a_task(file) == [1]


@pytest.mark.parametrize("line", ['kind == "text"', 'part.get("type") == "text"', 'spec.traits.head.kind == "language_model"'])
def test_the_rule_leaves_other_words_alone(tmp_path: Path, line: str) -> None:
    file = tmp_path / "code.py"
    file.write_text(f"x = {line}\n")
    assert comparisons_with_a_task(file) == []
