"""Whose a checkpoint is: written into its manifest, and compared before a trial goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from orchestrator.plan.values import Assignment, TrialSpec
from orchestrator.values import content_hash

OF = {"spec_sha256": "spec", "base_sha256": "base"}
"""Hashes that a manifest may hold beside the trial, and what they are of."""


def ownership(trial: TrialSpec, spec_sha256: str = "", base_sha256: str = "") -> dict[str, object]:
    """What a manifest says of whose the folder is."""
    values = trial.model_dump(mode="json")
    hashes = {"spec_sha256": spec_sha256, "base_sha256": base_sha256}
    return {"trial": values, "trial_sha256": content_hash(values), **{name: value for name, value in hashes.items() if value}}


def owner_of(assignment: Assignment) -> dict[str, object]:
    """As `ownership`, of what an assignment writes."""
    return ownership(assignment.trial, assignment.spec_sha256, assignment.base_sha256)


def contradiction(about: Mapping[str, object], own: Mapping[str, object]) -> str:
    """Why a folder is not one's own, after "rung-0 is "; empty where its manifest does not contradict.

    A manifest of an older version names nothing or less, and what it leaves out is not held against it.

    Args:
        about: Of the folder's manifest.
        own: As `owner_of` says.
    """
    found, wanted = about.get("trial"), own.get("trial")
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        theirs, ours = cast("Mapping[str, Any]", found), cast("Mapping[str, Any]", wanted)
        if theirs.get("trial_id", ours.get("trial_id")) != ours.get("trial_id"):
            return f"that of trial {theirs.get('trial_id')}"
        for name in ours.keys() & theirs.keys():
            if theirs[name] != ours[name]:
                return f"of another trial with this id: {name} is {theirs[name]!r} there and {ours[name]!r} here"
    for name, what in OF.items():
        if about.get(name) and own.get(name) and about[name] != own[name]:
            return f"made for another {what}"
    return ""
