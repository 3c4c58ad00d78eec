"""The final screen of a run."""

from __future__ import annotations

import math
import textwrap

from orchestrator.plan.data_size import too_few_steps_warning
from orchestrator.report.wording import (
    best_trial,
    interval_text,
    measured_of,
    metric_over_seeds,
    metric_text,
    number,
    reads_sentence,
    signed,
    summary_sentence,
    verdict_sentence,
)
from orchestrator.spec.tasks import loss_unit
from orchestrator.transfer.records import PromptComparison, SweepResult, TransferReport, TrialRecord
from orchestrator.transfer.verdict_advice import advice_after
from orchestrator.units import printable

WIDTH = 100
INDENT = 10
ANSWER_CHARACTERS = 160


def final_screen(sweep: SweepResult, transfer: TransferReport) -> str:
    """Return the results in at most 100 columns: best trial, verdict, one prompt, bundle, report, next steps."""
    best = sweep.winner or best_trial(sweep.searched, sweep.higher_is_better)
    lines = [*_best(sweep, best, transfer), *_entry("verdict", verdict_sentence(sweep, transfer))]
    if sweep.ended_by_hours:
        lines += _entry("ended", sweep.ended_by_hours)
    if few := too_few_steps_warning(best.total_steps) if best is not None and best.total_steps else "":
        lines += _entry("warning", few)
    if sweep.curve_of_winner is not None:
        lines += _entry("more data", sweep.curve_of_winner.sentence)
    if again := reads_sentence(transfer.test_set_reads):
        lines += _entry("note", again)
    if transfer.prompts:
        lines += ["", *_answers(transfer.prompts[0]), ""]
    if transfer.bundle:
        lines += _entry("bundle", f"{transfer.bundle}    {_verified(transfer, loss_unit(sweep.task))}".rstrip())
    if transfer.report:
        lines += _entry("report", f"{transfer.report}    {summary_sentence(sweep)}")
    else:
        lines += _entry("search", summary_sentence(sweep))
    for index, step in enumerate(_following(sweep, transfer)):
        lines += _entry("next" if index == 0 else "", step)
    return "\n".join(lines)


def _following(sweep: SweepResult, transfer: TransferReport) -> list[str]:
    """Return what to do next; how to serve a bundle only if that is recommended."""
    if not transfer.bundle:
        return list(sweep.advice[:3])
    hours = sweep.advice[:1] if sweep.ended_by_hours else ()
    serve = () if transfer.verdict == "negative" else transfer.serve_commands[:1]
    return [*advice_after(transfer, by_hand=sweep.promoted_by_hand), *hours, *serve]


def _entry(name: str, written: str) -> list[str]:
    """Return `name` in its own column, with the text wrapped beside it. A path is never broken."""
    wrapped = textwrap.wrap(
        # Long words stay whole, since a broken path cannot be copied.
        " ".join(written.split("\n")),
        WIDTH - INDENT,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    return [f"{name if index == 0 else '':<{INDENT}}{line}" for index, line in enumerate(wrapped or [""])]


def _best(sweep: SweepResult, best: TrialRecord | None, transfer: TransferReport) -> list[str]:
    if best is None:
        return _entry("best", "no trial has a figure")
    base, head, found = sweep.control("none"), sweep.control("head"), measured_of(best, transfer)
    said = [f"{sweep.metric} {_figure(sweep, best, transfer)}"]
    said += [f"{name} {metric_text(trial.metric, sweep.metric)}" for name, trial in (("base", base), ("head", head)) if trial]
    if found.retain_loss is not None:
        before = f"base {number(base.retain_loss)}, " if base and base.retain_loss is not None else ""
        bound = f", bound {sweep.max_forgetting:g}" if math.isfinite(sweep.max_forgetting) else ""
        said.append(f"retention {number(found.retain_loss)} ({before}{signed(found.forgetting)}{bound})")
    name = "best" if sweep.winner is not None or sweep.finished_at is None else "best*"
    lines = [*_entry(name, best.label), *_entry("", "   ".join(said))]
    return lines if name == "best" else [*lines, *_entry("", "* of the trials; it was not promoted")]


def _figure(sweep: SweepResult, best: TrialRecord, transfer: TransferReport) -> str:
    """Return `1.830`; with several seeds `1.812 ± 0.042 over 5 seeds (1.830 in the bundle)`."""
    own, by_seed = metric_text(measured_of(best, transfer).metric, sweep.metric), metric_over_seeds(sweep, best, transfer)
    if by_seed is None:
        return own
    return f"{interval_text(by_seed, sweep.metric)} over {len(by_seed.seeds)} seeds ({own} in the bundle)"


def _verified(transfer: TransferReport, unit: str) -> str:
    check, per = transfer.verification, unit.removeprefix("nats ")
    if check is None:
        return "not verified"
    if check.passed:
        return f"verified: KL {check.kl_bundle:.1e} {per} against the trained model"
    return f"VERIFICATION FAILED: KL {check.kl_bundle:.1e} {per} against the trained model, at most {check.limit:.1e} allowed"


def _answers(pair: PromptComparison) -> list[str]:
    said = [("prompt", pair.prompt), ("base", pair.base_answer), ("tuned", pair.tuned_answer)]
    said += [("expected", pair.expected)] if pair.expected else []
    return [line for name, written in said for line in _entry(name, _shorten(written))]


def _shorten(written: str) -> str:
    flat = printable(" ".join(written.split()))
    return flat if len(flat) <= ANSWER_CHARACTERS else flat[: ANSWER_CHARACTERS - 1] + "…"
