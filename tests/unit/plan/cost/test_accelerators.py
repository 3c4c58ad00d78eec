"""The table against names that drivers print."""

from __future__ import annotations

import re

import pytest

from orchestrator.plan.cost.accelerators import ACCELERATORS, find_accelerator, peak_flops
from orchestrator.units import GIB


@pytest.mark.parametrize(
    ("name", "teraflops", "gibibytes"),
    [
        ("NVIDIA B200", 2250, 179.1),
        ("NVIDIA GB200", 2500, None),
        ("NVIDIA H200", 989.5, 140.4),
        ("NVIDIA H200 NVL", 835.5, 140.4),
        ("NVIDIA H100 80GB HBM3", 989.5, 79.6),
        ("NVIDIA H100 PCIe", 756, 79.6),
        ("NVIDIA H100 NVL", 835.5, 93.6),
        ("NVIDIA H100 96GB HBM3", 989.5, None),
        ("NVIDIA H800", 989.5, 79.6),
        ("NVIDIA GH200 480GB", 989, 95.0),
        ("NVIDIA GH200 144G HBM3e", 989, None),
        ("NVIDIA A100-SXM4-80GB", 312, 80.0),
        ("NVIDIA A100-SXM4-40GB", 312, 40.0),
        ("NVIDIA A100 80GB PCIe", 312, 80.0),
        ("NVIDIA A100-PCIE-40GB", 312, 40.0),
        ("NVIDIA A800-SXM4-80GB", 312, 80.0),
        ("NVIDIA A10G", 70, 22.5),
        ("NVIDIA A10", 125, 22.5),
        ("NVIDIA A30", 165, 24.0),
        ("NVIDIA A40", 149.7, 45.0),
        ("NVIDIA L40S", 362, 45.0),
        ("NVIDIA L40", 181, 45.0),
        ("NVIDIA L4", 121, 22.5),
        ("NVIDIA RTX A6000", 154.8, 48.0),
        ("NVIDIA RTX 6000 Ada Generation", 364, 48.0),
        ("NVIDIA GeForce RTX 5090", 209.5, 31.8),
        ("NVIDIA GeForce RTX 4090", 165.2, 24.0),
        ("NVIDIA GeForce RTX 3090", 71, 24.0),
        ("Tesla V100-SXM2-32GB", 125, 32.0),
        ("Tesla V100-SXM2-16GB", 125, 16.0),
        ("Tesla V100-PCIE-16GB", 112, None),
        ("Tesla T4", 65, 15.0),
        ("AMD Instinct MI300X", 1307.4, 192.0),
        ("AMD Instinct MI325X", 1307.4, 256.0),
        ("AMD Instinct MI250X", 191.5, 64.0),
        # as people write them into cluster files
        ("H100-80GB", 989.5, 79.6),
        ("h100_pcie", 756, 79.6),
        ("A100", 312, None),
    ],
)
def test_names_that_drivers_print(name: str, teraflops: float, gibibytes: float | None) -> None:
    found = find_accelerator(name)
    assert found is not None
    assert found.peak_flops == pytest.approx(teraflops * 1e12)
    assert (found.memory_bytes is None) == (gibibytes is None)
    if found.memory_bytes is not None:
        assert found.memory_bytes / GIB == pytest.approx(gibibytes, abs=0.1)


@pytest.mark.parametrize("name", ["", "?", "NVIDIA GeForce GTX 1080", "Quadro RTX 8000", "L400", "NVIDIA T400", "A1000"])
def test_what_is_not_in_the_table_is_not_guessed(name: str) -> None:
    assert find_accelerator(name) is None
    assert peak_flops(name) is None


def test_every_row_is_whole() -> None:
    for row in ACCELERATORS:
        re.compile(row.pattern)
        assert row.source
        assert 50e12 < row.peak_flops < 5000e12
