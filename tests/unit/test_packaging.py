"""What an installed package holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]


@pytest.mark.parametrize("package", ["orchestrator", "jobs"])
def test_every_file_beside_the_code_is_packaged(package: str) -> None:
    folder = REPOSITORY / package
    packaged = {path for pattern in SETUPTOOLS["package-data"][package] for path in folder.glob(pattern)}
    others = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert sorted(others - packaged) == []
    assert all(list(folder.glob(pattern)) for pattern in SETUPTOOLS["package-data"][package]), "a pattern matches nothing"


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    """Built from a copy, unpacked, and asked for a plan of the shipped spec: base, data and specs are in it."""
    pytest.importorskip("setuptools")
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("orchestrator", "jobs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
        source,
    ]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    about = next(site.glob("*.dist-info"))
    assert "orchestrator = orchestrator.cli:main" in (about / "entry_points.txt").read_text()
    assert list(about.rglob("LICENSE"))
    code = "import sys; from orchestrator.cli import main; main(sys.argv[1:])"
    for arguments in (
        ["--version"],
        ["plan", site / "jobs" / "specs" / "quickstart.yaml"],
        ["init", "--output", tmp_path / "s.yaml"],
    ):
        command = [sys.executable, "-c", code, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "train: ./site/orchestrator/samples/data/train.jsonl" in (tmp_path / "s.yaml").read_text()


def test_the_version_is_said_once() -> None:
    import orchestrator

    assert tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"] == orchestrator.__version__
