"""Ranks with little memory: a Ray whose workers raise what a full GPU raises, where the test says so.

Ray calls the hook in every worker process before it gets work. The training loop, the engines and the gang are the real
ones; only the objective's forward pass fails, as an allocation in it would.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

import orchestrator.runtime  # noqa: F401 - before a test imports ray: the private Ray asks for a token, as for users
from orchestrator.runtime.cluster import WORKER_ENV
from orchestrator.store import num_usable_cpus

FittingRows = dict[tuple[str, str], int]
"""(layer policy, tune) -> rows in a micro-batch that a rank of its own can still compute; others compute any."""


@contextmanager
def cramped_ray(fitting: FittingRows, *, rank: int) -> Iterator[None]:
    """A private Ray on which one rank runs out of memory in trials that train with more rows than fit."""
    environment = {**WORKER_ENV, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    os.environ.update({name: value for name, value in environment.items() if name not in os.environ})
    ray.init(
        include_dashboard=False,
        num_cpus=num_usable_cpus(),
        logging_level=logging.WARNING,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": _hook(fitting, rank)},
    )
    try:
        yield
    finally:
        ray.shutdown()


def _hook(fitting: FittingRows, cramped_rank: int) -> Callable[[], None]:
    """A function inside a function, for Ray sends such a one whole: its workers need not find this file."""

    def install() -> None:
        import os

        if "MKL_NUM_THREADS" not in os.environ:
            return  # no rank: only those get their threads from the plan, and others need not import torch

        import torch

        from orchestrator.train.model.objective import Objective
        from orchestrator.train.session import TrainingSession

        forward, run, fits = Objective.forward, TrainingSession.run, {"rows": 10**9}

        def noting_run(self, on_step):
            trial = self.outcomes[0].work.trial
            known = fitting.get((trial.layers, trial.tune)) if trial.control is None else None
            fits["rows"] = 10**9 if known is None or self.context.ranks.rank != cramped_rank else known
            return run(self, on_step)

        def cramped_forward(self, **batch):
            if self.training and len(batch["input_ids"]) > fits["rows"]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return forward(self, **batch)

        TrainingSession.run, Objective.forward = noting_run, cramped_forward

    return install
