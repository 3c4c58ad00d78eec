"""The plan: every number that a run uses, derived before anything runs.

    plan = make_plan(loaded, anatomy, data_size, cluster, job="sweep", spec_sha256=...)
    print("\\n".join(plan_lines(plan)))
    trial = make_trial(plan, plan.search.options[0], 3e-4, number=0, seed=0)
    context = work_context(plan, settings=..., data=..., metric="loss")
    work = train_rung(plan, context, trial, plan.search.options[0].selection, folder=..., stop_step=36)

`memory/` estimates the memory of one rank term by term, `ladder.py` orders the candidate configurations of a gang by cost and
takes the first that fits, `gangs.py` decides how many gangs there are and how many ranks each has, `placement.py` assigns them to
nodes, `cost/` estimates operations, time, price and disk, and `explain.py` writes the reasons and warnings. Nothing here does I/O
except `read_cluster_file`, and nothing imports torch or Ray.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from orchestrator.plan.build import make_plan
from orchestrator.plan.cluster import read_cluster_file
from orchestrator.plan.data_size import estimate_data_size
from orchestrator.plan.explain import plan_lines
from orchestrator.plan.measurements import with_scores
from orchestrator.plan.schedule import rung_steps
from orchestrator.plan.search_space import grid_points
from orchestrator.plan.trials import (
    FOLLOW_UP_CONTROLS,
    REPEAT,
    curve_trial,
    curve_trial_id,
    evaluate_base,
    follow_up_controls,
    head_control,
    make_trial,
    none_control,
    repeat_control,
    scratch_control,
    shuffled_control,
    train_rung,
    work_context,
)

__all__ = [
    "FOLLOW_UP_CONTROLS",
    "REPEAT",
    "curve_trial",
    "curve_trial_id",
    "estimate_data_size",
    "evaluate_base",
    "follow_up_controls",
    "grid_points",
    "head_control",
    "make_plan",
    "make_trial",
    "none_control",
    "plan_lines",
    "read_cluster_file",
    "repeat_control",
    "rung_steps",
    "scratch_control",
    "shuffled_control",
    "train_rung",
    "with_scores",
    "work_context",
]


class _CallableRoom(ModuleType):
    """Module type that makes `orchestrator.plan(spec)` of the Python API callable, although this package has the same name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return import_module("orchestrator.api").plan(*arguments, **options)


sys.modules[__name__].__class__ = _CallableRoom
