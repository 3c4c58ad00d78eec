"""Folders that are complete or absent, each with a manifest of its files' hashes."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from orchestrator.errors import IntegrityError
from orchestrator.store.files import (
    PARTIAL,
    fsync_file,
    fsync_folder,
    partial_path,
    read_json,
    sha256_file,
    usual_mode,
    write_json,
)
from orchestrator.values import Value
from orchestrator.work.artifact import ADAPTER, DELTA

MANIFEST = "manifest.json"
REMEDY = "restore the folder from a copy, or remove it to have it rebuilt"


class FileRecord(Value):
    """One file of a folder. The path is relative, with forward slashes."""

    path: str
    num_bytes: int
    sha256: str


class Manifest(Value):
    """Files of a folder with their hashes; `about` belongs to the writer."""

    files: tuple[FileRecord, ...]
    about: dict[str, object] = {}

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


@contextmanager
def commit_folder(
    final: Path, *, known_sha256: Mapping[str, str] | None = None, about: dict[str, object] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder beside `final`, which takes its place if the block ends without an error.

    Every file is synced and hashed into manifest.json first. An existing folder at `final` is moved aside and
    removed only after the new one has its name; `recover_folder` finishes what a crash in between left.

    Args:
        final: The final path of the folder.
        known_sha256: Hashes that the writer computed while writing, by relative path: those files are not read again.
        about: Goes into the manifest.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(final)
    temporary = partial_path(final)
    temporary.mkdir()
    try:
        yield temporary
        # The manifest is written last: a folder without one is incomplete.
        write_manifest(temporary, known_sha256=known_sha256, about=about)
        _put_in_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        restore_folder(final)
        raise
    _remove_replaced(final)


def restore_folder(final: Path) -> None:
    """Put back the folder that `commit_folder` had moved aside when it was killed before the rename.

    Every reader may call it, also while a writer works: that one then moves the folder aside again.
    """
    replaced = _aside(final)
    if not final.exists() and replaced.exists():
        with contextlib.suppress(OSError):
            replaced.rename(final)


def recover_folder(final: Path) -> None:
    """Finish a replacement of folders that a crash interrupted, and remove incomplete ones. Not safe while another process
    writes there."""
    restore_folder(final)
    _remove_replaced(final)
    for partial in final.parent.glob(f".{glob.escape(final.name)}{PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(temporary: Path, final: Path) -> None:
    while True:
        if final.exists():
            _remove_replaced(final)
            final.rename(_aside(final))
        try:
            temporary.rename(final)
        except OSError as error:
            # A reader may have restored the old folder between the two renames: move it aside again.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue
        fsync_folder(final.parent)
        return


def _remove_replaced(final: Path) -> None:
    """Remove the folder that `final` replaced; renamed first, so that a half-removed folder is never restored."""
    replaced = _aside(final)
    if final.exists() and replaced.exists():
        # Renamed first: a crash while deleting leaves a partial name, which is never restored.
        doomed = partial_path(final)
        replaced.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def write_manifest(
    folder: Path, *, known_sha256: Mapping[str, str] | None = None, about: dict[str, object] | None = None
) -> Manifest:
    """Sync and hash every file of `folder` into its manifest.json, and give all of them the mode of a new file."""
    known = known_sha256 or {}
    mode = usual_mode(folder)
    records: list[FileRecord] = []
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if path.lstat().st_nlink == 1:  # safetensors writes 0600; a hard-linked file belongs to another folder too
            with contextlib.suppress(OSError):
                path.chmod(mode, follow_symlinks=False)
        fsync_file(path)
        records.append(FileRecord(path=name, num_bytes=path.stat().st_size, sha256=known.get(name) or sha256_file(path)))
    # File names are durable only once their folder is synced.
    for inner, _, _ in os.walk(folder):
        fsync_folder(Path(inner))
    manifest = Manifest(files=tuple(records), about=about or {})
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest without checking the files.

    Raises:
        IntegrityError: missing or damaged.
    """
    restore_folder(folder)
    try:
        return Manifest.model_validate(read_json(folder / MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        what = "no manifest.json: the folder is incomplete" if folder.is_dir() else "no such folder"
        raise IntegrityError(what, where=str(folder), remedy=REMEDY) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise IntegrityError(f"damaged manifest: {first['msg']}", where=str(folder / MANIFEST), remedy=REMEDY) from None


def check_folder(folder: Path, *, only: Sequence[str] = ("",)) -> Manifest:
    """Read the manifest and compare every file with it.

    Args:
        only: Compare only files whose paths begin with one of these.

    Raises:
        IntegrityError: a file is missing, truncated, changed, or not listed.
    """
    manifest, wanted = read_manifest(folder), tuple(only)
    found = {path.relative_to(folder).as_posix() for path in _files(folder)}
    listed = {record.path for record in manifest.files}
    for name in sorted(name for name in found - listed if name.startswith(wanted)):
        raise IntegrityError("a file that the manifest does not list", where=str(folder / name), remedy="move it elsewhere")
    for record in (record for record in manifest.files if record.path.startswith(wanted)):
        path = folder / record.path
        if record.path not in found:
            raise IntegrityError("a file of the manifest is missing", where=str(path), remedy=REMEDY)
        # Sizes first: they find truncation without reading the file.
        size = path.stat().st_size
        if size != record.num_bytes:
            expected = f"{record.num_bytes} bytes, as its manifest says"
            raise IntegrityError(f"{size} bytes", where=str(path), expected=expected, remedy=REMEDY)
        if (found_sha256 := sha256_file(path)) != record.sha256:
            what = f"the content changed after it was written: sha256 {found_sha256}"
            raise IntegrityError(what, where=str(path), expected=record.sha256, remedy=REMEDY)
    return manifest


def check_artifact(folder: Path) -> Manifest:
    """Compare the adapter or delta in a rung, checkpoint or bundle with the folder's manifest, which is returned.

    Raises:
        IntegrityError: a file is not what was written, or the folder is incomplete.
    """
    return check_folder(folder, only=(f"{ADAPTER}/", f"{DELTA}/"))


def _files(folder: Path) -> list[Path]:
    found = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    # Python's own cache of a bundle's classify.py is not content.
    return sorted(path for path in found if path != folder / MANIFEST and path.parent.name != "__pycache__")


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")
