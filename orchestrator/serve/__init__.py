"""Build, verify, score and query serving bundles. Does not import Ray.

    staged = stage_bundle(inputs, run.bundle)                              # merge; everything lies in bundle.partial
    figures = verify(staged.folder, trained_model(inputs, staged.plan))    # law 5, in a fresh process
    require_passed(figures, staged.folder)                                 # VerificationError; the folder stays .partial
    scores = score_test(staged.folder, inputs, run.path / "test")          # the test set, once
    document_scores(scores.folder, "promoted").loss_sums                   # for the paired comparisons
    commit_bundle(staged, inputs, transfer)                                # card, spec, manifest, rename

`verify_bundle(folder)` repeats the check on a finished bundle, `merge(plan, folder)` is the streaming merge alone.
What is imported here is imported on first use, for torch and transformers take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.serve.bundle import BundleRecord, StagedBundle, commit_bundle, serve_commands, stage_bundle, trained_model
    from orchestrator.serve.bundle_check import read_record, verify_bundle
    from orchestrator.serve.bundle_inputs import BundleInputs
    from orchestrator.serve.merging import merge
    from orchestrator.serve.scores import HeldOutScores, document_scores, score_test
    from orchestrator.serve.verification import TrainedModel, require_passed, verify

_HOMES = {
    "BundleInputs": "bundle_inputs",
    "BundleRecord": "bundle",
    "HeldOutScores": "scores",
    "StagedBundle": "bundle",
    "TrainedModel": "verification",
    "commit_bundle": "bundle",
    "document_scores": "scores",
    "merge": "merging",
    "read_record": "bundle_check",
    "require_passed": "verification",
    "score_test": "scores",
    "serve_commands": "bundle",
    "stage_bundle": "bundle",
    "trained_model": "bundle",
    "verify": "verification",
    "verify_bundle": "bundle_check",
}
__all__ = [
    "BundleInputs",
    "BundleRecord",
    "HeldOutScores",
    "StagedBundle",
    "TrainedModel",
    "commit_bundle",
    "document_scores",
    "merge",
    "read_record",
    "require_passed",
    "score_test",
    "serve_commands",
    "stage_bundle",
    "trained_model",
    "verify",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
