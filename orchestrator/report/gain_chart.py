"""Chart of the gains over the controls, with a zoomed panel if large gains would hide small ones."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.report.figures import GREEN, GREY, INK, RED, draw
from orchestrator.report.wording import signed
from orchestrator.transfer.records import CONTROL_NAMES, ComparisonRecord

ZOOM = 6.0
"""Ratio of largest to smallest gain above which small ones get a panel with their own scale."""


def gains(comparisons: Sequence[ComparisonRecord]) -> str:
    """Draw the gain over each control with its 95% interval; right of zero is better."""
    reach = [max(abs(comparison.low), abs(comparison.high)) for comparison in comparisons]
    small = [extent for extent in reach if extent * ZOOM < max(reach)]
    unit = comparisons[0].unit

    def paint(figure: Figure) -> None:
        if not small:
            _panel(figure.subplots(), comparisons, f"gain in {unit}; right of zero is better")
            return
        whole, close = figure.subplots(1, 2, sharey=True, width_ratios=[1.0, 1.0])
        _panel(whole, comparisons, f"gain in {unit}; right of zero is better")
        _panel(close, comparisons, f"the small ones, {max(reach) / max(small):.0f} times larger")
        # Room for the end caps of the longest small interval.
        limit = 1.3 * max(small)
        low = min(0.0, *(comparison.low for comparison in comparisons if abs(comparison.low) <= limit))
        close.set_xlim(min(1.15 * low, -0.12 * limit), limit)
        for y, comparison in enumerate(comparisons):
            if reach[y] not in small:
                _beyond(close, y, comparison)

    rows = [f"{signed(c.mean)} over {CONTROL_NAMES[c.against]}" for c in comparisons]
    return draw("gains", (9.2, 1.1 + 0.55 * len(comparisons)), paint, f"gain in {unit} with intervals: {', '.join(rows)}")


def _panel(axis: Axes, comparisons: Sequence[ComparisonRecord], label: str) -> None:
    axis.axvline(0.0, color=INK, linewidth=1.2)
    for y, comparison in enumerate(comparisons):
        below, above = comparison.mean - comparison.low, comparison.high - comparison.mean
        span = [[max(below, 0.0)], [max(above, 0.0)]]
        look = {"color": _colour(comparison), "marker": _marker(comparison), "capsize": 5, "linewidth": 2, "markersize": 7}
        axis.errorbar([comparison.mean], [y], xerr=span, **look)
    names = [f"over {CONTROL_NAMES[c.against]}\n{signed(c.mean)} ({signed(c.low)} to {signed(c.high)})" for c in comparisons]
    axis.set_yticks(range(len(comparisons)), names)
    axis.set_ylim(len(comparisons) - 0.5, -0.5)
    axis.set_xlabel(label)


def _beyond(axis: Axes, y: int, comparison: ComparisonRecord) -> None:
    """Draw an arrow toward a gain outside the panel."""
    right = comparison.mean > 0
    axis.annotate(
        "",
        (1.0 if right else 0.0, y),
        (0.9 if right else 0.1, y),
        xycoords=axis.get_yaxis_transform(),
        textcoords=axis.get_yaxis_transform(),
        arrowprops={"arrowstyle": "->", "color": _colour(comparison), "linewidth": 2},
    )


def _colour(comparison: ComparisonRecord) -> str:
    return GREEN if comparison.low > 0 else RED if comparison.high < 0 else GREY


def _marker(comparison: ComparisonRecord) -> str:
    """Return the marker: better, worse and unclear differ in shape too."""
    return "o" if comparison.low > 0 else "X" if comparison.high < 0 else "D"
