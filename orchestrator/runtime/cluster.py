"""Connecting to Ray, and reading what the cluster has."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.bases import Base
from orchestrator.errors import BaseError, PlanError, UsageError
from orchestrator.plan.placement import GPU_RANK_CPUS, RANK_CPUS
from orchestrator.plan.values import ClusterDescription, NodeDescription
from orchestrator.runtime.ray_health import guarded
from orchestrator.store import file_identity, find_gpus, num_usable_cpus, thread_limit, unreachable, write_atomic
from orchestrator.store.signals import handle_stop_signals
from orchestrator.work.execution import ExecutionPlan

ANSWER_S = 60.0
"""Seconds within which a node must answer a question about its files."""
SIGHT_S = 5.0
"""Seconds that a file may take to become visible on another node: network file systems cache directory entries."""

WORKER_ENV = {
    "RAY_TRAIN_V2_ENABLED": "1",
    # The tokenizers' threads would compete with the ranks' own, and warn in every forked process.
    "TOKENIZERS_PARALLELISM": "false",
    # Ray Train waits so long for a lost group to leave its process group (30 s by default): a lost rank was back after 10 s,
    # not 16.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
}
"""Environment of every worker; thread counts come from the plan (`worker_env`)."""


def fetch(call: Any, timeout_s: float | None = None) -> Any:
    """Return one answer of `ray.get`, whose type stubs do not distinguish one answer from a list."""
    return ray.get(call, timeout=timeout_s)


def own_node() -> tuple[str, str]:
    """Return (id, address) of the node that this process runs on."""
    node_id = ray.get_runtime_context().get_node_id()
    return node_id, next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id)


def worker_env(execution: ExecutionPlan) -> dict[str, str]:
    """Environment variables of a rank: fixed settings and the plan's threads.

    Two processes with two OpenMP threads each on two cores made a 0.5 s step take 13 s.
    """
    threads = str(execution.threads_per_rank)
    # Workers of a cluster that runs already do not inherit the driver's environment.
    offline = {name: os.environ[name] for name in ("HF_HUB_OFFLINE",) if name in os.environ}
    return {**WORKER_ENV, **offline, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def rank_resources(execution: ExecutionPlan) -> dict[str, float]:
    """Ray resources of one rank; the plan counts with the same."""
    return {"GPU": 1.0, "CPU": GPU_RANK_CPUS} if execution.device == "cuda" else {"CPU": RANK_CPUS}


def placement_strategy(execution: ExecutionPlan) -> str:
    """Return Ray's strategy: a gang that fits on one node is never spread; one that spans nodes takes as few as possible."""
    return "STRICT_PACK" if execution.inside_node else "PACK"


