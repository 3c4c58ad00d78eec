"""A process's heartbeat: what it does, that it gets on, and how long its parts take."""

from __future__ import annotations

import pytest

from orchestrator.train import heartbeat as heartbeat_module
from orchestrator.train.heartbeat import ENOUGH, _Recorder


class Clock:
    now = 0.0


@pytest.fixture
def heart(monkeypatch: pytest.MonkeyPatch) -> _Recorder:
    Clock.now = 0.0
    monkeypatch.setattr(heartbeat_module.time, "monotonic", lambda: Clock.now)
    return _Recorder()


def test_the_first_step_is_no_measure_for_the_others(heart: _Recorder) -> None:
    heart.enter("preparing")
    Clock.now += 100  # compiled, say
    heart.beat(step=1)
    assert heart.look().phase == "training"
    for step in range(2, 2 + ENOUGH):
        assert not heart.look().is_steady
        Clock.now += 2
        heart.beat(step)
    found = heart.look()
    assert (found.phase, found.step, found.longest_s, found.is_steady) == ("training", 1 + ENOUGH, 2, True)


def test_every_phase_has_a_history_of_its_own(heart: _Recorder) -> None:
    for number in range(2 * ENOUGH):
        Clock.now += 1
        heart.beat(step=number)
    heart.enter("evaluating")
    assert not heart.look().is_steady
    for _ in range(ENOUGH):
        Clock.now += 5
        heart.beat()
    assert (heart.look().longest_s, heart.look().is_steady) == (5, True)
    heart.enter("saving")
    for _ in range(2 * ENOUGH):
        heart.beat()
    assert not heart.look().is_steady, "a phase that does one long thing has no usual time"


def test_whatever_is_progress_beats_it(heart: _Recorder) -> None:
    seen = [heart.look().beats]
    for act in (lambda: heart.enter("preparing"), heart.beat, lambda: heart.beat(1), lambda: heart.enter("idle")):
        act()
        seen.append(heart.look().beats)
    assert seen == sorted(set(seen))
    assert heart.look().step == 0, "the step is the current trial's"
