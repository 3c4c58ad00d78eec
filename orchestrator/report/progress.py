"""Text for the current activities of a run: the same in a log, in the live table and in the report."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from orchestrator.report.wording import number, plural
from orchestrator.transfer.run_view import Activity, Progress
from orchestrator.units import format_count, format_seconds

SHOWN = 4
"""Number of activities that a line names; the rest are counted."""


def trial_name(trial_id: str) -> str:
    """Return `trial 7` for `t007-3fa2c1`; the name for a control."""
    found = re.match(r"t(\d+)(?:-|$)", trial_id)
    return f"trial {int(found[1])}" if found else trial_id


def activity_text(activity: Activity, phase: str = "") -> str:
    """Return `trial 3 training: step 37 of 327, loss 1.832, 3.4k tokens/s`.

    Args:
        phase: Text that already precedes it, and is not repeated.
    """
    doing = "" if activity.doing == phase else activity.doing
    whose = trial_name(activity.trial_id) if activity.trial_id not in ("", "none") else ""
    whose = f"{whose} {doing}".strip() or activity.doing
    if activity.gang is not None and not activity.trial_id:
        whose = f"gang {activity.gang} {whose}"
    said: list[str] = []
    if activity.stop_step and activity.doing == "training":
        said.append(_step(activity) if activity.step else "before its first step")
    if activity.loss is not None:
        said.append(f"loss {number(activity.loss)}")
    if activity.tokens_per_s:
        said.append(f"{format_count(round(activity.tokens_per_s))} tokens/s")
    return f"{whose}: {', '.join(said)}" if said else whose


def _step(activity: Activity) -> str:
    to = activity.stop_step
    whole = f" (of {activity.total_steps} in all)" if activity.total_steps > to else ""
    return f"step {activity.step} of {to}{whole}"


def progress_text(now: Progress) -> str:
    """Return `search: trial 3 training: step 37 of 109, loss 1.8 · gang 1 loading the base model; about 4m10s left, until
    14:03`."""
    doing = [activity_text(activity, now.phase) for activity in now.activities[:SHOWN]]
    if len(now.activities) > SHOWN:
        doing.append(f"and {len(now.activities) - SHOWN} more")
    said = " · ".join(doing) or now.detail or "in progress"
    return f"{now.phase}: {said}; {left_text(now) or f'{whole_seconds(now.phase_seconds)} so far'}"


def whole_seconds(seconds: float) -> str:
    """Return `9s`, `4m10s`: a time without fractions."""
    return f"{round(seconds)}s" if seconds < 59.5 else format_seconds(round(seconds))


def left_text(now: Progress) -> str:
    """Return `about 4m10s left, until 14:03` in local time; empty if unknown."""
    if now.seconds_left is None:
        return ""
    until = datetime.fromtimestamp(now.at) + timedelta(seconds=now.seconds_left)
    return f"about {whole_seconds(now.seconds_left)} left, until {until:%H:%M}"


def waiting_text(now: Progress) -> str:
    """Return the phase with its activities, short enough for a title line."""
    if now.activities and now.activities[0].stop_step:
        count = len({activity.trial_id for activity in now.activities if activity.trial_id})
        return f"{now.phase}: {plural(count, 'trial')} in training"
    return f"{now.phase}: {activity_text(now.activities[0]) if now.activities else now.detail}".rstrip(": ")