@contextlib.contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Connect to Ray: at `address`, at RAY_ADDRESS, or to a private Ray on this machine.

    An existing connection is used and left open.

    Raises:
        UsageError: no Ray answers at that address, or it asks for another token.
    """
    if ray.is_initialized():
        yield
        return
    target = address or os.environ.get("RAY_ADDRESS")
    target = None if target == "local" else target
    if target and (problem := unreachable(target)) is not None:
        raise UsageError(f"no Ray cluster can be reached there: {problem.reason}", where=target, remedy=problem.remedy)
    os.environ.update({name: value for name, value in WORKER_ENV.items() if name not in os.environ})
    # Train's controller polls its workers so often, and each report waits for a poll: a short run went from 26 s to 9 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": target} if target else {"include_dashboard": False, "num_cpus": num_usable_cpus()}
    try:
        with _few_tries() if target else contextlib.nullcontext():
            # Workers' output stays in Ray's log files: the run shows what matters by its own events.
            ray.init(logging_level=logging.WARNING, log_to_driver=False, **options)
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        raise UsageError(
            f"Ray rejected this process: {str(error).strip().splitlines()[0]}",
            where=target or "this machine",
            remedy="check --address or RAY_ADDRESS, and RAY_AUTH_MODE with RAY_AUTH_TOKEN_PATH for a cluster with tokens",
        ) from error
    handle_stop_signals()  # again, since `ray.init` installs its own signal handler
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _few_tries() -> Iterator[None]:
    """Make Ray try to connect twice for seconds, instead of for a quarter of an hour: the address has just answered."""
    name = "RAY_gcs_server_port_wait_time_s"
    if name in os.environ:
        yield
        return
    # Only while connecting: workers that are started later inherit the environment.
    os.environ[name] = "2"
    try:
        yield
    finally:
        del os.environ[name]


def probe_cluster(address: str | None = None) -> ClusterDescription:
    """Describe the live cluster. GPUs are inspected on the nodes that have them, since the driver may have none."""
    with connected(address):
        alive = [node for node in ray.nodes() if node["Alive"]]
        gpus = _probe_gpus([node for node in alive if node["Resources"].get("GPU", 0) >= 1])
        kinds = Counter(
            NodeDescription(
                num_cpus=int(node["Resources"].get("CPU", 0)),
                num_gpus=int(node["Resources"].get("GPU", 0)),
                gpu_memory_bytes=gpus.get(node["NodeID"], ("", 0))[1],
                gpu_name=gpus.get(node["NodeID"], ("", 0))[0],
                memory_bytes=int(node["Resources"].get("memory", 0)),
            )
            for node in alive
            if node["Resources"].get("CPU", 0) >= 1 or node["Resources"].get("GPU", 0) >= 1
        )
        nodes = tuple(kind.model_copy(update={"count": count}) for kind, count in kinds.items())
        return ClusterDescription(nodes=nodes, source="the live Ray cluster", max_threads=thread_limit())


def require_shared_storage(folder: Path) -> None:
    """On a cluster of several nodes, prove that those with gangs see what the driver writes into `folder`.

    Raises:
        PlanError: a node does not see it; nothing has been started.
    """
    others = _other_nodes()
    if not others:
        return
    probe, token = folder / f".seen-{secrets.token_hex(8)}", secrets.token_hex(8)
    write_atomic(probe, token)
    try:
        calls = [(node["NodeManagerAddress"], _on_node(_read_text, node["NodeID"]).remote(str(probe))) for node in others]
        blind = [address for address, call in calls if _said(address, call) != token]
    finally:
        probe.unlink(missing_ok=True)
    if blind:
        raise PlanError(
            f"{len(blind)} of {len(others)} other nodes cannot see the run's folder: {', '.join(sorted(set(blind))[:3])}",
            where=str(folder),
            expected="a folder that every node with a gang sees under this path",
            remedy="give `output` or --output a folder on storage that all nodes share (NFS, Lustre, a shared volume claim)",
        )


def require_base_everywhere(folder: Path, wanted: Mapping[str, str], base: Base) -> None:
    """On a cluster of several nodes, prove that those with gangs have the base that the driver has, before any is started.

    Of a base from the hub each node fetches the same commit into its own cache: once per node, all at the same time.

    Args:
        folder: The base's, under the path that the gangs load it from.
        wanted: What the driver sees in it: by file, `file_identity`.

    Raises:
        BaseError: a node has another base there, or none, or cannot fetch it; all such nodes are named.
    """
    task, place = (_identities, str(folder)) if base.hub is None else (_fetch_base, base)
    calls = [(node["NodeManagerAddress"], _on_node(task, node["NodeID"]).remote(place, list(wanted))) for node in _other_nodes()]
    # A fetch takes as long as it takes; a node that is lost meanwhile fails its call.
    limit_s = ANSWER_S if base.hub is None else None
    answers = [(address, _said(address, call, limit_s)) for address, call in calls]
    wrong = {address: differing for address, found in answers if (differing := _differing(wanted, found))}
    if wrong:
        shown = "; ".join(f"on {node}, {problem}" for node, problem in sorted(wrong.items())[:3])
        raise BaseError(
            f"the base is not the same on every node: {shown}",
            where=str(folder),
            expected="the same files under this path on every node with a gang",
            remedy="put the base on storage that all nodes share, or copy it to those nodes; nothing was started",
        )


def _differing(wanted: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Return the first file that differs, and how."""
    for name, identity in wanted.items():
        if not found[name]:
            return f"{name} is missing"
        if found[name] != identity:
            return f"{name} differs ({found[name]} instead of {identity})"
    return ""


