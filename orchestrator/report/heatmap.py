"""Heatmap of the search: layers by learning rate, a row of panels for each budget, each with its own colour scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from orchestrator.report.figures import AXIS, IDLE, METHODS, ON_DARK, ON_LIGHT, SMALLEST_TEXT, draw, finite
from orchestrator.report.matrix import RateMatrix

Panels = Sequence[Sequence[RateMatrix]]
FLOOR = 1e-9


def heatmap(budgets: Panels, metric: str, higher_is_better: bool) -> str:
    """Draw the best metric by layers and learning rate, lora and full in separate panels, a row of panels for each budget.

    Colours are comparable only within a row: all its trials had trained for as many steps. A hatched cell was tried and had
    not come so far.
    """
    colours = mpl.colormaps["cividis" if higher_is_better else "cividis_r"]
    num_rows = max(len(panel.rows) for panels in budgets for panel in panels)

    def paint(figure: Figure) -> None:
        widths = [max(len(panel.columns), 2) for panel in budgets[0]]
        axes = figure.subplots(len(budgets), len(widths), squeeze=False, width_ratios=widths, sharex="col", sharey=True)
        for line, panels in zip(axes, budgets, strict=True):
            norm = _scale(panels, higher_is_better)
            for axis, panel in zip(line, panels, strict=True):
                _panel(axis, panel, colours, norm)
            label = f"{metric} after {panels[0].step} steps\n({'higher' if higher_is_better else 'lower'} is better)"
            bar = figure.colorbar(ScalarMappable(norm, colours), ax=list(line), label=label, pad=0.02)
            if bar.solids is not None:
                # matplotlib would embed the colour bar as a bitmap; with edges there are no gaps between its steps.
                bar.solids.set(rasterized=False, edgecolor="face")
        for axis in axes[-1]:
            axis.set_xlabel("learning rate")

    height = 0.9 + len(budgets) * (0.75 + 0.42 * num_rows)
    steps = ", ".join(str(panels[0].step) for panels in budgets)
    return draw("heatmap", (9.2, height), paint, f"{metric} by layers and learning rate, after {steps} steps")


def _scale(panels: Sequence[RateMatrix], higher_is_better: bool) -> Normalize:
    """Return the colour scale of one budget; a diverged trial must not flatten the differences between the others."""
    shown = finite([value for panel in panels for row in panel.values for value in row]) or [0.0]
    best, worst = (max(shown), min(shown)) if higher_is_better else (min(shown), max(shown))
    middle = sorted(shown)[len(shown) // 2]
    # Capped at three times the distance to the median, so that one bad trial does not use up the colours.
    reach = min(abs(worst - best), 3 * abs(middle - best) or abs(worst - best)) or FLOOR
    low, high = sorted((best, best - reach if higher_is_better else best + reach))
    return Normalize(low, high, clip=True)


def _panel(axis: Axes, panel: RateMatrix, colours: Colormap, norm: Normalize) -> None:
    axis.grid(False)
    axis.set_xlim(-0.5, len(panel.columns) - 0.5)
    axis.set_ylim(len(panel.rows) - 0.5, -0.5)
    axis.set_xticks(range(len(panel.columns)), panel.columns, rotation=35, ha="right")
    axis.set_yticks(range(len(panel.rows)), panel.rows)
    axis.set_title(f"{METHODS[panel.title]}, step {panel.step}", loc="left", fontweight="bold")
    for y, row in enumerate(panel.values):
        for x, value in enumerate(row):
            if value is not None:
                colour = colours(norm(value)) if math.isfinite(value) else (0.9, 0.9, 0.9, 1.0)
                _cell(axis, x, y, value, colour)
            elif panel.tried[y][x]:
                look = {"facecolor": "none", "edgecolor": AXIS, "hatch": "////", "linewidth": 0.8}
                axis.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, **look))


def _cell(axis: Axes, x: int, y: int, value: float, colour: tuple[float, float, float, float]) -> None:
    """Draw a filled square with its figure, in the more readable ink."""
    axis.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, edgecolor=IDLE, linewidth=0.5))
    said = f"{value:.3g}" if math.isfinite(value) else "failed"
    axis.text(x, y, said, ha="center", va="center", color=ink_on(colour), fontsize=SMALLEST_TEXT)


def ink_on(colour: tuple[float, float, float, float]) -> str:
    """Return dark or light ink, whichever has the higher contrast by WCAG 2's relative luminance: always at least 4.5 to 1."""

    def linear(part: float) -> float:
        return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(part) for part in colour[:3])
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return ON_DARK if 1.04 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else ON_LIGHT
