"""Choose the promoted trial, compute the Pareto front of target and retention, and recommend what to try next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from orchestrator.spec.adapters import ADAPTER_KINDS
from orchestrator.spec.anchors import ANCHORS
from orchestrator.transfer.comparison import Comparison
from orchestrator.transfer.records import TrialRecord
from orchestrator.values import Value

PROMOTABLE_CONTROLS = (None, "head")
"""Controls that may win: a `head` winner is a success, since feature extraction was enough."""
EDGE_SHARE = 0.15
"""Share of the log range of learning rates tried; a best rate closer to an end than this counts as being at the edge."""


class Promotion(Value):
    """Promoted trial, or None, with the reason and what to try next, in order."""

    trial_id: str | None
    reason: str
    advice: tuple[str, ...] = ()


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (target, forgetting), lower is better in both, that no other point dominates; by
    ascending target.

    A point is beaten by one that is no worse in both and better in one; equal points stay together. A point with
    NaN is never on the front.
    """
    finite = [index for index, point in enumerate(points) if not any(math.isnan(value) for value in point)]

    def beaten(index: int) -> bool:
        x, y = points[index]
        return any(points[o][0] <= x and points[o][1] <= y and points[o] != points[index] for o in finite)

    return sorted((index for index in finite if not beaten(index)), key=lambda index: points[index])


def front_of(candidates: Sequence[TrialRecord], *, higher_is_better: bool) -> tuple[str, ...]:
    """Return the ids of the trials on the Pareto front of target and retention, among those that could be promoted."""
    measured = [
        (trial.trial_id, -trial.metric if higher_is_better else trial.metric, trial.forgetting or 0.0)
        for trial in candidates
        if trial.control in PROMOTABLE_CONTROLS and trial.state != "failed" and trial.metric is not None
    ]
    return tuple(measured[index][0] for index in pareto_front([(target, forgetting) for _, target, forgetting in measured]))


def promote(
    candidates: Sequence[TrialRecord],
    base: TrialRecord | None,
    max_forgetting: float,
    *,
    higher_is_better: bool = False,
    metric: str = "loss",
    comparisons: Mapping[str, Comparison] | None = None,
) -> Promotion:
    """Promote the best-scored trial that is not worse than the base and within `max_forgetting`; the control `head` may win.

    Args:
        candidates: Trials and controls, any state; failed ones and other controls than `head` are passed over.
        base: The control `none`; without it every trial counts as not negative.
        max_forgetting: Bound on the rise of the retention loss, nats per token.
        comparisons: Against the base on the eval set, by trial id. A trial is negative when its whole interval is
            below zero; where there is no comparison, or too few examples for an interval, when its metric is worse than
            the base's.
    """
    scored = sorted((t for t in candidates if _measured(t)), key=lambda trial: (_score(trial), trial.number))
    known = comparisons or {}
    better = [t for t in scored if not _negative(t, base, higher_is_better, known.get(t.trial_id))]
    kept = [trial for trial in better if (trial.forgetting or 0.0) <= max_forgetting]
    if kept:
        best = kept[0]
        # A better-scored trial was skipped: say why, or the promotion looks wrong.
        passed = "" if best is scored[0] else f"; {_passed_over(scored, best, better, max_forgetting)}"
        return Promotion(trial_id=best.trial_id, reason=f"{best.label}: {_figures(best, base, metric)}{passed}")
    if not scored:
        return Promotion(trial_id=None, reason="no trial was evaluated", advice=_advice_on_failures(candidates))
    if not better:
        reason = f"no trial is as good as the base model; the best, {scored[0].label}: {_figures(scored[0], base, metric)}"
        advice = _advice_on_negative(scored, base, metric, higher_is_better)
        return Promotion(trial_id=None, reason=reason, advice=advice)
    closest = min(better, key=lambda trial: trial.forgetting or 0.0)
    reason = (
        f"every trial that improves on the base forgets more than {max_forgetting:g}; "
        f"the least, {closest.label}: {_figures(closest, base, metric)}"
    )
    return Promotion(trial_id=None, reason=reason, advice=_advice_on_forgetting(better, closest, max_forgetting))


def _measured(trial: TrialRecord) -> bool:
    if trial.control not in PROMOTABLE_CONTROLS or trial.state not in ("finished", "stopped"):
        return False
    return trial.metric is not None and math.isfinite(trial.metric) and not math.isnan(trial.forgetting or 0.0)


def _score(trial: TrialRecord) -> float:
    return trial.score if trial.score is not None else math.inf


def _negative(trial: TrialRecord, base: TrialRecord | None, higher_is_better: bool, comparison: Comparison | None) -> bool:
    # Only a trial that is clearly worse is excluded: an interval that includes zero may be a gain that eval is too small to show.
    if comparison is not None and math.isfinite(comparison.high):
        return comparison.high < 0
    if base is None or base.metric is None or trial.metric is None:
        return False
    return trial.metric < base.metric if higher_is_better else trial.metric > base.metric


def _figures(trial: TrialRecord, base: TrialRecord | None, metric: str) -> str:
    """Return `loss 1.83 against the base's 3.92, retention +0.04`."""
    against = f" against the base's {base.metric:.4g}" if base is not None and base.metric is not None else ""
    kept = f", retention {trial.forgetting:+.3f}" if trial.forgetting is not None else ""
    return f"{metric} {trial.metric:.4g}{against}{kept}"


