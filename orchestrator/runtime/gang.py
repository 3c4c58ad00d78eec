"""A gang: processes placed together that load the base once and run one group of trials after another."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Sequence

import ray
from ray.exceptions import OutOfMemoryError as EvictedError
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.anatomy import ModelAnatomy
from orchestrator.errors import RankOutOfMemoryError, TrainingError
from orchestrator.run.hours import Meter
from orchestrator.runtime.cluster import placement_strategy, rank_resources, worker_env
from orchestrator.runtime.failures import describe
from orchestrator.runtime.hang_detection import (
    POLL_S,
    HangDetector,
    HangTimeouts,
    ProcessId,
    end_processes,
    own_process,
    states_of,
)
from orchestrator.train import heartbeat
from orchestrator.train.heartbeat import NO_HEARTBEAT_YET, Heartbeat
from orchestrator.work.assignment import Work
from orchestrator.work.execution import BaseLoad, ExecutionPlan
from orchestrator.work.results import WorkResult

START_TIMEOUT_S = 600.0
LOOK_AGAIN_S = 5.0
"""Seconds between two queries to a node about a process that does not answer."""
SETTLE_S = 2.0
"""Seconds to listen to the other ranks after the first one fails: a rank that lost its peer may report before the peer does."""
BESIDE, WATCH = "beside", "watch"
"""Ray concurrency groups of the calls that a rank answers while it trains; all other calls run in one thread, in order."""


class GangDiedError(TrainingError):
    """A rank of the gang is gone or has failed; the whole gang has to be replaced.

    Args:
        out_of_memory: Whether it failed because memory ran out: its work must continue with a smaller execution.
    """

    def __init__(self, what: str, *, out_of_memory: bool = False) -> None:
        super().__init__(what)
        self.out_of_memory = out_of_memory


# A single rank is never restarted: the others would wait in a collective for a rank that has not loaded the base. The whole gang
# is replaced. Each concurrency group is a thread, in which heartbeats and `settle` are answered while `run` computes.
@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={BESIDE: 1, WATCH: 1})  # type: ignore[call-overload]
class RankActor:
    """One process of a gang. Every rank receives the same calls in the same order."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._host = None

    def hello(self) -> tuple[ProcessId, tuple[str, int]]:
        """Return this process and its rendezvous: the node's address and a port that is free now."""
        with socket.socket() as probe:
            # The kernel picks the port. It may be taken before rank 0 listens on it; then the start fails and is tried again.
            probe.bind(("", 0))
            return own_process(self._rank), (ray.util.get_node_ip_address(), probe.getsockname()[1])

    @ray.method(concurrency_group=WATCH)
    def heartbeat(self) -> Heartbeat:
        return heartbeat.look()

    def start(self, base: BaseLoad, anatomy: ModelAnatomy, execution: ExecutionPlan, meeting: tuple[str, int]) -> int:
        """Load the base and return the process id."""
        from orchestrator.train import TrainHost  # here, because the exchange imports this module and must not import torch

        self._host = TrainHost.create(
            base, anatomy, execution, self._rank, execution.ranks, init_method=f"tcp://{meeting[0]}:{meeting[1]}"
        )
        return os.getpid()

    def run(self, group: Sequence[Work]) -> list[WorkResult]:
        assert self._host is not None, "start() comes first"
        return self._host.run_group(group)

    @ray.method(concurrency_group=BESIDE)
    def settle(self) -> None:
        assert self._host is not None, "start() comes first"
        self._host.settle()

    def close(self) -> None:
        if self._host is not None:
            self._host.close()
            self._host = None


