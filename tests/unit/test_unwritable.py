"""Output that cannot be written: where, why and what to do, with exit code 2, and never a traceback."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli.commands import app
from orchestrator.errors import CheckpointError
from orchestrator.store import commit_folder
from orchestrator.train.checkpoint.saving import _write


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    rows = [{"prompt": f"Count to {number}.", "completion": f"{number} it is"} for number in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"name": "run", "base": {"model": "sample"}, "task": "completion", "data": {"train": "train.jsonl"}}
    fields |= {"finetune": {"layers": "last:1", "tune": "lora", "learning_rate": 1e-3, "lora_rank": 4}, "search": {}}
    (tmp_path / "spec.yaml").write_text(json.dumps(fields))
    return tmp_path / "spec.yaml"


def a_file_in_its_place(folder: Path) -> Path:
    (folder / "runs").write_text("mine")
    return folder / "runs"


def a_file_above_it(folder: Path) -> Path:
    (folder / "file").write_text("mine")
    return folder / "file" / "runs"


def a_name_too_long(folder: Path) -> Path:
    return folder / ("r" * 300)


def a_loop_of_links(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop" / "runs"


def a_place_of_the_kernel(folder: Path) -> Path:
    return Path("/proc/1/runs")


PLACES = [a_file_in_its_place, a_file_above_it, a_name_too_long, a_loop_of_links, a_place_of_the_kernel]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("job", ["sweep", "finetune"])
def test_a_run_s_folder_that_cannot_be_made(spec: Path, job: str, place: Callable[[Path], Path]) -> None:
    done = CliRunner().invoke(app, [job, str(spec), "--output", str(place(spec.parent))])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert done.output.splitlines()[-1].startswith("  to do: ")
    assert "cannot be written" in done.output or "a file is in the place of where" in done.output


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    (tmp_path / "run" / "report.html" / "full").touch()
    (tmp_path / "run" / "spec.yaml").write_text("name: run\n")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert done.exit_code == 2, done.output
    assert "report.html: cannot be written" in done.output
    assert "Traceback" not in done.output


def full_disk(code: str, *arguments: str, num_bytes: int) -> subprocess.CompletedProcess[str]:
    """Run Python where no file may grow beyond `num_bytes`: what a full disk says, EFBIG instead of ENOSPC."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit
    )


@pytest.mark.parametrize("num_bytes", [2000])
def test_a_full_disk_before_anything_is_started(spec: Path, num_bytes: int) -> None:
    code = "import sys; from orchestrator.cli.commands import app; app(args=sys.argv[1:])"
    done = full_disk(code, "sweep", str(spec), "--output", str(spec.parent / "runs"), num_bytes=num_bytes)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("  to do: ")


class Breaking:
    """A snapshot whose writing finds the disk full."""

    rank_states: dict[int, object] = {}
    evaluations: dict[str, object] = {}
    owner: dict[str, object] = {}

    @property
    def artifact(self) -> object:
        raise OSError(28, os.strerror(28), "adapter_model.safetensors")


class OneRank:
    first = True

    def broadcast(self, value: object) -> object:
        return value

    def barrier(self) -> None: ...


def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_the_last_one_whole(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "rung-0") as folder:
        (folder / "weights").write_text("whole")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as caught:
        _write(tmp_path / "rung-0", Breaking(), OneRank())  # type: ignore[arg-type]
    assert "No space left on device" in str(caught.value)
    assert "free space" in caught.value.remedy
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB of its own; skipped where nothing may be mounted."""
    (tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "small")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing may be mounted here")
    yield tmp_path / "small"
    subprocess.run(["umount", str(tmp_path / "small")], check=True)


def test_a_small_disk_that_is_full(spec: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * 60_000)
    done = CliRunner().invoke(app, ["sweep", str(spec), "--output", str(small_disk)])
    assert done.exit_code == 2, done.output
    assert "No space left on device" in done.output
    assert "Traceback" not in done.output
