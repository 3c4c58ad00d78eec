"""Every task has what other packages look up by task: a reader, an encoder, a head, and a class that loads its bundle."""

from __future__ import annotations

import pytest
import transformers
from peft import TaskType

from orchestrator.data.reading.chat_turns import TurnNotes
from orchestrator.data.reading.layouts import Layouts
from orchestrator.serve.bundle import serve_commands
from orchestrator.spec.models import DataSpec
from orchestrator.spec.tasks import HEADS as TRAITS
from orchestrator.spec.tasks import TASKS, HeadTraits, Task
from orchestrator.train.model.heads import HEADS, head_of


@pytest.mark.parametrize("task", TASKS)
def test_every_task_reads_rows_in_its_formats_and_columns(task: Task) -> None:
    traits = TASKS[task]
    layouts = Layouts(task, DataSpec(train="x.jsonl"), TurnNotes()).layouts
    assert {layout.format for layout in layouts} == set(traits.formats)
    assert any(set(layout.required) == set(traits.columns) for layout in layouts)


@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS)
def test_every_head_can_be_trained_saved_and_loaded(traits: HeadTraits) -> None:
    assert traits.kind in HEADS
    assert traits.peft_task in TaskType.__members__
    model_class = getattr(transformers, traits.auto_model)
    assert callable(model_class.from_pretrained)
    assert traits.pipeline_tag in transformers.pipelines.PIPELINE_REGISTRY.get_supported_tasks()


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_head_and_is_served(task: Task) -> None:
    assert head_of(task) is HEADS[TASKS[task].head.kind]
    assert any("vllm serve bundle" in command for command in serve_commands("bundle", task))