class Gang:
    """The handle of one gang, used from one asyncio loop. Call `start` again after GangDiedError."""

    def __init__(
        self,
        index: int,
        base: BaseLoad,
        anatomy: ModelAnatomy,
        execution: ExecutionPlan,
        meter: Meter,
        timeouts: HangTimeouts | None = None,
    ) -> None:
        self.index = index
        self.pids: tuple[int, ...] = ()
        self.base_loads = 0
        self.start_seconds = 0.0
        self.starting = ""
        """The step of its start that is in progress; empty once the gang is ready."""
        self._base = base
        self._anatomy = anatomy
        self._execution = execution
        self._meter = meter
        # Two bytes a parameter: the least that a rank reads of a 16-bit base.
        self._timeouts = (timeouts or HangTimeouts()).for_base(2 * anatomy.num_parameters())
        self._detector = HangDetector(self._timeouts)
        self._processes: tuple[ProcessId, ...] = ()
        self._hangs = ""
        """Description of ranks that were ended because they hung: the errors that follow only say that they are gone."""
        self._ranks: list = []
        self._placement: PlacementGroup | None = None

    async def start(self) -> None:
        """Place the ranks (on one node if they fit) and load the base in each.

        Raises:
            GangDiedError: a rank could not start.
            TimeoutError: no resources became free in time.
        """
        started = time.monotonic()
        execution = self._execution
        self.starting = f"waiting for {places(execution)}"
        bundles = [rank_resources(execution) for _ in range(execution.ranks)]
        self._placement = placement_group(bundles, strategy=placement_strategy(execution))
        await asyncio.wait_for(_ready(self._placement), START_TIMEOUT_S)
        # The GPUs are reserved from here on, so the hours count, loading included.
        self._meter.hold(self.index, execution.ranks)
        self.starting = "loading the base model"
        resources = rank_resources(execution)
        self._ranks = [
            RankActor.options(  # type: ignore[attr-defined]
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0),
                runtime_env={"env_vars": worker_env(execution)},
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank),
            ).remote(rank)
            for rank in range(execution.ranks)
        ]
        known = await asyncio.wait_for(self._all([rank.hello.remote() for rank in self._ranks]), START_TIMEOUT_S)
        self._processes, meeting = tuple(process for process, _ in known), known[0][1]
        for process in self._processes:
            self._detector.record(process, NO_HEARTBEAT_YET)
        calls = [rank.start.remote(self._base, self._anatomy, execution, meeting) for rank in self._ranks]
        self.pids = tuple(await self._all(calls))
        self.base_loads += 1
        self.starting = ""
        self.start_seconds = time.monotonic() - started

    async def run(self, group: Sequence[Work]) -> list[WorkResult]:
        """Run one assignment, or several that may share a batch, on every rank; return rank 0's answers, in any order, valid
        once settled.

        Raises:
            GangDiedError: a rank failed. A trial's own failures are results, not exceptions.
        """
        answers = await self._all([rank.run.remote(group) for rank in self._ranks])
        return [result.model_copy(update={"gang": self.index}) for result in answers[0]]

    async def settle(self) -> None:
        """Wait until every checkpoint made before this call is written; the gang may run the next group meanwhile.

        Raises:
            GangDiedError: the gang has ended, or could not write a checkpoint.
        """
        if not self._ranks:
            raise GangDiedError(f"gang {self.index} is gone")
        bound = self._timeouts.opening_s
        try:
            # Only rank 0 writes checkpoints in the background; what all ranks write together is written when `run` returns.
            await asyncio.wait_for(self._all([self._ranks[0].settle.remote()]), bound)
        except TimeoutError:
            await asyncio.to_thread(end_processes, self._processes)
            raise GangDiedError(
                f"gang {self.index} hangs: {self._processes[0]} did not write a checkpoint in {bound:.0f} s"
            ) from None

    def kill(self) -> None:
        """End the processes and release their resources."""
        self.starting = ""
        self._meter.release(self.index)
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks, self._processes, self._hangs = [], (), ""
        self._detector.forget()
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    async def close(self) -> None:
        """End the gang in order: every rank leaves its process group first."""
        if self._ranks:
            calls = [asyncio.ensure_future(_settled(rank.close.remote())) for rank in self._ranks]
            # A clean end took 0.2 to 3.6 s when measured; a rank that needs longer is stuck.
            _, pending = await asyncio.wait(calls, timeout=5)
            if pending:
                await asyncio.to_thread(end_processes, self._processes)
        self.kill()

    async def _all(self, calls: list) -> list:
        """Wait for every rank's answer. Once one fails, wait only briefly for the rest: they hang in a collective or fail as a
        consequence.

        Raises:
            GangDiedError: with `out_of_memory` if any rank that has reported by then ran out of memory.
        """
        waits = [asyncio.ensure_future(_settled(call)) for call in calls]
        pending, watch = set(waits), asyncio.ensure_future(self._until_one_hangs())
        try:
            while pending:
                done, _ = await asyncio.wait({*pending, watch}, return_when=asyncio.FIRST_COMPLETED)
                pending -= done
                if watch in done and not self._hangs:
                    watch.result()  # raises the error that ended it
                broken = _errors(done - {watch})
                if self._hangs and (broken or pending):
                    raise GangDiedError(f"gang {self.index} hangs: {self._hangs}")
                if broken:
                    raise await self._death(broken, pending)
        finally:
            watch.cancel()
        return [wait.result()[0] for wait in waits]

    async def _until_one_hangs(self) -> None:
        """Wait until a rank hangs; keep its description and end all processes of the gang.

        They are killed on their nodes: a stopped process answers no call of Ray's.
        """
        asked: dict[ProcessId, asyncio.Future] = {}
        looked_at: dict[ProcessId, float] = {}
        while True:
            for process, rank in zip(self._processes, self._ranks, strict=False):
                if process not in asked:
                    asked[process] = asyncio.ensure_future(_settled(rank.heartbeat.remote()))
            await asyncio.sleep(POLL_S)
            for process in [process for process, answer in asked.items() if answer.done()]:
                found, _ = asked.pop(process).result()
                if found is not None:  # otherwise the rank failed, and the call that waits for its work raises the error
                    self._detector.record(process, found)
            self._detector.tick()
            messages = self._detector.hung()
            silent = [
                process for process in self._detector.silent() if time.monotonic() - looked_at.get(process, 0.0) > LOOK_AGAIN_S
            ]
            # Asking a node blocks for up to NODE_S: it is done in a thread, and only every few seconds.
            if silent:
                messages = self._detector.stopped(await asyncio.to_thread(states_of, silent)) or messages
                looked_at |= dict.fromkeys(silent, time.monotonic())
            if messages:
                self._hangs = "; ".join(messages.values())
                await asyncio.to_thread(end_processes, self._processes)
                return

    async def _death(self, broken: list[Exception], pending: set[asyncio.Task]) -> GangDiedError:
        """Return why the gang failed, from the ranks that failed first and those that fail as a consequence."""
        device = self._execution.device
        # The first error may be just a lost connection; the rank that ran out of memory reports a moment later.
        if pending and not any(ran_out_of_memory(error, device) for error in broken):
            late, pending = await asyncio.wait(pending, timeout=SETTLE_S)
            broken = [*broken, *_errors(late)]
        for wait in pending:
            wait.cancel()
        out_of_memory = next((error for error in broken if ran_out_of_memory(error, device)), None)
        what = f"gang {self.index} failed: {_first_line(out_of_memory or _evicted(broken) or broken[0])}"
        return GangDiedError(what, out_of_memory=out_of_memory is not None)


