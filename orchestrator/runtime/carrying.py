"""Carrying a trial of the driver's own choosing, a control say, through the exchange."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.anatomy import LayerSelection
from orchestrator.plan.values import TrialSpec
from orchestrator.runtime.assignments import Answer
from orchestrator.runtime.cluster import fetch


def hand_in(exchange: Any, trial: TrialSpec, selection: LayerSelection, stops: Sequence[int]) -> Any:
    """Have a gang take it up; `wait_for` takes what this returns.

    Args:
        stops: The step at which each of its rungs ends.
    """
    return exchange.carry.remote(trial, selection, tuple(stops))


def wait_for(exchange: Any, trial_id: str, call: Any) -> Answer:
    """Its last answer, once it has ended."""
    answer = fetch(call)
    fetch(exchange.finish.remote(trial_id, "failed" if answer.state == "failed" else "finished"))
    return answer
