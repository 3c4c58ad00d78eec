"""Where a merged model is checked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from orchestrator.plan.memory.estimate import RESIDENT_SHARE
from orchestrator.serve import verification, verification_process


@pytest.mark.parametrize(("free", "where"), [(1.5, "cuda"), (1.4, "cpu")])
def test_a_gpu_is_taken_only_if_the_whole_merged_model_fits(
    monkeypatch: pytest.MonkeyPatch, make_base: Callable, free: float, where: str
) -> None:
    anatomy = make_base()
    whole = 2 * anatomy.num_parameters()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verification, "free_bytes", lambda device: int(free * whole))
    assert verification.fitting_device(anatomy, "bfloat16") == where


def test_without_a_gpu_it_is_the_cpu(make_base: Callable) -> None:
    assert torch.cuda.is_available() or verification.fitting_device(make_base(), "float32") == "cpu"


def test_the_script_that_imports_nothing_of_ours_has_the_same_share() -> None:
    assert verification_process.RESIDENT_SHARE == RESIDENT_SHARE
