"""The section on more data: the sentence, the points and where the law leads; or why there is none."""

from __future__ import annotations

from orchestrator.report import final_screen
from orchestrator.report.page import write_report
from orchestrator.transfer.learning_curve import LearningCurve, PowerLaw

from .test_page import read

FOUND = LearningCurve(
    trial_id="t003-00ab12",
    counts=(108, 216, 432, 864),
    losses=(2.291, 2.113, 1.957, 1.831),
    law=PowerLaw(floor=1.5, scale=8.0, power=0.5),
    ahead_count=1728,
    ahead_loss=1.79,
    low=1.752,
    high=1.822,
)
SENTENCE = "twice the data (1728 documents) would bring the loss from 1.831 to about 1.790 (95%: 1.752 to 1.822)"


def with_curve(make, **values):
    """A sweep whose promoted trial has the curve."""
    found = FOUND.model_copy(update={"trial_id": make.sweep().winner_id})
    return make.sweep(**{"learning_curve": found, **values})


def test_a_run_with_a_curve_shows_it(fake_run, make):
    sweep = with_curve(make)
    folder = fake_run(sweep=sweep)
    written = write_report(folder).read_text()
    page = read(folder / "report.html")
    assert "Would more data help?" in page.text
    assert f"T{SENTENCE[1:]}." in page.text
    assert "eval loss over training documents" in written
    assert f"The promoted trial ({sweep.winner_id}) once more on 108, 216, 432 of the 864 training documents" in page.text
    for figure in ("2.291", "2.113", "1.957", "1.752 to 1.822", "loss = 1.500 + 8 / documents^0.5"):
        assert figure in page.text, figure


def test_a_run_without_one_says_why_where_it_was_asked_for(fake_run, make):
    told = fake_run(sweep=make.sweep(no_learning_curve="the trial on 216 documents failed: the loss became nan"))
    write_report(told)
    assert (
        "The learning curve is left out: the trial on 216 documents failed: the loss became nan."
        in read(told / "report.html").text
    )


def test_the_curve_of_another_trial_than_the_promoted_one_is_not_shown(fake_run, make):
    why = "it was measured of t003-00ab12, before another was promoted by hand"
    sweep = with_curve(make, learning_curve=FOUND, no_learning_curve=why)
    text = read(write_report(fake_run(sweep=sweep))).text
    assert f"The learning curve is left out: {why}." in text
    assert SENTENCE[1:] not in text
    assert "more data" not in final_screen(sweep, make.transfer())


def test_a_run_that_did_not_ask_has_no_such_section(fake_run):
    assert "Would more data help?" not in write_report(fake_run()).read_text()


def test_the_last_screen_says_whether_more_data_would_help(make):
    screen = final_screen(with_curve(make), make.transfer())
    (line,) = [line for line in screen.splitlines() if line.startswith("more data ")]
    assert line.split(maxsplit=2)[2].startswith("twice the data (1728 documents) would bring the loss from 1.831")
    assert max(map(len, screen.splitlines())) <= 100
    assert "more data" not in final_screen(make.sweep(), make.transfer())
