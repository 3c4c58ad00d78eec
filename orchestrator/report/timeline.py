"""Timeline of the gangs: one row per gang over the run's wall time, and the shares in a sentence.

Spans are derived from the rungs' results and from the events of gang starts and failures. Periods without records (before a
gang's first start, after its last work in an interrupted run) are neither drawn nor counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from orchestrator.report import html
from orchestrator.report.figures import BLUE, GREEN, IDLE, INK, ON_DARK, ORANGE, RED, SMALLEST_TEXT, draw
from orchestrator.report.html import Html
from orchestrator.report.wording import plural
from orchestrator.run.reader import RunRecords
from orchestrator.units import format_seconds
from orchestrator.work.results import RungResult

Kind = Literal["training", "scoring", "keeping", "idle", "starting", "lost"]
NAMES: dict[Kind, str] = {
    "training": "training",
    "scoring": "scoring",
    "keeping": "opening and saving trials",
    "idle": "idle",
    "starting": "starting and loading the base model",
    "lost": "work lost with a failed gang",
}
COLOURS: dict[Kind, str] = {
    "training": BLUE,
    "scoring": GREEN,
    "keeping": "#56b4e9",
    "idle": IDLE,
    "starting": ORANGE,
    "lost": RED,
}
NUMBERED_SHARE = 0.03
"""Share of the figure's width below which a bar is too narrow for its trial's number."""


@dataclass(frozen=True)
class Span:
    """Period in which a gang did one thing. Unix times, seconds."""

    gang: int
    kind: Kind
    start: float
    end: float
    trial_id: str = ""

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Submission:
    """Part of a run made by one submission, with the spans of its gangs."""

    start: float
    end: float
    spans: tuple[Span, ...]


def submissions_of(run: RunRecords) -> tuple[Submission, ...]:
    """Return the gangs' spans by submission; empty if nothing with a time was recorded."""
    results = [result for result in run.results if result.gang >= 0 and 0 < result.started_at <= result.finished_at]
    if not results:
        return ()
    known = [time for time in run.submissions if time <= results[0].started_at]
    # Runs of older versions record no submissions: their first result is then used as the start.
    begun = [*(known or [results[0].started_at]), *(time for time in run.submissions if time > results[0].started_at)]
    ends = [*begun[1:], float("inf")]
    parts = [
        _submission(
            start,
            [result for result in results if start <= result.started_at < end],
            [event for event in run.events if start <= _time(event) < end],
            whole=run.complete and end == ends[-1],
        )
        for start, end in zip(begun, ends, strict=True)
    ]
    return tuple(part for part in parts if part.spans)


def _submission(start: float, results: Sequence[RungResult], events: Sequence[dict[str, Any]], *, whole: bool) -> Submission:
    """Return one submission; if the run finished (`whole`), its gangs stay until the last one's work is done."""
    gangs = sorted({result.gang for result in results} | {int(e["gang"]) for e in events if _seconds_of_start(e) is not None})
    last = max((result.finished_at for result in results), default=start)
    spans = [
        span
        for gang in gangs
        for span in _spans_of_gang(
            gang,
            start,
            [result for result in results if result.gang == gang],
            [event for event in events if event.get("gang") == gang],
            last if whole else None,
        )
    ]
    return Submission(start, max((span.end for span in spans), default=start), tuple(spans))


def _spans_of_gang(
    gang: int, begun: float, results: Sequence[RungResult], events: Sequence[dict[str, Any]], last: float | None
) -> list[Span]:
    """Return recorded starts and assignments, and the spans between them."""
    deaths = [_time(event) for event in events if event.get("kind") in ("gang_died", "gang_lost")]
    recorded = [list(_assignment(result)) for result in side_by_side(results)]
    for event in events:
        seconds = _seconds_of_start(event)
        if seconds is not None:
            # An event is written down a moment after it happened: the first work may have begun by then.
            end = min([_time(event), *(part[0].start for part in recorded if part[0].start > _time(event) - seconds)])
            recorded.append([Span(gang, "starting", max(begun, _time(event) - seconds), end)])
    recorded.sort(key=lambda part: part[0].start)
    spans = [span for part in recorded for span in part]
    for before, after in pairwise(recorded):
        spans += _between(before[-1], after[0], deaths)
    if recorded and last is not None:
        spans += _between(recorded[-1][-1], Span(gang, "idle", last, last), deaths)
    return sorted((span for span in spans if span.seconds > 0), key=lambda span: span.start)


def side_by_side(results: Sequence[RungResult]) -> list[RungResult]:
    """Spread trials that shared batches over their common time, one after another in equal parts.

    Their results record even parts of the training and scoring time, but the beginning and end of the whole group.
    """
    groups: dict[tuple[int, float, float], list[RungResult]] = {}
    for result in results:
        groups.setdefault((result.gang, result.started_at, result.finished_at), []).append(result)
    parts: list[RungResult] = []
    for (_, start, end), members in groups.items():
        share = (end - start) / len(members)
        parts += [
            member.model_copy(update={"started_at": start + number * share, "finished_at": start + (number + 1) * share})
            for number, member in enumerate(members)
        ]
    return parts


def _between(before: Span, after: Span, deaths: Sequence[float]) -> Iterator[Span]:
    """Return the span between two recorded ones."""
    died = next((time for time in deaths if before.end < time <= after.start), None)
    if died is not None:
        yield Span(before.gang, "lost", before.end, died)
        if after.kind == "starting":
            yield Span(before.gang, "starting", died, after.start)
    # A gap before a start without a recorded failure is unknown: nothing is drawn.
    elif after.kind != "starting":
        yield Span(before.gang, "idle", before.end, after.start)


