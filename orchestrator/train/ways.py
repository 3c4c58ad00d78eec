"""The self-test of a freshly loaded base: what the plan assumes of its class holds for this very base."""

from __future__ import annotations

from orchestrator.errors import BaseError
from orchestrator.train.context import HostContext
from orchestrator.train.engines.construction import forward_ready
from orchestrator.train.model.objective import objective_of
from orchestrator.train.model.self_test import WAY_NAMES, failed_ways, tolerance_of


def check_ways(context: HostContext) -> str:
    """Compare every way that the plan was made for with the class's own computation. Called on every rank, with no branch open.

    Returns:
        The line for the run's record.

    Raises:
        BaseError: a way that the plan assumes fails on this base; names it and what was seen.
    """
    base = context.base
    head = base.model.get_submodule(context.head_module)
    with forward_ready(objective_of(base, head), context.execution):
        found = failed_ways(base.model, base.anatomy, base.load.task, base.device)
        limit = tolerance_of(base.model, base.anatomy, base.load.task, base.device)
    for name, difference in found.items():
        if wrong := difference.wrong(limit):
            raise BaseError(
                f"the self-test of the base failed: {WAY_NAMES[name]}: {wrong}",
                where=base.load.folder,
                expected=f"at most {limit:g} nats a token, as on the small instance of its class that the plan relies on",
                remedy="the base's config or code differs from what its class was seen to do: plan again; if it fails again, "
                "report the model type and the transformers version",
            )
    largest = max((difference.nats for difference in found.values()), default=0.0)
    tested = ", ".join(WAY_NAMES[name].partition(" (")[0] for name in found)
    return f"self-test of the base: {tested} agree with the class's own logits, to {largest:.2g} nats a token"
