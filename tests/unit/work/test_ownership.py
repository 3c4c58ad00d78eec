"""Whose a checkpoint is."""

from __future__ import annotations

from orchestrator.spec.adapters import AdapterOptions
from orchestrator.values import content_hash
from orchestrator.work.assignment import contradiction, ownership
from orchestrator.work.trial import TrialSpec

TRIAL = TrialSpec(
    trial_id="0000-a",
    number=0,
    layers="all",
    tune="lora",
    learning_rate=1e-3,
    lora_rank=8,
    total_steps=4,
    total_tokens=64,
    seed=0,
)


def test_a_trial_with_plain_lora_is_named_as_by_versions_that_knew_no_other_adapters() -> None:
    before = {name: value for name, value in TRIAL.model_dump(mode="json").items() if name != "adapter"}
    assert ownership(TRIAL)["trial"] == before
    assert ownership(TRIAL)["trial_sha256"] == content_hash(before)


def test_another_adapter_is_another_owner() -> None:
    dora, rslora = (TRIAL.model_copy(update={"adapter": AdapterOptions(kind=kind)}) for kind in ("dora", "rslora"))
    assert contradiction(ownership(dora), ownership(dora)) == ""
    assert "adapter is" in contradiction(ownership(dora), ownership(rslora))
