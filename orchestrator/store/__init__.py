"""Files and folders that are complete or absent, and what a process may use of its machine.

write_json(path, value); read_json(path); append_jsonl(path, event); read_jsonl(path)
with commit_folder(run.bundle) as folder: ...      # hashed into manifest.json, renamed at the end
check_folder(run.bundle)                           # IntegrityError where a file is not what the manifest says
"""

from orchestrator.store.endpoints import Unreachable, unreachable
from orchestrator.store.files import (
    append_jsonl,
    output_to,
    read_json,
    read_jsonl,
    read_record,
    sampled_sha256,
    set_aside,
    sha256_file,
    write_atomic,
    write_json,
)
from orchestrator.store.folders import (
    FileRecord,
    Manifest,
    check_artifact,
    check_folder,
    commit_folder,
    read_manifest,
    recover_folder,
    restore_folder,
    write_manifest,
)
from orchestrator.store.identity import base_identity, file_identity, versions
from orchestrator.store.machine import cache_folder, find_gpus, free_memory_bytes, num_usable_cpus, parse_gpus, thread_limit

__all__ = [
    "FileRecord",
    "Manifest",
    "Unreachable",
    "append_jsonl",
    "base_identity",
    "cache_folder",
    "check_artifact",
    "check_folder",
    "commit_folder",
    "file_identity",
    "find_gpus",
    "free_memory_bytes",
    "num_usable_cpus",
    "output_to",
    "parse_gpus",
    "read_json",
    "read_jsonl",
    "read_manifest",
    "read_record",
    "recover_folder",
    "restore_folder",
    "sampled_sha256",
    "set_aside",
    "sha256_file",
    "thread_limit",
    "unreachable",
    "versions",
    "write_atomic",
    "write_json",
    "write_manifest",
]
