"""What was learned of bases before: answers in the user's cache folder, by what they depend on."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import os
import secrets
from collections.abc import Generator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.anatomy.learning import Answer
from orchestrator.anatomy.values import TensorInfo
from orchestrator.spec.tasks import HeadKind
from orchestrator.values import content_hash

NOISE = ("_name_or_path", "transformers_version", "auto_map", "id2label", "label2id", "task_specific_params")
"""Keys of config.json that change nothing of a class."""
LIBRARIES = ("transformers", "torch")
CODE = ("anatomy", "probe", "train/model")


def cache_folder() -> Path:
    """Return the folder of what was learned, which may not exist yet."""
    own = os.environ.get("ORCHESTRATOR_CACHE")
    return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orchestrator") / "anatomy"


def key_of(values: Mapping[str, Any], stored: Mapping[str, TensorInfo] | None, head: HeadKind, own_code: str = "") -> str:
    """Return the hash of all that an answer depends on: config, stored tensors, task, the base's own code that may run (by its
    hash), and the code that finds it."""
    config = {key: value for key, value in values.items() if key not in NOISE}
    tensors = None if stored is None else [tensor.model_dump(exclude_defaults=True) for tensor in stored.values()]
    return content_hash([head, config, tensors, own_code, _code_hash(), [metadata.version(library) for library in LIBRARIES]])


@cache
def _code_hash() -> str:
    """Return the hash of the code by which answers are found, so that those of another version of this package are not used."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(path for folder in CODE for path in (package / folder).glob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def recall(key: str) -> Answer | None:
    """Return the answer of before, or None if there is none that can be read."""
    try:
        return Answer.model_validate_json(gzip.decompress(_path(key).read_bytes()))
    except (OSError, EOFError, RuntimeError, ValidationError, ValueError):
        return None


def remember(key: str, answer: Answer) -> None:
    """Keep an answer. Without a folder that can be written to, the class is built again the next time."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _path(key)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        temporary.write_bytes(gzip.compress(answer.model_dump_json(exclude_defaults=True).encode(), mtime=0))
        temporary.replace(path)


@contextlib.contextmanager
def locked(key: str) -> Generator[None]:
    """Hold a lock of this answer, so that processes that ask at the same time build the class once. Without a folder there is
    none."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"{key}.lock").open("w")
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        yield
        return
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    with contextlib.suppress(OSError):
        (folder / f"{key}.lock").unlink()


def _path(key: str) -> Path:
    return cache_folder() / f"{key}.json.gz"
