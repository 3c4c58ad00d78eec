"""What a user reads when a part of Ray or of the run is gone: a line that says what, and how to go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray import exceptions as ray_errors

from orchestrator.errors import DataError, OrchestratorError, TrainingError
from orchestrator.runtime.failures import GO_ON, cause_of, describe, in_plain_words

DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: Exchange\n\tactor_id: 41a8\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. (1) the process was killed by the OOM killer due to high memory usage"
)


class Died(ray_errors.ActorDiedError):
    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)
        self.text = text

    def __str__(self) -> str:
        return self.text


def task_error(cause: Exception) -> ray_errors.RayTaskError:
    return ray_errors.RayTaskError("thin_trial", "forty lines of traceback", cause)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Died(DIED), "the exchange (the process that hands trials to the gangs) died: it was killed"),
        (ray_errors.ActorUnavailableError("RpcError: Socket closed", None), "a process of the run cannot be reached"),
        (ray_errors.WorkerCrashedError(), "a worker process of the run died"),
        (ray_errors.NodeDiedError("x"), "a node of the cluster died"),
        (ray_errors.LocalRayletDiedError(), "Ray's node manager (raylet)"),
        (ray_errors.OutOfMemoryError("the node was low on memory"), "out of memory"),
        (ray_errors.GetTimeoutError("x"), "did not answer in time"),
        (ConnectionError("refused\nmore"), "control store (GCS) is lost: refused"),
        (ray_errors.RayError("strange\nmany\nlines"), "RayError: strange"),
    ],
)
def test_every_error_of_rays_is_a_line(error: Exception, said: str) -> None:
    assert said in describe(error)
    assert "\n" not in describe(error)


def test_our_own_error_is_found_in_rays(tmp_path: Path) -> None:
    own = TrainingError("no gang could be started", remedy="see events.jsonl")
    assert cause_of(task_error(own)) is own
    assert cause_of(own) is own
    other = cause_of(task_error(Died(DIED)), tmp_path)
    assert "the exchange" in other.what
    assert (other.where, other.remedy, other.exit_code) == (str(tmp_path), GO_ON, 4)


@pytest.mark.parametrize("error", [DataError("row 3"), ValueError("a bug")])
def test_what_is_not_rays_is_left_as_it_is(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, in_plain_words(tmp_path):
        raise error
    assert caught.value is error


def test_a_run_hears_of_it_without_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(OrchestratorError, match="a worker process") as caught, in_plain_words(tmp_path):
        raise ray_errors.WorkerCrashedError
    assert caught.value.exit_code == 4
    assert str(caught.value).splitlines()[-1] == f"  to do: {GO_ON}"
