"""Measure this process's memory, and recognise out-of-memory errors."""

from __future__ import annotations

import psutil
import torch

OUT_OF_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")
"""Parts of error messages. The last is from cuBLAS, which allocates its workspace outside torch's allocator."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed: torch's own error on a GPU, a RuntimeError with its allocator's message on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in words for phrase in OUT_OF_MEMORY_PHRASES)


def first_line(error: BaseException) -> str:
    """Return the first line of an allocator's message, without its advice on the lines after it."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def memory_in_use(device: torch.device) -> int:
    """Return bytes: on a GPU torch's peak since `reset_peak`, on a CPU the process's resident memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def growth_bytes(device: torch.device, planned_bytes: int | None, held_bytes: int = 0) -> int:
    """Return the host memory that this process will still allocate, by the plan; 0 with a GPU: training needs no more.

    Args:
        planned_bytes: Planned host memory of the run's largest trial.
        held_bytes: What it has by now and the plan does not count.
    """
    if device.type == "cuda" or planned_bytes is None:
        return 0
    return max(0, planned_bytes - (memory_in_use(device) - held_bytes))


def reset_peak(device: torch.device) -> None:
    """Start a new peak, and give cached GPU blocks back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
