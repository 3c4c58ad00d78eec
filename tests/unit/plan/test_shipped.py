"""What the comments of shipped specs say of memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from orchestrator.anatomy import read_anatomy, select
from orchestrator.plan.memory.candidate import Candidate
from orchestrator.plan.memory.estimate import estimate
from orchestrator.plan.memory.footprint import make_footprint
from orchestrator.units import GIB

SPEC = Path(__file__).parents[3] / "jobs" / "specs" / "llama-8b-qlora.yaml"


@pytest.mark.parametrize(
    ("said", "layers", "checkpointing"),
    [(r"with its optimizer, (\d+) GiB", "all", True), (r"last:16 needs (\d+) GiB", "last:16", False)],
)
def test_figures_of_full_tuning(said: str, layers: str, checkpointing: bool) -> None:
    """Of one rank and one row; with `all` even the leanest way, which computes blocks again."""
    base = read_anatomy(SPEC.parent / "shapes" / "llama-3.1-8b", need_weights=False)
    footprint = make_footprint(base, select(base, layers, "full", None, task="completion"), "nf4", 2)
    candidate = Candidate("cuda", 1, "torch", 0, "none", checkpointing, row_tokens=2048)
    found = re.search(said, SPEC.read_text())
    assert found is not None
    assert int(found[1]) == pytest.approx(estimate(footprint, candidate).device.total_bytes / GIB, rel=0.02)
