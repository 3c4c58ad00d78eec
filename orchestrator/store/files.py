"""Atomic files: temporary name, flush, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from orchestrator.errors import IntegrityError, OrchestratorError, UsageError
from orchestrator.values import record_json

CHUNK_BYTES = 4 * 1024**2
NUM_SAMPLES, SAMPLE_BYTES = 64, 256 * 1024
"""Pieces of a large file that `sampled_sha256` reads."""
PARTIAL = ".partial-"
"""Marks the names of files and folders that are being written, or whose writer was killed."""


RECORD_REMEDY = "submit the same spec again: damaged files are set aside and rebuilt; or restore the file from a copy"
Record = TypeVar("Record", bound=BaseModel)


FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""Error numbers for a full disk, an exceeded quota, or a file at its size limit."""
CLOSED = frozenset(
    {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT}
)
"""Error numbers for a place that cannot be written to."""


@contextmanager
def output_to(path: Path, *, remedy: str, only_full: bool = False) -> Iterator[None]:
    """Turn an operating system error into a message that the output cannot be written.

    Args:
        only_full: Also input is read while the block runs, so that only a full disk is surely the output's.

    Raises:
        UsageError: in place of the operating system's error.
    """
    try:
        yield
    except OrchestratorError:
        raise
    except OSError as error:
        if error.errno not in (FULL if only_full else FULL | CLOSED):
            raise
        # Users know the final name, not the temporary one.
        where = path if PARTIAL in str(error.filename) else error.filename or path
        raise UsageError(what_failed(error), where=str(where), remedy=remedy) from error


def what_failed(error: OSError) -> str:
    return f"cannot be written: {error.strerror or error}"


def partial_path(final: Path) -> Path:
    """Return a new temporary name in the folder of `final`, so that a rename puts it in place."""
    return final.with_name(f".{final.name}{PARTIAL}{secrets.token_hex(4)}")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` with `content`; a reader sees the old file or the new one."""
    # Text from the data may contain lone surrogates, which UTF-8 cannot encode.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temporary = partial_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    # KeyboardInterrupt included: no temporary file stays behind.
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: BaseModel | dict[str, Any] | list[Any]) -> None:
    """Write a value as indented JSON, atomically: strict JSON, NaN and infinities as strings."""
    write_atomic(path, record_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        IntegrityError: the file is not JSON.
        FileNotFoundError: it does not exist.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"not valid JSON: {error}", where=str(path), remedy=RECORD_REMEDY) from None
    except RecursionError:
        raise IntegrityError("JSON nested too deeply", where=str(path), remedy=RECORD_REMEDY) from None


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read a record that this program wrote.

    Raises:
        IntegrityError: the file is no JSON, or says something else than such a value.
        FileNotFoundError: it does not exist.
    """
    found = read_json(path)
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = f"no {kind.__name__}: {place}: {first['msg']}" if place else f"no {kind.__name__}: {first['msg']}"
        raise IntegrityError(what, where=str(path), remedy=RECORD_REMEDY) from None
    except RecursionError:
        raise IntegrityError("JSON nested too deeply", where=str(path), remedy=RECORD_REMEDY) from None


def set_aside(path: Path) -> Path:
    """Rename a damaged or foreign file or folder beside the original and return the new name: `result-0.json.damaged-1`."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    fsync_folder(path.parent)
    return aside


def append_jsonl(path: Path, value: BaseModel | dict[str, Any]) -> None:
    """Append one line in one write, after repairing a truncated last line of a killed writer."""
    line = record_json(value).encode() + b"\n"
    with path.open("ab+") as file:
        # A killed writer left half a line: it stays a line of its own, which readers skip, instead of damaging this one.
        if file.tell() and not _ends_with_newline(file):
            line = b"\n" + line
        file.write(line)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines; a line truncated by a killed writer is left out. A missing file has no lines.

    Lines end only at line feeds: JSON strings may hold the other separators of Unicode.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    # str.splitlines would also split at U+2028, which JSON strings may contain.
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sampled_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's size and content; of a large file only evenly spaced samples, including first and last.

    Distinguishes two sets of weights of one shape in a second, where hashing all of them takes minutes: training changes
    nearly every byte. It does not find a single changed byte; `sha256_file` does.
    """
    size = path.stat().st_size
    if size <= NUM_SAMPLES * CHUNK_BYTES:
        return sha256_file(path)
    digest = hashlib.sha256(f"{size}:".encode())
    with path.open("rb") as file:
        for number in range(NUM_SAMPLES):
            # Evenly spread, with the first and the last bytes included.
            file.seek(number * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def usual_mode(folder: Path) -> int:
    """Return the mode of a new file of this process in `folder`. A file is created to find out, since reading the umask sets
    it."""
    # A file in the folder itself, since default ACLs may set its mode too.
    probe = partial_path(folder / "mode")
    try:
        with probe.open("xb") as file:
            return stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    finally:
        probe.unlink(missing_ok=True)


def fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
