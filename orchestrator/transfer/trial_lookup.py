"""Find a trial by its number, its id, or the beginning of its id."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from orchestrator.errors import UsageError
from orchestrator.units import printable

LISTED = 12


def find_trial(wanted: str | int, known: Mapping[str, int]) -> str:
    """Return the id of the trial that `wanted` names.

    Args:
        wanted: An id (`t007-5055eb`), a number (`7`), or a beginning that one id alone has (`t007`).
        known: Number of every trial by its id; controls have numbers below zero, and are found by their ids.

    Raises:
        UsageError: no such trial, or several; names those that are near.
    """
    text = str(wanted).strip()
    if text in known:
        return text
    numbers = {str(number): trial_id for trial_id, number in known.items() if number >= 0}
    if text in numbers:
        return numbers[text]
    begin = [trial_id for trial_id in known if text and trial_id.startswith(text)]
    if len(begin) == 1:
        return begin[0]
    shown = printable(text)
    if begin:
        raise UsageError(f"{len(begin)} trials begin with {shown!r}", expected="one of " + _listed(begin))
    near = difflib.get_close_matches(text, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else ""
    raise UsageError(
        f"no trial {shown!r}", expected=f"a number or an id: {_listed(list(known)) or 'there is no trial'}", remedy=hint
    )


def _listed(trial_ids: list[str]) -> str:
    more = f" and {len(trial_ids) - LISTED} more" if len(trial_ids) > LISTED else ""
    return ", ".join(trial_ids[:LISTED]) + more
