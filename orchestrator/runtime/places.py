"""Where a run's folder lies."""

from __future__ import annotations

from pathlib import Path

from orchestrator.spec import LoadedSpec
from orchestrator.transfer.records import RunView

UPLOADED = "runtime_resources/working_dir_files"
"""Part of the path of a working directory that `ray job submit` uploaded; Ray deletes it when it needs the room."""


def output_root(loaded: LoadedSpec, output: Path | None, view: RunView) -> Path:
    """The folder of the runs: `--output`, or the spec's.

    Where the spec lies in a working directory that Ray uploaded and `output` is relative to it, the run would vanish
    with that copy: it goes to `~/orchestrator-runs` of the node, and the view is told.
    """
    if output is not None:
        return output.expanduser().absolute()
    root = loaded.output_root
    if UPLOADED not in root.as_posix():
        return root
    kept = Path.home() / "orchestrator-runs"
    view.event(
        "output_moved",
        f"`output: {loaded.spec.output}` lies in the working directory that Ray uploaded and will delete; "
        f"the run goes to {kept} (say --output or an absolute `output` for another place)",
    )
    return kept
