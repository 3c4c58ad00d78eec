"""How far the target lies from the retention set: how that is to be measured before the search, and what was found."""

from __future__ import annotations

from orchestrator.anatomy.values import ModelAnatomy
from orchestrator.plan.values import RunPlan, ShiftPlan
from orchestrator.values import Value

NUM_DOCUMENTS = 200
"""Of each set, drawn by the seed: the interval of a probe's error is then narrower than a tenth."""
MOST_CUTS = 4
"""Where nothing is stored of the trunk, features are made at so many cuts, evenly over the blocks."""
NO_RETENTION_SET = "there is no retention set to compare with"
"""Why nothing is measured where advice is asked for all the same."""


class BlockShift(Value):
    """The distance of the two sets in what enters one block."""

    cut: int
    """The block; the number of blocks means the final norm."""
    distance: float
    """Proxy A-distance, from 0 (nothing tells the two apart) to 2 (everything does)."""
    low: float
    """Lower end of its 95% interval, over documents."""
    high: float


class DomainShift(Value):
    """What was found: domain_shift.json."""

    blocks: tuple[BlockShift, ...] = ()
    target_documents: int = 0
    retention_documents: int = 0
    seconds: float = 0.0
    failed: str = ""
    """Why there is nothing; the search goes on without."""


def with_shift(plan: RunPlan, anatomy: ModelAnatomy) -> RunPlan:
    """The plan with what is measured of the domain shift, where there is a retention set: at the cuts that are stored of the
    trunk, which costs no forward pass, or at a few others. A classifier uses no retention set, given or not."""
    if plan.search is None or not plan.data.retain_tokens or plan.base.task == "classify":
        return plan
    count = anatomy.num_blocks
    few = tuple(dict.fromkeys(max(1, round(count * part / MOST_CUTS)) for part in range(1, MOST_CUTS + 1)))
    cuts = plan.trunk.cuts if plan.trunk is not None else few
    return plan.model_copy(update={"shift": ShiftPlan(cuts=cuts, num_documents=NUM_DOCUMENTS)})
