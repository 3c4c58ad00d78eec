"""Requests to the hub, all by its own client (huggingface_hub)."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.hub.errors import explained, hub_error, not_cached
from orchestrator.hub.repository import Commit, Repository
from orchestrator.store import cache_folder, output_to, read_json, write_json
from orchestrator.units import format_bytes

ATTEMPTS = 3
"""How often a part of a file is requested when the connection is cut."""
CACHE_REMEDY = "set ORCHESTRATOR_CACHE to a writable folder with free space"


class _WithoutQueries(logging.Filter):
    """Remove the query of every URL in the client's log lines: a redirected download has its signature there."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", record.getMessage()), ()
        return True


@cache
def _client() -> Any:
    """Import the client, once, without its telemetry, and with logs that have no progress bars and no signatures in them."""
    import huggingface_hub
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http, disable_progress_bars

    constants.HF_HUB_DISABLE_TELEMETRY = True
    disable_progress_bars()
    for name in (file_download.__name__, _http.__name__, "httpx", "httpx2"):
        logging.getLogger(name).addFilter(_WithoutQueries())
    return huggingface_hub


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids requests."""
    return bool(_client().constants.is_offline_mode())


def resolve_commit(repository: Repository) -> Commit:
    """Return the commit of the revision. A full commit needs no request; where the hub cannot be reached, the cache answers.

    Raises:
        BaseError, DataError: there is no such repository or revision, it may not be read, or it is neither reachable nor cached.
    """
    with explained(repository):
        found = _client().HfApi().resolve_revision(repository.id, repo_type=repository.kind, revision=repository.revision or None)
    return Commit(repository, found.resolved)


def require_access(repository: Repository) -> None:
    """Ask the hub whether the files of a repository may be read.

    Raises:
        BaseError, DataError: they may not.
    """
    with explained(repository):
        _client().HfApi().auth_check(repository.id, repo_type=repository.kind)


def snapshot_folder(commit: Commit) -> Path:
    """Return where the hub's cache has, or would have, the files of the commit on this machine."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=commit.repository.id, repo_type=commit.repository.kind)
    return Path(constants.HF_HUB_CACHE).expanduser().absolute() / name / "snapshots" / commit.sha


def own_folder(commit: Commit) -> Path:
    """Return the folder of our own cache for what was read of the commit."""
    return cache_folder() / "hub" / f"{commit.repository.kind}s--{commit.repository.id.replace('/', '--')}" / commit.sha


def list_files(commit: Commit) -> dict[str, int]:
    """Return the size in bytes of every file by path. Read once per commit; later the cache answers.

    Raises:
        BaseError, DataError: as `resolve_commit`.
    """
    known = own_folder(commit) / "files.json"
    if known.is_file():
        return {str(name): int(size) for name, size in read_json(known).items()}
    repository = commit.repository
    with explained(repository):
        entries = _client().HfApi().list_repo_tree(repository.id, repo_type=repository.kind, revision=commit.sha, recursive=True)
        sizes = {entry.path: int(entry.size) for entry in entries if hasattr(entry, "size")}
    with output_to(known, remedy=CACHE_REMEDY):
        known.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, sizes)
    return sizes


def fetch_files(commit: Commit, names: Sequence[str]) -> Path:
    """Fetch files of the commit into the hub's cache, as far as they are not there, and return the snapshot's folder.

    A connection that is cut is resumed at the byte where it broke; after the process itself died, complete files are kept.
    Several processes may fetch the same files: the client locks each.

    Raises:
        BaseError, DataError: a file cannot be fetched, or there is no room for it.
    """
    folder, repository = snapshot_folder(commit), commit.repository
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and is_offline():
        raise not_cached(repository, "HF_HUB_OFFLINE is set", f"{len(missing)} of {len(names)} files ({missing[0]}) are")
    if missing:
        sizes = list_files(commit)
        _require_room(commit, sum(sizes[name] for name in missing))
        with explained(repository):
            _client().snapshot_download(
                repository.id,
                repo_type=repository.kind,
                revision=commit.sha,
                # The client matches with fnmatch.
                allow_patterns=[re.sub(r"([*?\[])", r"[\1]", name) for name in missing],
            )
    return folder


def _require_room(commit: Commit, num_bytes: int) -> None:
    place = next(parent for parent in snapshot_folder(commit).parents if parent.exists())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise hub_error(
            commit.repository,
            f"{format_bytes(num_bytes)} to fetch, and {format_bytes(free)} free in the hub's cache ({place})",
            remedy="free space there, or set HF_HOME or HF_HUB_CACHE to a folder with more",
        )


def read_range(commit: Commit, name: str, begin: int, end: int) -> bytes:
    """Return the bytes [begin, end) of a file, fewer if the file is shorter, without fetching the rest.

    Raises:
        BaseError, DataError: as `fetch_files`.
    """
    with explained(commit.repository):
        for attempt in range(ATTEMPTS):
            try:
                return _request_range(commit, name, begin, end)
            except Exception as error:
                if "TransportError" not in {kind.__name__ for kind in type(error).__mro__} or attempt + 1 == ATTEMPTS:
                    raise
    raise AssertionError("unreachable")


def _request_range(commit: Commit, name: str, begin: int, end: int) -> bytes:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(commit.repository.id, name, repo_type=commit.repository.kind, revision=commit.sha)
    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    # Its own retries of exceptions would begin a stream of which a part has been read.
    with http_stream_backoff("GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()) as response:
        hf_raise_for_status(response)
        # A server that ignores ranges sends the file from its beginning.
        skipped = begin if response.status_code == 200 else 0
        found = bytearray()
        for chunk in response.iter_bytes(1 << 16):
            found += chunk
            if len(found) >= skipped + end - begin:
                break
    return bytes(found[skipped : skipped + end - begin])
