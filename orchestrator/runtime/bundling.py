"""Runs on a worker: merge, verify, read the test set once, judge, write the bundle down. No Ray in here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from orchestrator.data.sets import load_known
from orchestrator.errors import BaseError, IntegrityError
from orchestrator.run.activities import tell_bundling
from orchestrator.serve import (
    BundleInputs,
    HeldOutScores,
    commit_bundle,
    document_scores,
    require_passed,
    score_test,
    serve_commands,
    stage_bundle,
    trained_model,
    verify,
)
from orchestrator.serve.scores import PROMOTED, UNTOUCHED
from orchestrator.store import append_jsonl, base_identity, check_artifact, read_jsonl, versions
from orchestrator.transfer import Comparison, OverSeeds, between_trained, over_seeds, paired_comparison, verdict
from orchestrator.transfer.records import Control, ModelScores, TransferReport
from orchestrator.values import content_hash

READINGS = "readings.jsonl"
"""File in test/ with a line for every reading of the test set."""


def bundle_and_judge(inputs: BundleInputs, bundle: str, metric: str, max_forgetting: float, seed: int) -> TransferReport:
    """Make the bundle and judge it on the test set, loaded as any user would load it.

    Args:
        bundle: Folder of the finished bundle.
        metric: The search's metric; for a classifier any metric but the loss compares right and wrong answers.
        max_forgetting: The search's bound, nats per token. A trial that a person promoted may exceed it: the verdict says so.
        seed: Seed of the resampling for the intervals.

    Raises:
        VerificationError: the bundle does not reproduce the trained model; it stays `bundle.partial`.
        IntegrityError, BaseError: the promoted trial's adapter or delta, a set or the base is not what it was.
    """
    final = Path(bundle)
    inputs = inputs.on_this_node()
    require_whole(inputs)
    tell_bundling(final.parent, "merging the trained weights into the base model")
    staged = stage_bundle(inputs, final)
    tell_bundling(final.parent, "verifying: loading the merged model in a fresh process and comparing it with the trained one")
    figures = verify(staged.folder, trained_model(inputs, staged.plan))
    require_passed(figures, staged.folder)
    # Recorded before the reading: a crash while scoring has read the test set all the same.
    reads = count_reading(final.parent / "test", inputs.trial.trial_id)
    tell_bundling(final.parent, "scoring the bundle and its controls on the test set")
    scores = score_test(staged.folder, inputs, final.parent / "test")
    by_seed = _gain_over_seeds(inputs, scores, metric)
    comparisons = _comparisons(inputs, scores, metric, seed, by_seed)
    others: dict[Control, Comparison] = {
        name: comparison for name, comparison in comparisons.items() if name not in ("none", "scratch")
    }
    found = verdict(
        comparisons["none"],
        comparisons.get("scratch"),
        others=others,
        over_seeds=by_seed,
        failed_seeds=inputs.failed_seeds,
    )
    transfer = TransferReport(
        verdict=found.kind,
        sentence=found.finding + beyond_bound(scores.models, max_forgetting),
        trial_id=inputs.trial.trial_id,
        comparisons=tuple(comparison.record(name) for name, comparison in comparisons.items()),
        gain_over_seeds=by_seed,
        scores=scores.models,
        test_set_reads=reads,
        prompts=scores.prompts,
        bundle=bundle,
        verification=figures,
        serve_commands=serve_commands(final, inputs.base.task, inputs.base.pooling, own_code=bool(inputs.base.code_sha256)),
        versions=versions(),
    )
    # Again, since merging and scoring took a while, in which files may have changed.
    require_whole(inputs)
    commit_bundle(staged, inputs, transfer)
    return transfer


def require_whole(inputs: BundleInputs) -> None:
    """Prove that what is about to be merged, or was, is what was trained and planned.

    Raises:
        IntegrityError: the adapter or delta is not what its manifest says, or was never finished.
        BaseError: the base's files changed since the run was planned.
    """
    try:
        check_artifact(Path(inputs.artifact))
    except IntegrityError as error:
        error.remedy = (
            "nothing was bundled; restore the folder from a copy, or remove the run's sweep.json and submit the spec again: the "
            "damaged rung is set aside and trained again"
        )
        raise
    known = inputs.base_sha256
    if known and content_hash(base_identity(Path(inputs.base.folder), inputs.anatomy.weight_files)) != known:
        raise BaseError(
            "the base's files changed since the run was planned",
            where=inputs.base.folder,
            expected="the config and weights that the trials were trained on",
            remedy="restore the base and submit the spec again; nothing was bundled",
        )


def count_reading(folder: Path, trial_id: str) -> int:
    """Write down that the test set is about to be read, and say how often that has happened in this run."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / READINGS
    append_jsonl(file, {"time": time.time(), "trial_id": trial_id})
    return len(read_jsonl(file))


def beyond_bound(scores: Sequence[ModelScores], max_forgetting: float) -> str:
    """Return the addition to a verdict if the bundle forgot more than the search allowed; else an empty string."""
    lost = next(model.forgetting for model in scores if model.model == PROMOTED)
    if lost is None or lost <= max_forgetting:
        return ""
    return f"; but it forgot {lost:+.3f} nats per token, more than the bound of {max_forgetting:g}"


def _comparisons(
    inputs: BundleInputs, scores: HeldOutScores, metric: str, seed: int, by_seed: OverSeeds | None
) -> dict[Control, Comparison]:
    """Compare the bundle with every other scored model, document by document.

    If that model was trained too, the interval is as wide as the difference between two seeds.
    """
    by_answer, unit = _judged_by(inputs, metric)
    labels = load_known(inputs.test_set).labels
    own, weights = _losses(scores, PROMOTED, labels, by_answer)
    others: tuple[Control, ...] = ("none", "head", "scratch", "shuffled", "k_shot")
    ran = {model.model for model in scores.models}
    compared: dict[Control, Comparison] = {
        name: paired_comparison(own, _losses(scores, name, labels, by_answer)[0], weights, seed, unit=unit)
        for name in others
        if name in ran
    }
    trained = ("head", "scratch", "shuffled")
    return {name: between_trained(each, by_seed) if name in trained else each for name, each in compared.items()}


def _gain_over_seeds(inputs: BundleInputs, scores: HeldOutScores, metric: str) -> OverSeeds | None:
    """Mean gain over the base of the bundle, and of the same trial from every other seed; None where there is no other."""
    by_answer, unit = _judged_by(inputs, metric)
    labels = load_known(inputs.test_set).labels
    base, weights = _losses(scores, UNTOUCHED, labels, by_answer)
    seeds = {PROMOTED: inputs.trial.seed, **inputs.repeat_seeds}
    gains = [float(np.average(base - _losses(scores, name, labels, by_answer)[0], weights=weights)) for name in seeds]
    return over_seeds(list(seeds.values()), gains, unit)


def _judged_by(inputs: BundleInputs, metric: str) -> tuple[bool, str]:
    """Return (whether right and wrong answers are compared rather than losses, the unit of a difference)."""
    head = inputs.base.traits.head
    by_answer = head.supervises == "documents" and metric != "loss"
    return by_answer, "accuracy" if by_answer else head.unit


def _losses(scores: HeldOutScores, model: str, labels: np.ndarray, by_answer: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (loss, weight) of every document: mean nats per token and tokens, or 1 for a wrong class and 0 for the right one."""
    found = document_scores(scores.folder, model)
    if by_answer and found.predictions is not None:
        return (found.predictions != labels).astype(float), np.ones(len(labels))
    return found.loss_sums / found.num_tokens, found.num_tokens.astype(float)
