"""Learning curve section: losses of the promoted trial with less data, and the extrapolation to more."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from orchestrator.report import figures, html
from orchestrator.report.figures import BLUE, GREY, PAPER, RED
from orchestrator.report.html import Html
from orchestrator.report.wording import number
from orchestrator.spec.tasks import loss_unit
from orchestrator.transfer.learning_curve import LearningCurve
from orchestrator.transfer.records import SweepResult

NUM_DRAWN = 60
"""Number of points of each drawn line."""


def more_data(sweep: SweepResult) -> Html:
    """Return the curve with its sentence, or why it is missing."""
    found = sweep.curve_of_winner
    if found is None:
        return html.paragraph(f"The learning curve is left out: {sweep.no_learning_curve}.")
    trained = ", ".join(map(str, found.counts[:-1]))
    caption = (
        f"The promoted trial ({found.trial_id}) once more on {trained} of the {found.counts[-1]} training documents, for as many "
        f"epochs and so for fewer steps; and the power law fitted to the losses on the eval set, {_law(found)}. More data also "
        "means more steps: more epochs may bring part of the gain. The interval of the gain accounts for the size of the eval "
        "set and for the distance of the points from the law, and not for an error of the law beyond the measured range."
    )
    rows = [
        [count, "all" if count == found.counts[-1] else "trained on", number(loss), number(found.law.at(count)), ""]
        for count, loss in zip(found.counts, found.losses, strict=True)
    ]
    if not found.fit_failed:
        interval = f"{number(found.low)} to {number(found.high)}"
        rows.append([found.ahead_count, "extrapolated to", "", number(found.ahead_loss), interval])
    table = html.table(["documents", "", "eval loss", "law", "95% interval"], rows, numeric=(0, 2, 3, 4))
    sentence = found.sentence
    unit = loss_unit(sweep.task)
    picture = html.picture(_drawn(found, unit), caption, table)
    return html.join([html.paragraph(f"{sentence[:1].upper()}{sentence[1:]}."), picture])


def _law(found: LearningCurve) -> str:
    return f"loss = {found.law.floor:.3f} + {found.law.scale:.3g} / documents^{found.law.power:.2g}"


def _drawn(found: LearningCurve, unit: str) -> str:
    failed = found.fit_failed

    def paint(figure: Figure) -> None:
        axis = figure.subplots()
        first, last, ahead = found.counts[0], found.counts[-1], found.ahead_count
        lines = [(first, last, ":" if failed else "-", "law nearest to the points: no fit" if failed else "fitted law")]
        lines += [] if failed else [(last, ahead, "--", "extrapolated to twice the data")]
        for start, end, look, label in lines:
            drawn = np.geomspace(start, end, NUM_DRAWN)
            axis.plot(drawn, [found.law.at(count) for count in drawn], look, color=BLUE, linewidth=1.8, label=label)
        if not failed:
            _interval(axis, found)
        axis.axhline(found.losses[-1], color=GREY, linestyle=":", linewidth=1.2, label="loss on all documents")
        axis.plot(found.counts, found.losses, "o", color=RED, markersize=8, label="measured", zorder=3)
        ticks = [*found.counts, *([] if failed else [ahead])]
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticklabels([str(count) for count in ticks])
        axis.set_xlabel("training documents")
        axis.set_ylabel(f"eval loss, {unit}")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return figures.draw("learning-curve", (9.2, 3.6), paint, "eval loss over training documents")


def _interval(axis: Axes, found: LearningCurve) -> None:
    """Draw the extrapolated loss for twice the data, with its interval."""
    span = [[max(found.ahead_loss - found.low, 0.0)], [max(found.high - found.ahead_loss, 0.0)]]
    look = {"fmt": "o", "color": BLUE, "markerfacecolor": PAPER, "capsize": 5, "linewidth": 1.8, "markersize": 7}
    axis.errorbar([found.ahead_count], [found.ahead_loss], yerr=span, label="95% interval", **look)
