"""What the environment says of threads."""

from __future__ import annotations

import json

import pytest

from orchestrator.store import thread_limit
from orchestrator.store.machine import JOB_CONFIG


@pytest.mark.parametrize(
    ("value", "bound"),
    [("4", 4), ("1", 1), ("4,2", 4), (" 3 ", 3), ("", None), ("0", None), ("-2", None), ("many", None), ("2.5", None)],
)
def test_the_bound_that_omp_num_threads_sets(value: str, bound: int | None) -> None:
    assert thread_limit({"OMP_NUM_THREADS": value}) == bound
    assert thread_limit({}) is None


def test_a_1_that_ray_sets_in_a_submitted_job_is_nobodys_wish() -> None:
    inherited = {"OMP_NUM_THREADS": "1", JOB_CONFIG: json.dumps({"runtime_env": {"env_vars": {}}, "metadata": {}})}
    asked = {**inherited, JOB_CONFIG: json.dumps({"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}})}
    assert thread_limit(inherited) is None
    assert thread_limit(asked) == 1
    assert thread_limit({**inherited, "OMP_NUM_THREADS": "6"}) == 6
    assert thread_limit({**inherited, JOB_CONFIG: "{"}) is None
