"""When a process is given up: by its own history, by what its node says, and never for time in which nobody looked."""

from __future__ import annotations

import pytest

from orchestrator.errors import UsageError
from orchestrator.runtime.hang_detection import POLL_S, Patience, Seat, Vigil
from orchestrator.train.pulse import NOTHING_YET, Pulse

PATIENCE = Patience(silent_s=20, steady_s=60, opening_s=600, factor=10)
SEAT = Seat(1, "node-b", "abc", 4711, 99)
LOADING = Pulse("loading the base", 0, 3, 0.0, is_steady=False)
TRAINING = Pulse("training", 12, 40, 0.3, is_steady=True)
SLOW = Pulse("training", 12, 40, 30.0, is_steady=True)
EVALUATING = Pulse("evaluating", 12, 41, 0.0, is_steady=False)
IDLE = Pulse("idle", 0, 50, 0.0, is_steady=False)


class Scene:
    def __init__(self) -> None:
        self.now = 1000.0
        self.vigil = Vigil(PATIENCE, clock=lambda: self.now)

    def passes(self, seconds: float, pulse: Pulse | None = None, every_s: float = POLL_S) -> None:
        """Time in which it is looked at, and where there is a pulse, answered."""
        until = self.now + seconds
        while self.now < until:
            self.now += every_s
            if pulse is not None:
                self.vigil.hear(SEAT, pulse)
            self.vigil.look()


@pytest.mark.parametrize(
    ("pulse", "lives_s", "hangs_s"),
    [
        (TRAINING, 58, 63),
        (SLOW, 298, 303),
        (LOADING, 597, 603),
        (EVALUATING, 597, 603),
        (NOTHING_YET, 597, 603),
        (IDLE, 5000, None),
    ],
    ids=["quick steps", "slow steps", "loading", "a first evaluation", "nothing heard yet", "idle"],
)
@pytest.mark.parametrize("answers", [True, False])
def test_the_bound_is_a_multiple_of_what_it_has_shown(pulse: Pulse, lives_s: float, hangs_s: float | None, answers: bool) -> None:
    scene = Scene()
    scene.vigil.hear(SEAT, pulse)
    scene.passes(lives_s, pulse if answers else None)
    assert scene.vigil.hung() == {}
    if hangs_s is not None:
        scene.passes(hangs_s - lives_s, pulse if answers else None)
        (said,) = scene.vigil.hung().values()
        assert "rank 1 on node-b (pid 4711)" in said
        assert pulse.phase in said
        assert ("after step 12" in said) is (pulse.step == 12)


def test_who_gets_on_is_never_given_up() -> None:
    scene = Scene()
    for beats in range(100):
        scene.passes(50, TRAINING._replace(beats=beats))
        assert scene.vigil.hung() == {}


def test_what_a_process_has_shown_holds_for_the_one_after_it() -> None:
    scene = Scene()
    scene.vigil.hear(SEAT, SLOW)
    scene.vigil.hear(SEAT, SLOW)
    scene.vigil.forget()
    again = SEAT._replace(pid=5000)
    scene.vigil.hear(again, TRAINING)
    scene.passes(200)
    assert scene.vigil.hung() == {}
    scene.passes(110)
    assert list(scene.vigil.hung()) == [again]


def test_who_is_silent_is_stopped_only_where_its_node_says_so() -> None:
    scene = Scene()
    scene.vigil.hear(SEAT, LOADING)
    scene.passes(19)
    assert scene.vigil.silent() == []
    scene.passes(3)
    assert scene.vigil.silent() == [SEAT]
    assert scene.vigil.stopped({SEAT: "D"}) == {}
    (said,) = scene.vigil.stopped({SEAT: "T"}).values()
    assert "is stopped" in said
    assert "loading the base" in said
    scene.vigil.hear(SEAT, LOADING)
    assert scene.vigil.silent() == []


def test_time_in_which_nobody_looked_blames_nobody() -> None:
    """A job that was suspended with its driver, a machine that slept."""
    scene = Scene()
    scene.passes(10, TRAINING)
    scene.now += 5000
    scene.vigil.look()
    assert scene.vigil.hung() == {}
    assert scene.vigil.silent() == []
    scene.passes(70)
    assert list(scene.vigil.hung()) == [SEAT]


def test_a_gang_that_was_idle_is_found_as_soon_as_any_other() -> None:
    """Nobody looks between two assignments; the first answer after it must not be dated into the future."""
    scene = Scene()
    scene.passes(5, TRAINING)
    scene.now += 300
    scene.passes(2, TRAINING)
    scene.passes(22)
    assert scene.vigil.silent() == [SEAT]
    scene.passes(40)
    assert list(scene.vigil.hung()) == [SEAT]


def test_a_large_base_may_take_longer_to_load() -> None:
    assert Patience().for_base(int(140e9)).opening_s == pytest.approx(600 + 7000)


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf", "nan"])
def test_a_patience_that_is_no_number_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_PATIENCE", value)
    with pytest.raises(UsageError, match="ORCHESTRATOR_PATIENCE"):
        Patience.from_environment()
    monkeypatch.setenv("ORCHESTRATOR_PATIENCE", "0.5")
    assert Patience.from_environment().steady_s == Patience().steady_s / 2
