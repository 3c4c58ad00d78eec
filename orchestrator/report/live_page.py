"""The report of a run in progress: its current activities, and a page that updates itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import datetime

from orchestrator.report import html
from orchestrator.report.html import Html
from orchestrator.report.progress import activity_text, left_text
from orchestrator.run.reader import RunRecords
from orchestrator.units import format_seconds

NICE = 10
"""Process priority for drawing, which takes about a second of a core that the run may need more."""
RELOAD = """
(() => {
  const key = "report:" + location.pathname;
  const name = (details) => (details.closest("section") || {}).id + ":" + details.querySelector("summary").textContent;
  const all = () => [...document.querySelectorAll("details")];
  addEventListener("DOMContentLoaded", () => {
    const kept = JSON.parse(sessionStorage.getItem(key) || "null");
    if (!kept) return;
    for (const details of all()) if (kept.open.includes(name(details))) details.open = true;
    scrollTo(0, kept.y);
  });
  setTimeout(() => {
    const open = all().filter((details) => details.open).map(name);
    sessionStorage.setItem(key, JSON.stringify({ y: scrollY, open }));
    location.reload();
  }, SECONDS * 1000);
})();
"""
"""Script that reloads the page and keeps scroll position and unfolded parts. The page of a finished run has none."""


def in_progress(run: RunRecords) -> Html:
    """Return the current activities of an unfinished run, or that no process is working on it."""
    now = run.progress
    again = "Submit the same spec again: it continues from what is on disk."
    if now is None:
        return html.tag("p", f"This run has not written its result: it is in progress or was interrupted. {again}", css="warning")
    if now.ended:
        why = f": {now.error}" if now.error else ""
        return html.tag("p", f"This run ended at {_clock(now.at)} before it was finished{why}. {again}", css="warning")
    doing = [activity_text(activity) for activity in now.activities]
    waiting = f"{now.phase}: {now.detail}" if now.detail else now.phase
    if not run.alive:
        said = f"No update since {_clock(now.at)}, in the phase {waiting}: the run was interrupted or killed. {again}"
        return html.tag("p", said, css="warning")
    left = f", {left_text(now)}" if now.seconds_left is not None else ""
    parts: list[object] = [
        html.tag("strong", "In progress"),
        f" at {_clock(now.at)}, {format_seconds(now.run_seconds)} after it was submitted. Phase {waiting}{left}.",
    ]
    if doing:
        parts.append(html.bullets(doing))
    if now.last_event:
        parts.append(html.tag("div", f"Last event: {now.last_event}", css="note"))
    return html.tag("div", *parts, css="now", role="status")


def _clock(unix_time: float) -> str:
    return datetime.fromtimestamp(unix_time).strftime("%Y-%m-%d %H:%M:%S")


def reloading(every_s: float) -> Html:
    """Return the head elements of a page that is rewritten every few seconds."""
    seconds = f"{every_s:g}"
    script = html.tag("script", Html(RELOAD.replace("SECONDS", seconds)))
    # Fallback for browsers without JavaScript, which loses the reader's place.
    meta = Html(f'<meta http-equiv="refresh" content="{max(1, round(every_s))}">')
    return html.join([script, html.tag("noscript", meta)])


def follow(
    write: Callable[[float | None], RunRecords],
    *,
    every_s: float,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Write the page every `every_s` seconds until the run has ended; the last one does not reload itself.

    A run whose driver is silent is still followed: another submission may continue it.

    Args:
        write: Writes the page, given its reload interval or None, and returns what was read.

    """
    os.nice(NICE)
    while True:
        run = write(every_s)
        if run.complete or (run.progress is not None and run.progress.ended):
            write(None)
            return
        wait(every_s)
