"""The Hugging Face hub, through its own client: commits, lists of files, files, and parts of files.

commit = resolve_commit(Repository("model", "Qwen/Qwen3-8B"))     # one request; offline: what the cache knows
sizes = list_files(commit)                                        # {"config.json": 728, ...}, once per commit
folder = fetch_files(commit, ["config.json"])                     # into the hub's cache (HF_HOME, HF_HUB_CACHE)
data = read_range(commit, "model.safetensors", 0, 8)              # bytes 0 to 7, by a range request

Tokens, endpoint, cache and offline mode are the client's own (HF_TOKEN or its token file, HF_ENDPOINT, HF_HUB_CACHE,
HF_HUB_OFFLINE). Every failure is a BaseError (for a data set a DataError) that names the remedy; no message and no log has a
token or a signed URL in it. The client is imported when it is first used, and imports no torch.
"""

from orchestrator.hub.client import fetch_files, is_offline, list_files, read_range, resolve_commit, snapshot_folder
from orchestrator.hub.errors import explained
from orchestrator.hub.repository import Commit, Repository

__all__ = [
    "Commit",
    "Repository",
    "explained",
    "fetch_files",
    "is_offline",
    "list_files",
    "read_range",
    "resolve_commit",
    "snapshot_folder",
]