def places(execution: ExecutionPlan) -> str:
    """Return the resources that the gang waits for, such as `2 free GPUs`."""
    kind = "GPU" if execution.device == "cuda" else "core"
    return f"{execution.ranks} free {kind}{'' if execution.ranks == 1 else 's'}"


async def _ready(placement: PlacementGroup) -> None:
    await placement.ready()


async def _settled(call) -> tuple:
    """Return a call's (answer, None) or (None, error): errors are handled where all ranks are seen."""
    try:
        return await call, None
    except Exception as error:
        return None, error


def _errors(waits: set[asyncio.Task]) -> list[Exception]:
    """Return the errors of the ranks that failed."""
    return [error for _, error in (wait.result() for wait in waits) if error is not None]


def ran_out_of_memory(error: BaseException, device: str) -> bool:
    """Return whether a rank ran out of memory in a way that a smaller micro-batch can fix.

    Either its own allocation failed or, on a CPU, Ray ended it because the node ran out. On a GPU a smaller micro-batch does
    not relieve the node's memory.
    """
    kinds = (RankOutOfMemoryError, EvictedError) if device == "cpu" else (RankOutOfMemoryError,)
    return isinstance(getattr(error, "cause", None) or error, kinds)


def _evicted(errors: list[Exception]) -> Exception | None:
    return next((error for error in errors if isinstance(getattr(error, "cause", None) or error, EvictedError)), None)


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, RayActorError):
        return describe(cause)
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0] if text else ''}"


def why_no_start(error: BaseException) -> str:
    """Return why a gang did not start; a timeout has no message of its own."""
    return f"no place within {START_TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else str(error) or repr(error)
