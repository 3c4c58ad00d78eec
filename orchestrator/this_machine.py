"""Describe this machine without torch, deepspeed or Ray, for `plan` and `doctor`."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.hub.errors import endpoint, hub_cache, token_source
from orchestrator.plan.values import ClusterDescription, NodeDescription
from orchestrator.store import find_gpus, num_usable_cpus, thread_limit, unreachable
from orchestrator.units import GIB, format_bytes

MIN_DISK_BYTES = 5 * GIB
MIN_MEMORY_BYTES = 4 * GIB
NEEDED = ("torch", "ray", "deepspeed", "transformers", "peft", "bitsandbytes", "optuna", "safetensors", "pydantic", "typer")
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    name: str
    state: Literal["ok", "note", "wrong"]
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Examination:
    """Results of all checks."""

    findings: tuple[Finding, ...]

    @property
    def num_wrong(self) -> int:
        return sum(finding.state == "wrong" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.num_wrong == 0, "findings": [asdict(finding) for finding in self.findings]}

    def view(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1)
        style = {"ok": "green", "note": "yellow", "wrong": "bold red"}
        for finding in self.findings:
            text = f"{finding.found}\nto do: {finding.remedy}" if finding.remedy else finding.found
            table.add_row(Text(finding.state, style=style[finding.state]), finding.name, Text(text))
        verdict = "no problems found" if not self.num_wrong else f"{self.num_wrong} to fix; follow `to do`"
        return Group(table, Text(), Text(verdict, style="bold"))


def describe_this_machine() -> ClusterDescription:
    """Return this machine as a cluster of one node: its cores (as many as this process may use), memory and GPUs."""
    gpus = find_gpus()
    node = NodeDescription(
        num_cpus=num_usable_cpus(),
        num_gpus=len(gpus),
        gpu_memory_bytes=min((gpu.memory_bytes for gpu in gpus), default=0),
        gpu_name=gpus[0].name if gpus else "",
        memory_bytes=memory_bytes(),
        core_flops=0.0 if gpus else core_flops(),
    )
    return ClusterDescription(nodes=(node,), source=f"this machine ({socket.gethostname()})", max_threads=thread_limit())


def core_flops(size: int = 64, seconds: float = 0.02) -> float:
    """Measure the operations per second of one core in a float32 matrix product: the best of several, by processor time, so
    that other load hardly matters. Larger matrices would use the library's threads, which wait for each other busily."""
    one, other, product = (np.ones((size, size), dtype=np.float32) for _ in range(3))
    np.matmul(one, other, out=product)
    best, begun, times = 0.0, time.process_time(), 16
    while time.process_time() - begun < seconds:
        started = time.process_time()
        for _ in range(times):
            np.matmul(one, other, out=product)
        best = max(best, 2 * size**3 * times / max(1e-9, time.process_time() - started))
    return best


def memory_bytes(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Return the host memory in bytes, or the container's limit if that is smaller."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", proc.read_text(), re.MULTILINE) if proc.exists() else None
    sizes = [int(total[1]) * 1024] if total else [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    if cgroup.exists() and (limit := cgroup.read_text().strip()).isdigit():
        sizes.append(int(limit))
    return min(sizes)


def examine(address: str | None = None) -> Examination:
    """Check everything that a run needs from this machine. Nothing is started and nothing is downloaded."""
    return Examination(
        (
            _python(),
            *_versions(),
            Finding("cores", "ok", f"{num_usable_cpus()} usable"),
            _memory(),
            _disk(Path.cwd()),
            _gpus(),
            _compiler(),
            _ray(address or os.environ.get("RAY_ADDRESS")),
            _hub(),
        )
    )


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info < (3, 14):
        return Finding("python", "ok", f"{version} at {sys.executable}")
    return Finding("python", "wrong", version, "use Python 3.11, 3.12 or 3.13")


def _versions() -> Iterator[Finding]:
    tested = _tested_versions()
    for name in NEEDED:
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "wrong", "not installed", "scripts/quickstart sets everything up in .venv")
            continue
        wanted = tested.get(name)
        if wanted is None or installed.split("+")[0] == wanted:
            yield Finding(name, "ok", installed)
        else:
            yield Finding(name, "note", f"{installed}; tested with {wanted}", f"pip install {name}=={wanted}")


def _tested_versions() -> dict[str, str]:
    if not CONSTRAINTS.exists():
        return {}
    pairs = (line.split("==", 1) for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    return {name.strip(): version.strip() for name, version in pairs}


def _memory() -> Finding:
    size = memory_bytes()
    if size >= MIN_MEMORY_BYTES:
        return Finding("memory", "ok", format_bytes(size))
    return Finding("memory", "wrong", format_bytes(size), f"the quickstart needs {format_bytes(MIN_MEMORY_BYTES)}")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    if free >= MIN_DISK_BYTES:
        return Finding("disk", "ok", f"{format_bytes(free)} free in {folder}")
    return Finding(
        "disk", "wrong", f"{format_bytes(free)} free in {folder}", "free some space, or give --output a folder with room"
    )


def _gpus() -> Finding:
    gpus = find_gpus()
    if gpus:
        return Finding("GPUs", "ok", "; ".join(f"{gpu.name}, {format_bytes(gpu.memory_bytes)}" for gpu in gpus))
    missing = shutil.which("nvidia-smi") is None
    found = "none: nvidia-smi is not on PATH" if missing else "none: nvidia-smi lists no GPU"
    return Finding("GPUs", "note", f"{found}; training runs on the CPU")


def _compiler() -> Finding:
    """Look for ninja and a compiler, with which DeepSpeed builds its shared-memory op at first use; without them it runs
    without."""
    missing = [
        name for name, tools in (("ninja", ("ninja",)), ("a C++ compiler", ("c++", "g++"))) if not any(map(_on_path, tools))
    ]
    if not missing:
        return Finding("compiler", "ok", "ninja and a C++ compiler")
    return Finding("compiler", "note", f"missing: {' and '.join(missing)}; DeepSpeed runs without its compiled ops")


def _on_path(tool: str) -> bool:
    return shutil.which(tool) is not None or (Path(sys.executable).parent / tool).exists()


def _ray(address: str | None) -> Finding:
    if not address:
        return Finding("Ray", "ok", "no address given: a run starts a private Ray on this machine")
    problem = unreachable(address)
    if problem is None:
        return Finding("Ray", "ok", f"{address} answers" if ":" in address else address)
    return Finding("Ray", "wrong", f"{address}: {problem.reason}", problem.remedy)


def _hub() -> Finding:
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "0") not in ("", "0")]
    if offline:
        return Finding("hub", "ok", f"offline by {', '.join(offline)}: hub ids and `hub:` data come from {hub_cache()}")
    return Finding("hub", "ok", f"{endpoint()}, {token_source() or 'no token'}; cache {hub_cache()}")
