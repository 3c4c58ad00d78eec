"""When a process is given up: by its own history, by what its node says, and never for time in which nobody looked."""

from __future__ import annotations

import pytest

from orchestrator.errors import UsageError
from orchestrator.runtime.hang_detection import POLL_S, HangDetector, HangTimeouts, ProcessId
from orchestrator.train.heartbeat import NO_HEARTBEAT_YET, Heartbeat

TIMEOUTS = HangTimeouts(silent_s=20, steady_s=60, opening_s=600, factor=10)
PROCESS = ProcessId(1, "node-b", "abc", 4711, 99)
LOADING = Heartbeat("loading the base", 0, 3, 0.0, is_steady=False)
TRAINING = Heartbeat("training", 12, 40, 0.3, is_steady=True)
SLOW = Heartbeat("training", 12, 40, 30.0, is_steady=True)
EVALUATING = Heartbeat("evaluating", 12, 41, 0.0, is_steady=False)
IDLE = Heartbeat("idle", 0, 50, 0.0, is_steady=False)


class Scene:
    def __init__(self) -> None:
        self.now = 1000.0
        self.detector = HangDetector(TIMEOUTS, clock=lambda: self.now)

    def passes(self, seconds: float, heartbeat: Heartbeat | None = None, every_s: float = POLL_S) -> None:
        """Time in which it is looked at, and where there is a heartbeat, answered."""
        until = self.now + seconds
        while self.now < until:
            self.now += every_s
            if heartbeat is not None:
                self.detector.record(PROCESS, heartbeat)
            self.detector.tick()


@pytest.mark.parametrize(
    ("heartbeat", "lives_s", "hangs_s"),
    [
        (TRAINING, 58, 63),
        (SLOW, 298, 303),
        (LOADING, 597, 603),
        (EVALUATING, 597, 603),
        (NO_HEARTBEAT_YET, 597, 603),
        (IDLE, 5000, None),
    ],
    ids=["quick steps", "slow steps", "loading", "a first evaluation", "nothing heard yet", "idle"],
)
@pytest.mark.parametrize("answers", [True, False])
def test_the_bound_is_a_multiple_of_what_it_has_shown(
    heartbeat: Heartbeat, lives_s: float, hangs_s: float | None, answers: bool
) -> None:
    scene = Scene()
    scene.detector.record(PROCESS, heartbeat)
    scene.passes(lives_s, heartbeat if answers else None)
    assert scene.detector.hung() == {}
    if hangs_s is not None:
        scene.passes(hangs_s - lives_s, heartbeat if answers else None)
        (said,) = scene.detector.hung().values()
        assert "rank 1 on node-b (pid 4711)" in said
        assert heartbeat.phase in said
        assert ("after step 12" in said) is (heartbeat.step == 12)


def test_who_gets_on_is_never_given_up() -> None:
    scene = Scene()
    for beats in range(100):
        scene.passes(50, TRAINING._replace(beats=beats))
        assert scene.detector.hung() == {}


def test_what_a_process_has_shown_holds_for_the_one_after_it() -> None:
    scene = Scene()
    scene.detector.record(PROCESS, SLOW)
    scene.detector.record(PROCESS, SLOW)
    scene.detector.forget()
    again = PROCESS._replace(pid=5000)
    scene.detector.record(again, TRAINING)
    scene.passes(200)
    assert scene.detector.hung() == {}
    scene.passes(110)
    assert list(scene.detector.hung()) == [again]


def test_who_is_silent_is_stopped_only_where_its_node_says_so() -> None:
    scene = Scene()
    scene.detector.record(PROCESS, LOADING)
    scene.passes(19)
    assert scene.detector.silent() == []
    scene.passes(3)
    assert scene.detector.silent() == [PROCESS]
    assert scene.detector.stopped({PROCESS: "D"}) == {}
    (said,) = scene.detector.stopped({PROCESS: "T"}).values()
    assert "is stopped" in said
    assert "loading the base" in said
    scene.detector.record(PROCESS, LOADING)
    assert scene.detector.silent() == []


def test_time_in_which_nobody_looked_blames_nobody() -> None:
    """A job that was suspended with its driver, a machine that slept."""
    scene = Scene()
    scene.passes(10, TRAINING)
    scene.now += 5000
    scene.detector.tick()
    assert scene.detector.hung() == {}
    assert scene.detector.silent() == []
    scene.passes(70)
    assert list(scene.detector.hung()) == [PROCESS]


def test_a_gang_that_was_idle_is_found_as_soon_as_any_other() -> None:
    """Nobody looks between two assignments; the first answer after it must not be dated into the future."""
    scene = Scene()
    scene.passes(5, TRAINING)
    scene.now += 300
    scene.passes(2, TRAINING)
    scene.passes(22)
    assert scene.detector.silent() == [PROCESS]
    scene.passes(40)
    assert list(scene.detector.hung()) == [PROCESS]


def test_a_large_base_may_take_longer_to_load() -> None:
    assert HangTimeouts().for_base(int(140e9)).opening_s == pytest.approx(600 + 7000)


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf", "nan"])
def test_a_patience_that_is_no_number_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_PATIENCE", value)
    with pytest.raises(UsageError, match="ORCHESTRATOR_PATIENCE"):
        HangTimeouts.from_environment()
    monkeypatch.setenv("ORCHESTRATOR_PATIENCE", "0.5")
    assert HangTimeouts.from_environment().steady_s == HangTimeouts().steady_s / 2
