"""What a merge costs in memory, beside mapped files. Its time is measured by `scripts/bench merge`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def measured(repository: Path, folder: Path, *arguments: str) -> dict:
    script = repository / "scripts" / "benchmarks" / "merge.py"
    command = [sys.executable, str(script), "--json", "--folder", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("quantize", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
def test_memory_grows_with_the_largest_tensor_and_not_with_the_model(repository: Path, tmp_path: Path, quantize: str):
    found = measured(repository, tmp_path, "--gigabytes", "0.3", "--rounds", "1", "--quantize", quantize)
    assert found["num_bytes"] > 0.25e9
    assert found["peak_bytes"] <= found["peak_bytes_bound"]
    grown = found["peak_bytes"] - found["idle_bytes"]
    assert grown < 3 * found["largest_tensor_bytes"], "the process itself took less than three tensors beyond its imports"
    assert grown < found["num_bytes"] / 3


@pytest.mark.slow
def test_a_gigabyte_is_merged_within_its_memory(repository: Path, tmp_path: Path):
    found = measured(repository, tmp_path, "--gigabytes", "1.1", "--rounds", "1")
    assert found["num_bytes"] > 1e9
    assert found["peak_bytes"] <= found["peak_bytes_bound"]
