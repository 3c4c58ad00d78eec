"""What every test may lean on: a hub that cannot be reached, one thread a process, the real data where it lies."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

if "ORCHESTRATOR_CACHE" not in os.environ:  # xdist's workers share their parent's
    os.environ["ORCHESTRATOR_CACHE"] = tempfile.mkdtemp(prefix="orchestrator-cache-")
    atexit.register(shutil.rmtree, os.environ["ORCHESTRATOR_CACHE"], ignore_errors=True)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with data/ and models/ of real corpora, which the project does not contain."""
    folder = Path(os.environ.get("ORCHESTRATOR_REAL_DATA", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir() or not (folder / "models").is_dir():
        pytest.skip(f"real corpora missing: no data/ and models/ in {folder} (set ORCHESTRATOR_REAL_DATA)")
    return folder