def _other_nodes() -> list[dict[str, Any]]:
    """Return the nodes on which gangs may be placed, except the driver's own."""
    if not ray.is_initialized():  # the cluster was described by a file
        return []
    here = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    with_gpus = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    return [node for node in with_gpus or alive if node["NodeID"] != here]


def _said(address: str, call: Any, limit_s: float | None = ANSWER_S) -> Any:
    """Return a node's answer.

    Raises:
        BaseError: the node cannot fetch the base.
        PlanError: the node does not answer, or answers with another error.
    """
    try:
        return fetch(call, limit_s)
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, BaseError):
            raise BaseError(
                cause.what, where=f"node {address}: {cause.where}", expected=cause.expected, remedy=cause.remedy
            ) from None
        lines = str(getattr(error, "cause", None) or error).strip().splitlines()
        raise PlanError(
            f"a node of the cluster did not answer: {type(error).__name__}: {lines[-1] if lines else ''}",
            where=address,
            remedy="the node must be running and have this project and its packages installed as the driver has",
        ) from error


def _on_node(function: Any, node_id: str) -> Any:
    """Return a remote function pinned to a node, which reserves none of its resources."""
    place = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return function.options(scheduling_strategy=place, num_cpus=0, num_gpus=0)


@ray.remote
def _identities(folder: str, names: Sequence[str]) -> dict[str, str]:
    """Return the identities of these files on the calling node; a network file system may lag."""
    deadline = time.monotonic() + SIGHT_S
    while not all((Path(folder) / name).is_file() for name in names) and time.monotonic() < deadline:
        time.sleep(0.2)
    return {name: file_identity(Path(folder) / name) for name in names}


@ray.remote
def _fetch_base(base: Base, names: Sequence[str]) -> dict[str, str]:
    """Fetch the base into the calling node's own cache of the hub, and return the identities of these files there."""
    folder = base.for_training(logging.getLogger(__name__).info)
    return {name: file_identity(folder / name) for name in names}


@ray.remote
def _read_text(path: str) -> str:
    """Return the file's content, empty if it is not visible within SIGHT_S: network file systems may lag."""
    deadline = time.monotonic() + SIGHT_S
    while True:
        with contextlib.suppress(OSError):
            return Path(path).read_text()
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.2)


def _probe_gpus(nodes: list[dict]) -> dict[str, tuple[str, int]]:
    """Name and memory of the smallest GPU of each node, by node id."""
    probes = {node["NodeID"]: _on_node(_describe_gpu, node["NodeID"]).remote() for node in nodes}
    return {node_id: fetch(probe, 60) for node_id, probe in probes.items()}


@ray.remote
def _describe_gpu() -> tuple[str, int]:
    """Ask the driver tool, not torch: a CUDA context here would take memory from the gangs."""
    smallest = min(find_gpus(), key=lambda gpu: gpu.memory_bytes, default=None)
    if smallest is None:
        raise PlanError(
            "Ray counts a GPU here and nvidia-smi lists none",
            where=ray.util.get_node_ip_address(),
            remedy="put nvidia-smi on the PATH of that node's Ray, or set resources.accelerator: cpu",
        )
    return smallest.name, smallest.memory_bytes


def joins(stack: ExitStack, address: str | None, folder: Path) -> Callable[[], ClusterDescription]:
    """Connects to Ray when it is called, until `stack` ends, and describes the cluster.

    Args:
        folder: The run's; every node must see it.
    """

    def cluster() -> ClusterDescription:
        stack.enter_context(connected(address))
        stack.enter_context(guarded(folder))
        require_shared_storage(folder)
        return probe_cluster()

    return cluster
