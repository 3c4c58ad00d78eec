"""Trials by number, id, or the beginning of an id."""

from __future__ import annotations

import pytest

from orchestrator.errors import UsageError
from orchestrator.transfer.trial_lookup import find_trial

KNOWN = {"none": -5, "head": -4, "t000-5055eb": 0, "t001-48253e": 1, "t010-a81021": 10, "t011-a8ffff": 11}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("t001-48253e", "t001-48253e"),
        ("1", "t001-48253e"),
        (10, "t010-a81021"),
        ("t010", "t010-a81021"),
        ("none", "none"),
        (" 0 ", "t000-5055eb"),
    ],
)
def test_what_is_meant(wanted, found):
    assert find_trial(wanted, KNOWN) == found


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("7", "no trial '7'"),
        ("t01", "2 trials begin with 't01'"),
        ("t001-48253f", "did you mean t001-48253e"),
        ("-5", "no trial"),
        ("", "no trial ''"),
        ("\x1b[1m", r"no trial '\\\\x1b"),
    ],
)
def test_what_is_not(wanted, said):
    with pytest.raises(UsageError, match=said):
        find_trial(wanted, KNOWN)
