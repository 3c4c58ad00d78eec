"""Verify a finished bundle again: its hashes, then the comparison with the trained model."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from orchestrator.anatomy import read_anatomy, with_pooling
from orchestrator.bases import located
from orchestrator.bases.own_code import require_consent, use_own_code
from orchestrator.errors import BaseError, IntegrityError, UsageError, VerificationError
from orchestrator.serve.bundle import BaseRecord, BundleRecord, base_weights_sha256
from orchestrator.serve.verification import TrainedModel, require_passed, verify
from orchestrator.store import Manifest, check_folder
from orchestrator.transfer.records import VerificationFigures


def verify_bundle(
    bundle: Path, *, base: Path | None = None, held_out: Path | None = None, device: str | None = None
) -> VerificationFigures:
    """Check every file's hash, then that the bundle still reproduces the trained model.

    Args:
        bundle: A finished bundle.
        base: The base's folder, where it is no longer where the manifest says.
        held_out: The tokenised documents to compare on, likewise.

    Raises:
        UsageError: not a bundle, or base or documents are not there; or a bundle with code that the user does not let run.
        VerificationError: a file changed, the base is another, or the distributions differ.
    """
    record = read_record(bundle)
    folder = _there(bundle, record.base.path, base or hub_copy(record.base), "the base", where_to_get(record.base, "--base"))
    documents = _there(bundle, record.held_out, held_out, "the held-out documents", "give the path with --held-out")
    require_consent(bundle, record.base.load.code_sha256)
    try:
        use_own_code(folder, record.base.load.code_sha256)
        anatomy = read_anatomy(folder, need_weights=True, task=record.base.load.task)
        anatomy = with_pooling(anatomy, record.base.load.pooling)
    except BaseError as error:
        raise VerificationError(f"the base cannot be read: {error.what}", where=str(folder), remedy=error.remedy) from error
    found = (anatomy.config_sha256, base_weights_sha256(anatomy.weight_files, folder, {}))
    if found != (record.base.config_sha256, record.base.weights_sha256):
        raise VerificationError(
            "the folder holds a different base than the one that was trained",
            where=str(folder),
            expected=f"weights with the hash {record.base.weights_sha256}",
            remedy="give the base's folder with --base",
        )
    trained = TrainedModel(
        base=record.base.load.model_copy(update={"folder": str(folder)}),
        anatomy=anatomy,
        artifact=str(bundle),
        held_dtype=record.held_dtype,
        merged_into=record.merged_into,
        documents=str(documents),
    )
    figures = verify(bundle, trained, device=device)
    require_passed(figures, bundle)
    return figures


def read_record(bundle: Path) -> BundleRecord:
    """Return the bundle's record, after comparing every file with the manifest.

    Raises:
        UsageError: not a bundle.
        VerificationError: a file is not what the manifest says.
    """
    manifest = _checked(bundle)
    try:
        return BundleRecord.model_validate(manifest.about)
    except ValidationError:
        raise UsageError(
            "the folder's manifest is not a bundle's",
            where=str(bundle),
            expected="a bundle/ folder of a run",
            remedy="give the bundle's folder",
        ) from None


def _checked(bundle: Path) -> Manifest:
    if not (bundle / "manifest.json").is_file():
        unfinished = bundle.name.endswith(".partial")
        raise UsageError(
            "the bundle is incomplete" if unfinished else "not a bundle: there is no manifest.json",
            where=str(bundle),
            expected="a bundle/ folder of a run",
            remedy="submit the run again to finish it" if unfinished else "give the bundle's folder",
        )
    try:
        return check_folder(bundle)
    except IntegrityError as error:
        raise VerificationError(
            error.what,
            where=error.where,
            expected=error.expected or "what manifest.json says",
            remedy="do not serve it; rebuild the bundle with `orchestrator merge`",
        ) from error


def hub_copy(base: BaseRecord) -> Path | None:
    """Return the copy of a base from the hub in this machine's cache; None if it is not there, or no base from the hub."""
    return located(base.load).cached if base.load.hub_id else None


def where_to_get(base: BaseRecord, option: str) -> str:
    """Return what to do about a base that is not where the bundle says."""
    fetch = f", or run `hf download {base.load.hub_id} --revision {base.load.revision}`" if base.load.hub_id else ""
    return f"give its folder with {option}{fetch}"


def _there(bundle: Path, recorded: str, given: Path | None, what: str, remedy: str) -> Path:
    path = given.resolve() if given is not None else Path(os.path.normpath(bundle.resolve() / recorded))
    if not path.exists():
        raise UsageError(
            f"{what} cannot be found",
            where=str(path),
            expected=f"{recorded} relative to the bundle, as in its manifest",
            remedy=remedy,
        )
    return path
