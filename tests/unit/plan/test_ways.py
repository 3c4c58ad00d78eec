"""What the plan makes of a class that does not allow the usual ways."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.anatomy import Ways
from orchestrator.plan import make_plan
from orchestrator.plan.estimates import MemoryTerm
from orchestrator.plan.memory.activations import attends_by_document, attention_of
from orchestrator.plan.values import RunPlan

FINETUNE: dict[str, Any] = {"finetune": {"layers": "last:2", "tune": "lora", "learning_rate": 1e-4, "lora_rank": 8}}


@pytest.fixture(scope="module")
def planned(base: Any, job: Any, data: Any, gpus: Any) -> Any:
    """A fine-tuning plan of the 8b, with these ways of its class."""

    def build(ways: Ways | None = None, **sections: Any) -> RunPlan:
        anatomy = base("8b").model_copy(update={"ways": ways or Ways()})
        loaded = job(**(FINETUNE | sections))
        return make_plan(loaded, anatomy, data(), gpus(), job="finetune", spec_sha256="0" * 64)

    return build


def term(plan: RunPlan, name: str) -> MemoryTerm:
    return next(term for term in plan.options[0].memory.terms if term.name == name)


def notes(plan: RunPlan) -> str:
    return "\n".join(plan.notes)


def test_documents_that_would_see_each_other_have_rows_of_their_own(planned: Any) -> None:
    usual, alone = planned(), planned(Ways(packs=False, reasons={"packs": "losses differ by 3 nats a token"}))
    assert (usual.execution.pack, alone.execution.pack, alone.refit_execution.pack) == (True, False, False)
    assert usual.execution.row_tokens >= alone.execution.row_tokens == -(-usual.data.longest_document_tokens // 8) * 8
    assert "documents are not packed" in notes(alone)
    assert "losses differ by 3 nats a token" in notes(alone)
    assert "documents are not packed" not in notes(usual)


def test_rows_that_may_not_be_padded_are_computed_singly(planned: Any) -> None:
    found = planned(Ways(packs=False, pads=False))
    assert (found.execution.pads, found.execution.micro_batch_rows) == (False, 1)
    assert (found.refit_execution.pads, found.refit_execution.micro_batch_rows) == (False, 1)
    assert "a micro-batch is one document" in notes(found)


def test_a_class_that_computes_its_own_logits_has_all_of_them_at_once(planned: Any) -> None:
    usual, own = planned(), planned(Ways(projects=False))
    positions = own.execution.micro_batch_rows * own.execution.row_tokens
    vocabulary = 128256
    assert term(own, "logits").num_bytes >= positions * vocabulary * (2 + 12)
    assert term(usual, "logits").num_bytes / usual.execution.micro_batch_rows < term(own, "logits").num_bytes
    assert "at every position" in notes(own)


@pytest.mark.parametrize("ways", [Ways(injects=False, reasons={"injects": "KeyError: 'per layer'"}), Ways(projects=False)])
def test_nothing_is_stored_where_it_could_not_enter(planned: Any, ways: Ways) -> None:
    assert planned(train={"epochs": 20}).trunk is not None
    found = planned(ways, train={"epochs": 20})
    assert found.trunk is None
    assert "stored states cannot replace it" in notes(found)
    assert ways.reasons.get("injects", "") in notes(found)


@pytest.mark.parametrize("ways", [Ways(attention="sdpa"), Ways(packs=False), Ways(attention="eager")])
def test_attention_by_document_needs_a_class_that_allows_it(base: Any, ways: Ways) -> None:
    usual = base("8b")
    other = usual.model_copy(update={"ways": ways})
    assert attention_of(usual, "cpu", one_document_per_row=False) == "by_document"
    assert attention_of(usual, "cuda", one_document_per_row=False) == "sdpa"
    expected = "eager" if ways.attention == "eager" else "sdpa"
    assert attention_of(other, "cpu", one_document_per_row=False) == expected
    assert not attends_by_document(other, "cpu", one_document_per_row=False)
