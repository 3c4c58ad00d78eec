"""CPU cores, memory and GPUs that this process may use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.units import MIB

CGROUP = Path("/sys/fs/cgroup")
CGROUP_CPU_MAX = CGROUP / "cpu.max"
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable with the job's configuration, set for a driver that `ray job submit` starts."""


def num_usable_cpus(cpu_max: Path = CGROUP_CPU_MAX) -> int:
    """Return the cores of this process: its CPU affinity, or its container's quota if smaller; at least one."""
    # cpu_count ignores taskset and cpusets of a batch system.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = cpu_max.read_text().strip().partition(" ") if cpu_max.exists() else ("max", "", "")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() else cores


def cache_folder() -> Path:
    """Return this user's cache folder on this machine, or the one that ORCHESTRATOR_CACHE names."""
    return Path(os.environ.get("ORCHESTRATOR_CACHE") or Path.home() / ".cache" / "orchestrator")


def thread_limit(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the limit that OMP_NUM_THREADS sets on a process's threads; None if it is unset or not a number.

    A list ("4,2", one number a nesting level) counts by its first. Ray sets the variable to 1 in the process that starts a
    submitted job's driver: there a 1 counts only where the job's own `env_vars` say so.
    """
    found = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if not found.isdecimal() or int(found) < 1:
        return None
    if found == "1" and JOB_CONFIG in environment and "OMP_NUM_THREADS" not in _job_variables(environment[JOB_CONFIG]):
        return None
    return int(found)


def _job_variables(config: str) -> Collection[str]:
    try:
        return json.loads(config)["runtime_env"]["env_vars"]
    except (ValueError, KeyError, TypeError):
        return ()


def free_memory_bytes(cgroup: Path = CGROUP) -> int:
    """Return the host memory still available to processes here: the machine's, or the container's if less.

    The page cache counts as free, since the kernel reclaims it on demand.
    """
    free = psutil.virtual_memory().available
    try:
        # psutil reads the machine's memory, not the container's.
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        kinds = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without a limit (`max`)
        return free
    cached = int(kinds.get("active_file", 0)) + int(kinds.get("inactive_file", 0))
    return max(0, min(free, limit - used + cached))


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int


def find_gpus() -> list[Gpu]:
    """Return the GPUs that nvidia-smi lists; none if it is missing or fails. CUDA is not initialised."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(listed)


def parse_gpus(listed: str) -> list[Gpu]:
    """Parse lines such as `NVIDIA H100 80GB HBM3, 81559`; sizes are in MiB."""
    # From the right, since a GPU's name may contain a comma.
    rows = [line.rsplit(",", 1) for line in listed.splitlines() if "," in line]
    return [Gpu(name.strip(), int(size) * MIB) for name, size in rows if size.strip().isdigit()]
