"""Messages for the failure of a part of Ray or of a process of the run: what failed, what is on disk, how to continue."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from ray import exceptions as ray_errors

from orchestrator.errors import OrchestratorError, TrainingError

GO_ON = "finished work is on disk; submit the same spec again to continue"
ACTORS = {
    "Exchange": "the exchange (the process that hands trials to the gangs)",
    "RankActor": "a rank of a gang",
    "ImplicitFunc": "a thin trial of Ray Tune",
    "TrainController": "Ray Train's controller",
}
"""Names for users of our actor classes."""


@contextlib.contextmanager
def in_plain_words(run_folder: Path) -> Iterator[None]:
    """Convert errors of Ray raised in the block into our own, of one or two lines.

    Raises:
        TrainingError: instead of an error of Ray's.
    """
    try:
        yield
    except OrchestratorError:
        raise
    except Exception as error:
        if not (isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] == "ray"):
            raise
        raise cause_of(error, run_folder) from None


def cause_of(error: BaseException, run_folder: Path | None = None) -> OrchestratorError:
    """Return our own error that an error of Ray's wraps; if it wraps none, a new one that describes the failure."""
    chain = [error]
    while isinstance(inner := getattr(chain[-1], "cause", None), BaseException) and inner not in chain:
        chain.append(inner)  # Ray wraps a task's error in one that also inherits its class, and prints a remote traceback
    own = next((each for each in reversed(chain) if isinstance(each, OrchestratorError)), None)
    if own is not None:
        return own
    seen = chain[-1]
    return TrainingError(describe(seen), where=str(run_folder) if run_folder is not None else "", remedy=GO_ON)


def describe(error: BaseException) -> str:
    """Describe in one line what failed."""
    text = str(error)
    if isinstance(error, ray_errors.LocalRayletDiedError):
        return "Ray's node manager (raylet) on the driver's node died"
    if isinstance(error, ray_errors.NodeDiedError):
        return "a node of the cluster died"
    if isinstance(error, ray_errors.OutOfMemoryError):
        return "Ray ended a process of the run because its node ran out of memory"
    if isinstance(error, ray_errors.ActorUnavailableError):
        return "a process of the run cannot be reached: its node died, or the network between failed"
    if isinstance(error, ray_errors.RayActorError):
        found = re.search(r"class_name: (\S+)", text)
        known = found[1].rpartition(".")[2] if found else ""
        what = next(
            (words for name, words in ACTORS.items() if known.startswith(name)), f"a process of the run ({known or 'an actor'})"
        )
        return f"{what} died{_why(text)}"
    if isinstance(error, ray_errors.WorkerCrashedError):
        return "a worker process of the run died: it was killed, or its node ran out of memory"
    if isinstance(error, ray_errors.GetTimeoutError):
        return "a process of the run did not answer in time"
    if isinstance(error, ray_errors.RpcError | ConnectionError):
        return f"the connection to Ray's control store (GCS) is lost: {_first_line(text)}"
    return f"Ray reports {type(error).__name__}: {_first_line(text)}"


def _why(text: str) -> str:
    lowered = text.lower()
    if "out of memory" in lowered and "oom killer" not in lowered:
        return ": its node ran out of memory"
    if "node" in lowered and ("node has died" in lowered or "node died" in lowered or "node failure" in lowered):
        return " with its node"
    return ": it was killed, or its node ran out of memory" if "unexpectedly" in lowered else ""


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]
