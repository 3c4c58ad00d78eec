"""The run's account of GPU-hours, and what it decides."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from orchestrator.run import hours
from orchestrator.run.hours import Meter, affords_refit, is_spent, may_go_on, metered, read_hours, refit_hours
from orchestrator.work.results import RungResult


def rung(number: int, step: int, seconds: float, state: str = "done") -> RungResult:
    values = {"trial_id": "t0", "rung": number, "step": step, "tokens": 1, "state": state, "train_seconds": seconds}
    return RungResult.model_validate(values)


def test_places_count_while_they_are_held_and_over_all_submissions(tmp_path: Path) -> None:
    file, now = tmp_path / "hours.json", [0.0]
    first = Meter(file, lambda: now[0])
    first.open()
    first.hold("gang 0", 4)
    now[0] = 1800
    assert first.used_hours == pytest.approx(2)
    first.hold("gang 1", 2)
    first.release("gang 0")
    first.release("gang 0")
    now[0] = 3600
    first.close()
    assert read_hours(file) == pytest.approx(3)
    second = Meter(file, lambda: now[0])
    assert second.used_hours == pytest.approx(3), "what a submission before used counts"
    with metered(file, 1):
        pass
    assert read_hours(file) == pytest.approx(3, abs=1e-3)


def test_a_killed_driver_forgets_seconds_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hours, "SAVE_EVERY_S", 0.01)
    file, now = tmp_path / "hours.json", [0.0]
    meter = Meter(file, lambda: now[0])
    meter.hold("gang 0", 1)
    now[0] = 7200
    meter.open()
    deadline = time.monotonic() + 20
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read_hours(file) == pytest.approx(2), "it is on disk while the gang is still held"
    meter.close()


def test_a_save_that_fails_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hours, "SAVE_EVERY_S", 0.01)
    write, failures = hours.write_json, [OSError("no space left on device")]

    def full_once(file: Path, value: object) -> None:
        if failures:
            raise failures.pop()
        write(file, value)

    monkeypatch.setattr(hours, "write_json", full_once)
    file = tmp_path / "hours.json"
    meter = Meter(file)
    meter.open()
    deadline = time.monotonic() + 20
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert file.exists()
    meter.close()


def test_a_refit_is_expected_to_take_what_the_trial_took_per_step() -> None:
    results = [rung(0, 10, 3600), rung(1, 30, 7200)]
    assert refit_hours(results, 90) == pytest.approx(9)
    assert refit_hours(results, 30) == 0, "it had the full budget"
    assert refit_hours([*results, rung(2, 50, 9999, "failed")], 90) == pytest.approx(9)
    assert refit_hours([], 90) == refit_hours([rung(0, 0, 1.0)], 90) == 0


@pytest.mark.parametrize(
    ("used", "bound", "refit", "spent"),
    [
        (99, None, 99, False),
        (9.9, 10, 0, False),
        (10, 10, 0, True),
        (7.9, 10, 2, False),
        (8, 10, 2, True),
        (8, 10, 5.1, False),
    ],
    ids=["no bound", "below", "at the bound", "room for the refit", "the refit's share", "a refit that is too much anyway"],
)
def test_the_search_ends_where_only_the_refit_has_room_left(used: float, bound: float | None, refit: float, spent: bool) -> None:
    assert is_spent(used, bound, refit) is spent


def test_a_refit_gets_half_of_the_bound_at_most() -> None:
    assert affords_refit(5, 10)
    assert not affords_refit(5.1, 10)
    assert affords_refit(1e9, None)


def test_only_more_hours_than_were_used_take_a_search_up_again() -> None:
    assert may_go_on(2, 2.5, None)
    assert may_go_on(2, 2.5, 3)
    assert not may_go_on(2, 2.5, 2.4), "raised, and used up already"
    assert not may_go_on(2, 1.5, 2)