def _passed_over(scored: Sequence[TrialRecord], best: TrialRecord, better: Sequence[TrialRecord], max_forgetting: float) -> str:
    ahead = scored[: scored.index(best)]
    forgot = sum(trial in better for trial in ahead)
    parts = [f"{forgot} forgot more than {max_forgetting:g}"] if forgot else []
    parts += [f"{len(ahead) - forgot} worse than the base"] if forgot < len(ahead) else []
    return f"scored better but not promoted: {', '.join(parts)}"


def _advice_on_failures(candidates: Sequence[TrialRecord]) -> tuple[str, ...]:
    failed = [trial for trial in candidates if trial.state == "failed"]
    if not failed:
        return ("submit the same spec again to continue: no trial has finished yet",)
    reason, count = Counter(trial.reason for trial in failed).most_common(1)[0]
    lowest = min(trial.learning_rate for trial in failed)
    return (
        f"fix why {count} of {len(failed)} trials failed: {reason or 'no reason given'}",
        f"lower search.learning_rate: the lowest rate that failed is {lowest:.1e}",
        "look at the training rows: `orchestrator data SPEC`",
    )


def _advice_on_negative(
    scored: Sequence[TrialRecord], base: TrialRecord | None, metric: str, higher_is_better: bool
) -> tuple[str, ...]:
    best = scored[0]
    gain, moved = _last_improvement(best, higher_is_better)
    edge = _advice_on_edge(best, scored, may_raise=gain >= 0)
    advice = [edge] if edge else []
    if gain > 0 and best.judged is best.last:
        advice.append(f"raise train.epochs: {best.label} was still improving, {moved}")
    if gain < 0:
        advice.append(f"lower search.learning_rate or train.epochs, or train on more rows: {best.label} got worse, {moved}")
    advice.append("look at the training rows, and at which tokens are supervised: `orchestrator data SPEC`")
    deepest = Counter(trial.layers for trial in scored).most_common()
    advice.append(f"try other layers: {', '.join(layers for layers, _ in deepest)} were tried; fewer blocks change less")
    if base is not None and base.metric is not None:
        advice.append(f"serve the base model: its {metric} of {base.metric:.4g} is the best measured")
    return tuple(advice)


def _advice_on_forgetting(better: Sequence[TrialRecord], closest: TrialRecord, max_forgetting: float) -> tuple[str, ...]:
    lost = closest.forgetting or 0.0
    fastest = max(trial.learning_rate for trial in better)
    # Rounded up, so that the recommended bound really accepts the trial.
    enough = math.ceil(lost * 100) / 100
    held = _advice_on_remedies(closest)
    return (
        f"lower search.learning_rate below {closest.learning_rate:.1e}: the trial that forgets least, {closest.label}, "
        f"forgets {lost:.3f}, and rates went up to {fastest:.1e}",
        f"unfreeze less than {closest.layers}: head, last:1 or last:2, with lora",
        f"train for fewer epochs: forgetting grows with steps, and {closest.label} took {_steps(closest)}",
        *((", or ".join(held),) if held else ()),
        f"accept it: search.max_forgetting: {enough:g} instead of {max_forgetting:g} would let {closest.trial_id} pass",
    )


def _advice_on_remedies(trial: TrialRecord) -> list[str]:
    """Recommend replay and the suitable anchor, as far as the trial did not use them."""
    replay = "mix retention text into training: search.replay: [0.0, 0.1]"
    fitting: list[tuple[str, str]] = [("replay", replay)]
    if trial.tune == "full" or ADAPTER_KINDS[trial.adapter.kind].adds_product:
        fitting += [
            (kind, f"keep the weights near the base: search.anchor: [none, {{kind: {kind}, strength: {strength:g}}}]")
            for kind, traits in ANCHORS.items()
            if traits.tune == trial.tune and (strength := traits.recommended_strength) is not None
        ]
    return [advice for word, advice in fitting if word not in trial.remedy_kinds]


def _steps(trial: TrialRecord) -> int:
    return trial.judged.step if trial.judged is not None else trial.total_steps


def _last_improvement(trial: TrialRecord, higher_is_better: bool) -> tuple[float, str]:
    """Return the metric's improvement (below 0: worse) up to the last rung, and `from 3.20 at step 30 to 3.10 at step 90`.

    It is measured from the rung that the trial is compared by or, if that is the last, from the one before. 0 if four digits
    show no change.
    """
    if len(trial.rungs) < 2 or trial.judged is None:
        return 0.0, ""
    end = trial.rungs[-1]
    start = trial.rungs[-2] if trial.judged is end else trial.judged
    if start.metric is None or end.metric is None or not math.isfinite(start.metric + end.metric):
        return 0.0, ""
    # Compared as displayed.
    first, last = f"{start.metric:.4g}", f"{end.metric:.4g}"
    fall = float(first) - float(last)
    return -fall if higher_is_better else fall, f"from {first} at step {start.step} to {last} at step {end.step}"


def _advice_on_edge(best: TrialRecord, scored: Sequence[TrialRecord], *, may_raise: bool) -> str | None:
    """Recommend other rates if the best one is at the edge of those tried with the same method; higher ones only if
    `may_raise`."""
    rates = [trial.learning_rate for trial in scored if trial.tune == best.tune and trial.learning_rate > 0]
    if len(rates) < 3 or max(rates) == min(rates):
        return None
    # On a log scale, since rates are searched on one.
    position = math.log(best.learning_rate / min(rates)) / math.log(max(rates) / min(rates))
    tried = f"the best rate, {best.learning_rate:.1e}, is at the edge of {min(rates):.1e} to {max(rates):.1e}"
    if position <= EDGE_SHARE:
        return f"lower search.learning_rate for {best.tune}: {tried}"
    return f"raise search.learning_rate for {best.tune}: {tried}" if may_raise and position >= 1 - EDGE_SHARE else None
