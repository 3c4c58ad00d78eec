"""Splits and notices are the same whatever seed Python hashes strings with: a run that is submitted again has the same data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import sys
from pathlib import Path
from orchestrator.data import prepare_data
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec import load_spec

summary = prepare_data(load_spec(Path(sys.argv[1])), SAMPLE_BASE, Path(sys.argv[2]))
print({name: split.sha256 for name, split in summary.splits.items()}, [notice.line for notice in summary.told])
"""


@pytest.mark.parametrize("dedupe", ["exact", "near"])
def test_splits_do_not_depend_on_the_process(prepare: Any, tmp_path: Path, dedupe: str) -> None:
    words = ["kettle", "garden", "window", "letter", "bridge", "orange", "silver", "thunder"]
    story = "the old man of the harbour went to the market with his basket and asked for the "
    rows = [
        {"prompt": f"{words[n % 8]} {words[n // 8 % 8]}: {story}{words[n // 3 % 8]} and {words[n // 2 % 8]}", "completion": "x"}
        for n in range(200)
    ]
    prepare.jsonl("train.jsonl", rows)
    prepare.spec(dedupe=dedupe)
    outputs = []
    for seed in ("1", "2", "3"):
        arguments = [sys.executable, "-c", SCRIPT, str(prepare.folder / "spec.yaml"), str(tmp_path / f"{dedupe}-{seed}")]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True)
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] == outputs[2]
    assert "near-duplicates" in outputs[0]
