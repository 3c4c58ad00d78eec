"""Tokenised sets as they were written, and no others."""

from __future__ import annotations

from pathlib import Path

from orchestrator.data.sets import TokenizedSet
from orchestrator.data.summary import DataSummary
from orchestrator.errors import IntegrityError
from orchestrator.store import read_record

REMEDY = "submit the same spec again: the sets are rebuilt from the same rows; or restore the file from a copy"


def load_known(path: Path | str) -> TokenizedSet:
    """A set of a run, compared with what the summary.json beside it says; one that stands alone is read as it is.

    Raises:
        DataError: missing, or no tokenised set.
        IntegrityError: another content than was written.
    """
    path = Path(path)
    found = TokenizedSet.load(path)
    file = path.parent / "summary.json"
    if not file.exists():
        return found
    split = read_record(file, DataSummary).splits.get(path.stem)
    if split is not None and split.sha256 != found.sha256:
        raise IntegrityError(
            f"the tokenised set changed after it was written: sha256 {found.sha256}",
            where=str(path),
            expected=split.sha256,
            remedy=REMEDY,
        )
    return found
