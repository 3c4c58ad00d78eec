"""GPUs by the names that their drivers report: peak rate and memory.

Peaks are dense 16-bit operations per second with float32 accumulation on tensor cores (bf16; fp16 on Volta and Turing, which
have no bf16), from the vendors' data sheets, which often print twice the figure ("with sparsity"). Memory is what the driver
reports (`nvidia-smi --query-gpu=memory.total`), slightly less than the nominal figure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.units import MIB

TERA = 1e12


@dataclass(frozen=True)
class Accelerator:
    """One kind of GPU, a row of the table."""

    pattern: str
    """Regular expression that is searched for in the name, in lower case with `-` and `_` replaced by spaces."""
    peak_flops: float
    """Dense 16-bit operations per second."""
    memory_bytes: int | None
    """Memory that the driver reports; None if GPUs of this name come with different memory sizes."""
    source: str


def _row(pattern: str, teraflops: float, mebibytes: int | None, source: str) -> Accelerator:
    memory = mebibytes * MIB if mebibytes is not None else None
    return Accelerator(pattern, teraflops * TERA, memory, source)


ACCELERATORS = (
    _row(r"\bgb300\b|\bb300\b", 2250, None, "NVIDIA Blackwell Ultra data sheet"),
    _row(r"\bgb200\b", 2500, None, "NVIDIA GB200 NVL72 data sheet: 5 PFLOPS with sparsity a GPU"),
    _row(r"\bb200\b", 2250, 183359, "NVIDIA DGX B200 data sheet: 4.5 PFLOPS with sparsity a GPU"),
    _row(r"\bgh200\b.*\b144g", 989, None, "NVIDIA GH200 data sheet, HBM3e"),
    _row(r"\bgh200\b.*\b480gb", 989, 97280, "NVIDIA GH200 data sheet, 96 GB HBM3 (the name has the CPU's 480 GB)"),
    _row(r"\bgh200\b", 989, None, "NVIDIA GH200 data sheet"),
    _row(r"\bh200 nvl\b", 835.5, 143771, "NVIDIA H200 data sheet: 1671 TFLOPS with sparsity"),
    _row(r"\bh200\b", 989.5, 143771, "NVIDIA H200 data sheet: 1979 TFLOPS with sparsity"),
    _row(r"\bh100 nvl\b", 835.5, 95830, "NVIDIA H100 data sheet: 1671 TFLOPS with sparsity"),
    _row(r"\bh100 pcie\b", 756, 81559, "NVIDIA H100 PCIe product brief"),
    _row(r"\bh100\b.*\b(94|96)gb", 989.5, None, "NVIDIA H100 data sheet, other memories"),
    _row(r"\bh[18]00\b", 989.5, 81559, "NVIDIA H100 data sheet, SXM: 1979 TFLOPS with sparsity"),
    _row(r"\ba[18]00\b.*\bpcie\b.*\b80gb|\ba100 80gb pcie\b", 312, 81920, "NVIDIA A100 data sheet, PCIe 80GB"),
    _row(r"\ba[18]00\b.*\b80gb", 312, 81920, "NVIDIA A100 data sheet, SXM 80GB"),
    _row(r"\ba100\b.*\b40gb", 312, 40960, "NVIDIA A100 data sheet, 40GB"),
    _row(r"\ba[18]00\b", 312, None, "NVIDIA A100 data sheet"),
    _row(r"\bl40s\b", 362, 46068, "NVIDIA L40S data sheet: 733 TFLOPS with sparsity"),
    _row(r"\bl40\b", 181, 46068, "NVIDIA L40 data sheet"),
    _row(r"\bl4\b", 121, 23034, "NVIDIA L4 data sheet: 242 TFLOPS with sparsity"),
    _row(r"\ba10g\b", 70, 23028, "NVIDIA A10G data sheet: 140 TFLOPS with sparsity"),
    _row(r"\ba10\b", 125, 23028, "NVIDIA A10 data sheet"),
    _row(r"\ba30\b", 165, 24576, "NVIDIA A30 data sheet"),
    _row(r"\ba40\b", 149.7, 46068, "NVIDIA A40 data sheet"),
    _row(r"\brtx 6000 ada\b", 364, 49140, "NVIDIA RTX 6000 Ada data sheet: 1457 TFLOPS in FP8 with sparsity, a quarter"),
    _row(r"\brtx a6000\b", 154.8, 49140, "NVIDIA RTX A6000 data sheet: 309.7 TFLOPS with sparsity"),
    _row(r"\brtx 5090\b", 209.5, 32607, "NVIDIA RTX Blackwell GPU architecture paper, FP32 accumulate"),
    _row(r"\brtx 4090\b", 165.2, 24564, "NVIDIA Ada GPU architecture paper, FP32 accumulate"),
    _row(r"\brtx 3090\b", 71, 24576, "NVIDIA GA102 GPU architecture paper, FP32 accumulate"),
    _row(r"\bv100\b.*\bpcie\b", 112, None, "NVIDIA V100 data sheet, PCIe, fp16"),
    _row(r"\bv100\b.*\b32gb", 125, 32768, "NVIDIA V100 data sheet, SXM2, fp16"),
    _row(r"\bv100\b.*\b16gb", 125, 16384, "NVIDIA V100 data sheet, SXM2, fp16"),
    _row(r"\bv100\b", 125, None, "NVIDIA V100 data sheet, SXM2, fp16"),
    _row(r"\bt4\b", 65, 15360, "NVIDIA T4 data sheet, fp16"),
    _row(r"\bmi325x\b", 1307.4, 262128, "AMD Instinct MI325X data sheet"),
    _row(r"\bmi300x\b", 1307.4, 196592, "AMD Instinct MI300X data sheet"),
    _row(r"\bmi250x\b", 191.5, 65520, "AMD Instinct MI250X data sheet, one of the two devices that it appears as"),
)
"""The first row whose pattern is found in a name applies, so specific patterns come before general ones."""


def find_accelerator(gpu_name: str) -> Accelerator | None:
    """Return the row of a GPU by its name, or None if the table does not have it."""
    name = re.sub(r"[-_\s]+", " ", gpu_name.lower())
    return next((row for row in ACCELERATORS if re.search(row.pattern, name)), None)


def peak_flops(gpu_name: str) -> float | None:
    """Return the dense 16-bit operations per second of a GPU by its name, or None if the table does not have it."""
    found = find_accelerator(gpu_name)
    return found.peak_flops if found is not None else None
