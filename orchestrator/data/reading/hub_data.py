"""Data sets of the hub, by the `datasets` library: `hub:org/name@revision:config/split` as the Arrow files of its cache.

The library reads whatever the hub's data sets consist of, and writes Arrow files that are read as any other; so rows are checked,
counted and named as those of local files. Which files belong to which commit is kept in our own cache: a second time nothing is
requested but the commit of a branch, and the library is not imported.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from orchestrator.errors import DataError
from orchestrator.hub import Commit, Repository, explained, resolve_commit
from orchestrator.hub.client import CACHE_REMEDY, own_folder, require_access
from orchestrator.hub.errors import hub_error, is_told
from orchestrator.spec.hub_ids import DATA_SHAPE, HubData, parse_hub_data
from orchestrator.store import output_to, read_json, write_json

SplitFiles = dict[str, list[Path]]
"""Files by the data set's own name of a split."""


def find_hub_data(path: str) -> tuple[SplitFiles, str]:
    """Return the files of a data set of the hub by split, and a sentence about its commit; they are fetched where necessary.

    Raises:
        DataError: there is no such data set, config or split; it cannot be fetched, or the library cannot read it.
    """
    wanted = parse_hub_data(path)
    if wanted is None:
        raise DataError(f"not a data set of the hub: {path!r}", expected=DATA_SHAPE, remedy="fix the path")
    commit = resolve_commit(Repository("dataset", wanted.id, wanted.revision))
    config, split = (quote(part, safe="") for part in (wanted.config, wanted.split))
    record = own_folder(commit) / f"arrow-{config}:{split}.json"
    files = _recorded(record)
    if files is None:
        files = _load(wanted, commit)
        with output_to(record, remedy=CACHE_REMEDY):
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, {split: [str(file) for file in paths] for split, paths in files.items()})
    return files, f"{path} is read at commit {commit.sha[:12]} of its repository"


def _recorded(record: Path) -> SplitFiles | None:
    """Return the files that an earlier call found, if all of them are still there."""
    if not record.is_file():
        return None
    files = {split: [Path(path) for path in paths] for split, paths in read_json(record).items()}
    return files if all(path.is_file() for paths in files.values() for path in paths) else None


def _load(wanted: HubData, commit: Commit) -> SplitFiles:
    """Let the library fetch and convert the data set.

    Raises:
        DataError: it cannot.
    """
    import datasets
    from datasets.exceptions import DatasetBuildError, DatasetNotFoundError
    from datasets.utils.logging import set_verbosity_error

    set_verbosity_error()
    datasets.disable_progress_bars()
    repository = commit.repository
    with explained(repository):
        try:
            found: Any = datasets.load_dataset(
                wanted.id, name=wanted.config or None, split=wanted.split or None, revision=commit.sha
            )
        except DatasetNotFoundError:
            # The library's answer to whatever the hub refuses; the hub itself says which.
            require_access(repository)
            raise
        except (ValueError, RuntimeError, FileNotFoundError, DatasetBuildError) as error:
            if is_told(error):
                raise
            raise _unreadable(wanted, commit, error) from None
    splits = found if isinstance(found, dict) else {wanted.split: found}
    files = {str(name): [Path(entry["filename"]) for entry in part.cache_files] for name, part in splits.items()}
    # Offline, the library takes the newest commit in its cache, whichever was asked for.
    if any(commit.sha not in path.parts for paths in files.values() for path in paths):
        raise hub_error(
            repository,
            f"the cache of `datasets` has another commit than {commit.sha[:12]}, and the hub cannot be reached",
            remedy="load it once where the hub can be reached, with the same HF_HOME; or give the commit that you have after @",
        )
    return files


def _unreadable(wanted: HubData, commit: Commit, error: Exception) -> Exception:
    """Return the error for a data set that the library refuses: a config or a split that is not there, or its contents."""
    import datasets

    if isinstance(error, ValueError):
        configs = datasets.get_dataset_config_names(wanted.id, revision=commit.sha)
        if (wanted.config or "default") not in configs and (wanted.config or len(configs) > 1):
            what = f"no config {wanted.config!r}" if wanted.config else f"{len(configs)} configs, and none is named"
            return _choose(wanted, commit, what, configs, "{}")
        splits = datasets.get_dataset_split_names(wanted.id, wanted.config or None, revision=commit.sha)
        if wanted.split and wanted.split not in splits:
            return _choose(wanted, commit, f"no split {wanted.split!r}", splits, wanted.config + "/{}")
    cause = error.__cause__ or error
    said = re.sub(r"https?://\S+", "(a URL)", " ".join(str(cause).split()))[:300]
    return hub_error(
        commit.repository,
        f"the `datasets` library cannot read it: {type(cause).__name__}: {said}",
        remedy="fetch it with `hf download`, and give the files that you want as a path",
    )


def _choose(wanted: HubData, commit: Commit, what: str, names: list[str], shape: str) -> Exception:
    revision = f"@{wanted.revision}" if wanted.revision else ""
    return hub_error(
        commit.repository,
        f"the data set has {what}",
        expected=f"one of {', '.join(names[:10])}" + (f" and {len(names) - 10} more" if len(names) > 10 else ""),
        remedy=f"write hub:{wanted.id}{revision}:{shape.format(names[0] if names else '...')}, for example",
    )
