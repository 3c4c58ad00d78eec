"""Bringing a gang up, as often as that may fail."""

from __future__ import annotations

from typing import Protocol

from orchestrator.runtime.assignments import MAX_ATTEMPTS, GangFigures
from orchestrator.runtime.gang import Gang, why_no_start


class Tell(Protocol):
    """Writes an event down."""

    def __call__(self, kind: str, message: str, **fields: object) -> None: ...


async def start_gang(gang: Gang, figures: GangFigures, tell: Tell) -> None:
    """Until the gang is ready; what happened is told.

    Raises:
        Exception: what the last of MAX_ATTEMPTS starts raised.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            await gang.start()
            break
        except Exception as error:
            tell("gang_failed_to_start", f"gang {gang.index} could not start: {why_no_start(error)}", gang=gang.index)
            gang.kill()
            if attempt == MAX_ATTEMPTS:
                raise
    figures.base_loads = gang.base_loads
    figures.start_s.append(seconds := gang.start_seconds)
    ready = f"gang {gang.index} ready in {seconds:.1f} s"
    tell("gang_ready", ready, gang=gang.index, pids=list(gang.pids), seconds=round(seconds, 3))
