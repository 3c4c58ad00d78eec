"""What this process may use of its machine."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def num_usable_cpus(cpu_max: Path = CGROUP_CPU_MAX) -> int:
    """Cores of this process: its affinity, or its container's quota where that is smaller; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = cpu_max.read_text().strip().partition(" ") if cpu_max.exists() else ("max", "", "")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() else cores
