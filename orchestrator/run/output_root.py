"""Where a run's folder lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.spec import LoadedSpec

UPLOADED = "runtime_resources/working_dir_files"
"""Part of the path of a working directory that `ray job submit` uploaded; Ray deletes it when it needs the room."""


@dataclass(frozen=True)
class OutputRoot:
    """The folder of the runs."""

    path: Path
    moved: str = ""
    """Why it is not the one that the spec says; empty where it is."""


def output_root(loaded: LoadedSpec, output: Path | None) -> OutputRoot:
    """The folder of the runs: `--output`, or the spec's.

    Where the spec lies in a working directory that Ray uploaded and `output` is relative to it, the run would vanish
    with that copy: it goes to `~/orchestrator-runs` of the node.
    """
    if output is not None:
        return OutputRoot(output.expanduser().absolute())
    root = loaded.output_root
    if UPLOADED not in root.as_posix():
        return OutputRoot(root)
    kept = Path.home() / "orchestrator-runs"
    return OutputRoot(
        kept,
        f"`output: {loaded.spec.output}` lies in the working directory that Ray uploaded and will delete; "
        f"the run goes to {kept} (give --output or an absolute `output` for another place)",
    )
