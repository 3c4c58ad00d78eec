"""Splits and notices are the same whatever seed Python hashes strings with: a run that is submitted again has the same data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
from orchestrator.data import prepare_data
from orchestrator.samples import SAMPLE_BASE
from orchestrator.spec import load_spec

summary = prepare_data(load_spec(Path(sys.argv[1])), SAMPLE_BASE, Path(sys.argv[2]))
print({name: split.sha256 for name, split in summary.splits.items()}, [notice.line for notice in summary.told])
"""


def test_splits_and_notices_do_not_depend_on_the_process(repository: Path, tmp_path: Path) -> None:
    outputs = []
    for seed in ("1", "2"):
        spec = repository / "jobs" / "specs" / "quickstart.yaml"
        arguments = [sys.executable, "-c", SCRIPT, str(spec), str(tmp_path / seed)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        outputs.append(subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True).stdout)
    assert outputs[0] == outputs[1]
    assert "near-duplicates" in outputs[0]
