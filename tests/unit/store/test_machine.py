"""What the environment says of threads."""

from __future__ import annotations

import json

import pytest

from orchestrator.store import most_threads
from orchestrator.store.machine import JOB_CONFIG


@pytest.mark.parametrize(
    ("value", "bound"),
    [("4", 4), ("1", 1), ("4,2", 4), (" 3 ", 3), ("", None), ("0", None), ("-2", None), ("many", None), ("2.5", None)],
)
def test_the_bound_that_omp_num_threads_sets(value: str, bound: int | None) -> None:
    assert most_threads({"OMP_NUM_THREADS": value}) == bound
    assert most_threads({}) is None


def test_a_1_that_ray_sets_in_a_submitted_job_is_nobodys_wish() -> None:
    inherited = {"OMP_NUM_THREADS": "1", JOB_CONFIG: json.dumps({"runtime_env": {"env_vars": {}}, "metadata": {}})}
    asked = {**inherited, JOB_CONFIG: json.dumps({"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}})}
    assert most_threads(inherited) is None
    assert most_threads(asked) == 1
    assert most_threads({**inherited, "OMP_NUM_THREADS": "6"}) == 6
    assert most_threads({**inherited, JOB_CONFIG: "{"}) is None