def _assignment(result: RungResult) -> Iterator[Span]:
    """Return the spans of one assignment. Only the seconds of training and scoring are recorded, not their start times, so the
    time to open and save the trial is put at the end."""
    start = result.started_at
    parts: dict[Kind, float] = {"training": result.train_seconds, "scoring": result.eval_seconds, "keeping": float("inf")}
    for kind, seconds in parts.items():
        end = min(start + seconds, result.finished_at)
        yield Span(result.gang, kind, start, end, result.trial_id)
        start = end


def _time(event: dict[str, Any]) -> float:
    value = event.get("time", event.get("at"))
    return float(value) if isinstance(value, int | float) else 0.0


def _seconds_of_start(event: dict[str, Any]) -> float | None:
    """Return how long a gang took to start; None for other events. Older versions record it only in the message."""
    if event.get("kind") != "gang_ready" or not isinstance(event.get("gang"), int):
        return None
    if isinstance(event.get("seconds"), int | float):
        return float(event["seconds"])
    said = re.search(r"ready in ([\d.]+) s", str(event.get("message", "")))
    return float(said[1]) if said else None


def seconds_by_kind(submissions: Sequence[Submission]) -> dict[Kind, float]:
    """Return the seconds of all gangs by kind of span; kinds that did not occur are left out."""
    spans = [span for part in submissions for span in part.spans]
    sums: dict[Kind, float] = {kind: sum(span.seconds for span in spans if span.kind == kind) for kind in NAMES}
    return {kind: seconds for kind, seconds in sums.items() if seconds}


def shares_sentence(submissions: Sequence[Submission]) -> str:
    """Return `Of the 2 gangs' 1m40s, 80% was training, 10% scoring, ... and 2% idle.`"""
    by_kind = seconds_by_kind(submissions)
    total = sum(by_kind.values())
    gangs = {span.gang for part in submissions for span in part.spans}
    whose = f"the {len(gangs)} gangs'" if len(gangs) > 1 else "the gang's"
    first = ("training", "scoring", "idle")
    order: list[Kind] = [*first, *(kind for kind in NAMES if kind in by_kind and kind not in first)]
    said = [f"{by_kind.get(kind, 0.0) / total:.0%} {NAMES[kind]}" for kind in order]
    # "80% was training, 10% scoring": only the first share has a verb.
    said[0] = said[0].replace("% ", "% was ", 1)
    over = f" over {plural(len(submissions), 'submission')}" if len(submissions) > 1 else ""
    return f"Of {whose} {format_seconds(total)}{over}, {', '.join(said[:-1])} and {said[-1]}."


def gang_times(run: RunRecords) -> Html:
    """Return the timeline with its sentence and its table."""
    submissions = submissions_of(run)
    if not submissions:
        return html.paragraph(
            "No times were recorded: the run is of an older version, or no gang (worker group) finished a rung."
        )
    spans = [span for part in submissions for span in part.spans]
    by_gang = {gang: [span for span in spans if span.gang == gang] for gang in sorted({span.gang for span in spans})}
    rows = [
        [gang, len({span.trial_id for span in own} - {""})]
        + [format_seconds(sum(span.seconds for span in own if span.kind == kind)) for kind in NAMES]
        for gang, own in by_gang.items()
    ]
    table = html.table(["gang", "trials", *NAMES.values()], rows, numeric=range(2 + len(NAMES)))
    cut = " A dashed line marks where the run was submitted again; the time between is left out." if len(submissions) > 1 else ""
    caption = f"A gang is a worker group. {shares_sentence(submissions)} The numbers are those of trials.{cut}"
    return html.picture(gang_chart(submissions), caption, table)


def gang_chart(submissions: Sequence[Submission]) -> str:
    """Draw one row per gang, coloured by activity; submissions are concatenated."""
    gangs = sorted({span.gang for part in submissions for span in part.spans})
    lengths = [part.end - part.start for part in submissions]
    offsets = [sum(lengths[:index]) for index in range(len(lengths))]
    width = sum(lengths)

    def paint(figure: Figure) -> None:
        axis = figure.subplots()
        axis.grid(False)
        for part, offset in zip(submissions, offsets, strict=True):
            for span in part.spans:
                left, row = span.start - part.start + offset, gangs.index(span.gang)
                axis.barh(row, span.seconds, left=left, height=0.7, color=COLOURS[span.kind], linewidth=0)
                if span.kind == "training" and span.seconds > NUMBERED_SHARE * width:
                    middle = left + span.seconds / 2
                    axis.text(middle, row, _short(span.trial_id), ha="center", va="center", color=ON_DARK, fontsize=SMALLEST_TEXT)
        for offset in offsets[1:]:
            axis.axvline(offset, color=INK, linestyle="--", linewidth=1.2)
        axis.set_xlim(0, width)
        axis.set_yticks(range(len(gangs)), [f"gang {gang}" for gang in gangs])
        axis.set_ylim(len(gangs) - 0.5, -0.5)
        axis.set_xlabel("seconds since the run was submitted")
        patches = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in seconds_by_kind(submissions)]
        figure.legend(handles=patches, loc="outside lower center", ncols=3)

    return draw("gangs", (9.2, 1.9 + 0.34 * len(gangs)), paint, "what each gang did over time")


def _short(trial_id: str) -> str:
    """Return `7` for `t007-3fa2c1`; the name for a control."""
    found = re.match(r"t(\d+)-", trial_id)
    return str(int(found[1])) if found else trial_id.partition("-")[0]
