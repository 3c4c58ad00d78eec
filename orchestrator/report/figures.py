"""Figures as inline SVG, drawn by matplotlib without a display. Text stays text, so it can be searched and read aloud.

Colours are from the Okabe-Ito palette (Okabe & Ito 2008, "Color Universal Design"), which colour-blind readers can distinguish;
lora and full differ in marker too, so a page printed in grey can still be read. Ink, lines and some data colours are CSS
variables, so that the page shows them in its own light or dark colours; without a page they are the light ones.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from orchestrator.transfer.records import CONTROL_NAMES
from orchestrator.units import format_count

BLUE, ORANGE, GREEN, RED, PURPLE, GREY, INK = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#9a9a9a", "#222222"
PAPER, LINE, AXIS, TICK, IDLE = "#ffffff", "#e6e6e6", "#666666", "#444444", "#e2e2e2"
ON_DARK, ON_LIGHT = "#fefefe", "#000000"
"""Ink on filled areas, the same on a light and on a dark page."""
BY_PAGE = {
    INK: "ink",
    PAPER: "paper",
    LINE: "grid",
    AXIS: "axis",
    TICK: "tick",
    IDLE: "idle",
    GREY: "muted",
    BLUE: "data-blue",
}
"""CSS variable (style.css) of each colour that the page decides."""
WIDE = 5.0
"""Ratio of largest to smallest value above which the axis is logarithmic."""
SMALLEST_TEXT = 9
"""Font size in points. A figure is never shown smaller than drawn (style.css): 9 pt are 12 px."""
KIND_LOOK: dict[str, dict[str, Any]] = {
    "lora": {"s": 38, "color": BLUE, "marker": "o"},
    "full": {"s": 38, "color": ORANGE, "marker": "s"},
    CONTROL_NAMES["none"]: {"s": 75, "color": INK, "marker": "X"},
    CONTROL_NAMES["head"]: {"s": 60, "color": GREEN, "marker": "D"},
}
METHODS = {"lora": "LoRA", "full": "full fine-tuning"}
"""Display name of each training method."""
TERM_HATCHES = ("", "///", "xxx")
"""Hatches for the second round of colours, if there are more terms than colours."""
TERM_COLOURS = (BLUE, "#56b4e9", GREEN, "#f0e442", ORANGE, RED, PURPLE, GREY)

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "figure.facecolor": "none",
    "hatch.color": AXIS,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": AXIS,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": TICK,
    "ytick.color": TICK,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.edgecolor": "none",
    "legend.facecolor": PAPER,
    "legend.framealpha": 0.85,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Curve:
    """Line of the loss figure; x is training tokens."""

    label: str
    tokens: tuple[float, ...]
    values: tuple[float, ...]
    emphasis: str = ""
    """`promoted`, `base`, `head`, or empty for all others."""
    marked: bool = False


@dataclass(frozen=True)
class TradeOff:
    """Forgetting (nats per token) and metric of a trial or control; both finite."""

    kind: str
    """A key of KIND_LOOK."""
    forgetting: float
    metric: float
    on_front: bool = False
    promoted: bool = False
    early: bool = False
    """True if it was evaluated before its full budget: drawn hollow."""


@dataclass(frozen=True)
class PlannedBar:
    """Planned memory of one choice by term, and its measured peak. Bytes per rank."""

    label: str
    terms: tuple[tuple[str, float], ...]
    measured: float | None


def draw(name: str, size: tuple[float, float], paint: Callable[[Figure], None], description: str) -> str:
    """Return an `<svg>` of `size` inches; `name` makes its ids unique on the page."""
    # A fixed salt gives the same ids every time, so that equal runs give equal reports.
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        # Not pyplot: it keeps global state, and would look for a display.
        FigureCanvasSVG(figure)
        paint(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # matplotlib gives an id to every element; unused ones make up much of the file and could clash on the page.
    referred = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred else "", svg)
    svg = _coloured_by_page(svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


def _coloured_by_page(svg: str) -> str:
    """Replace colours by CSS variables, which only a style may use: an attribute such as `fill="#222222"` is kept."""
    names = "|".join(BY_PAGE)
    return re.sub(rf"(?<=: )({names})(?=[;\"])", lambda found: f"var(--{BY_PAGE[found[1]]}, {found[1]})", svg)


def finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def curves(panels: Sequence[tuple[str, str, Sequence[Curve]]]) -> str:
    """Draw panels (title, y label, curves) side by side over training tokens. A diverged trial leaves the frame."""

    def paint(figure: Figure) -> None:
        for axis, (title, label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axis.set_title(title, loc="left", fontweight="bold")
            axis.set_xlabel("training tokens")
            axis.set_ylabel(label)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
            # Emphasised lines last, so that they are drawn on top.
            for line in sorted(lines, key=lambda line: bool(line.emphasis)):
                _curve(axis, line)
            values = [value for line in lines for value in line.values]
            _frame(axis, values, [value for line in lines if line.emphasis for value in line.values])
            _spread(axis, values)
            if any(line.emphasis for line in lines):
                axis.legend(loc="best")

    return draw("curves", (9.2, 3.6), paint, "losses over training tokens")


def _curve(axis: Axes, line: Curve) -> None:
    colour = {"promoted": RED, "base": INK, "head": GREEN}.get(line.emphasis, GREY)
    if line.emphasis in ("base", "head"):
        axis.axhline(
            line.values[-1], color=colour, linestyle="--" if line.emphasis == "base" else ":", linewidth=1.4, label=line.label
        )
        return
    axis.plot(
        line.tokens,
        line.values,
        color=colour,
        linewidth=2.2 if line.emphasis else 1.0,
        alpha=1.0 if line.emphasis else 0.55,
        marker="o" if line.marked else None,
        markersize=5 if line.emphasis else 3.5,
        label=line.label if line.emphasis else None,
    )


def _frame(axis: Axes, values: Sequence[float], kept: Sequence[float] = ()) -> None:
    """Fit the y axis to the bulk of the values, and to all that must be visible."""
    ordered = sorted(finite(values))
    if not ordered:
        return
    low = min(ordered[0], *kept) if kept else ordered[0]
    # The top 3% are cut off: one diverged trial would squeeze all others into a line.
    high = max([ordered[min(len(ordered) - 1, int(0.97 * len(ordered)))], *kept])
    if high > low:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))


def _spread(axis: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis if the range would hide the differences between good trials."""
    shown = finite(values)
    if not shown or min(shown) <= 0 or max(shown) < WIDE * min(shown):
        return
    low, high = axis.get_ylim()
    axis.set_yscale("log")
    axis.set_ylim(min(shown) / 1.15, max(high, low) * 1.15)
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def front(points: Sequence[TradeOff], bound: float, metric: str, higher_is_better: bool) -> str:
    """Draw target and forgetting, with the Pareto front, the bound (if any) and the promoted trial."""

    def paint(figure: Figure) -> None:
        axis = figure.subplots()
        if math.isfinite(bound):
            # Far beyond the frame: the x limits are set below.
            axis.axvspan(bound, bound + 1e6, color=GREY, alpha=0.15, linewidth=0)
            axis.axvline(bound, color=INK, linestyle="--", linewidth=1.2, label=f"bound {bound:g}")
        for kind, look in KIND_LOOK.items():
            own = [point for point in points if point.kind == kind]
            early = [point for point in own if point.early]
            hollow = {"facecolor": PAPER, "edgecolor": look["color"], "linewidth": 1.6}
            solid = {"facecolor": look["color"], "edgecolor": PAPER, "linewidth": 0.6}
            shape = {name: value for name, value in look.items() if name != "color"}
            _scatter(axis, [point for point in own if not point.early], label=METHODS.get(kind, kind), **shape, **solid)
            _scatter(axis, early, label=f"{METHODS.get(kind, kind)}, evaluated early", **shape, **hollow)
        on_front = sorted((point for point in points if point.on_front), key=lambda point: point.forgetting)
        if len(on_front) > 1:
            x, y = [point.forgetting for point in on_front], [point.metric for point in on_front]
            axis.plot(x, y, color=GREEN, linewidth=1.4, drawstyle="steps-post", label="Pareto front", zorder=1)
        promoted = [point for point in points if point.promoted]
        _scatter(axis, promoted, label="promoted", s=190, facecolor="none", edgecolor=RED, linewidth=2)
        forgettings = sorted(point.forgetting for point in points)
        # The same for forgetting: the worst 5% may leave the frame.
        bulk = forgettings[: max(1, math.ceil(0.95 * len(forgettings)))]
        low, high = min(0.0, forgettings[0]), max([bulk[-1], *finite([bound])])
        pad = 0.06 * ((high - low) or 1.0)
        axis.set_xlim(low - pad, high + pad)
        _frame(axis, [point.metric for point in points], [point.metric for point in points if point.kind not in ("lora", "full")])
        axis.set_xlabel("forgetting: rise of retention loss, nats per token (left is better)")
        _spread(axis, [point.metric for point in points])
        axis.set_ylabel(f"{metric} ({'up' if higher_is_better else 'down'} is better)")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return draw("front", (9.2, 4.0), paint, f"{metric} against forgetting")


def _scatter(axis: Axes, points: Sequence[TradeOff], **look: Any) -> None:
    if points:
        axis.scatter([point.forgetting for point in points], [point.metric for point in points], **look)


def memory(bars: Sequence[PlannedBar], scale: float, unit: str) -> str:
    """Draw planned memory per rank, stacked by term, with a diamond at the measured peak."""
    names = list(dict.fromkeys(name for bar in bars for name, _ in bar.terms))

    def paint(figure: Figure) -> None:
        axis = figure.subplots()
        left = [0.0] * len(bars)
        for index, name in enumerate(names):
            widths = [dict(bar.terms).get(name, 0.0) / scale for bar in bars]
            turn, colour = divmod(index, len(TERM_COLOURS))
            look: dict[str, Any] = {"color": TERM_COLOURS[colour], "hatch": TERM_HATCHES[turn % len(TERM_HATCHES)]}
            axis.barh(range(len(bars)), widths, left=left, label=name, height=0.62, edgecolor=INK, linewidth=0.4, **look)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        measured = [(bar.measured / scale, y) for y, bar in enumerate(bars) if bar.measured]
        if measured:
            x, y = zip(*measured, strict=True)
            axis.scatter(x, y, marker="D", s=44, color=INK, edgecolor=PAPER, zorder=3, label="measured peak")
        axis.set_yticks(range(len(bars)), [bar.label for bar in bars])
        # Reversed, so that the first bar is on top.
        axis.set_ylim(len(bars) - 0.5, -0.5)
        axis.set_xlabel(f"{unit} per rank")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return draw("memory", (9.2, max(2.2, 1.0 + 0.36 * len(bars))), paint, "planned and measured memory per rank")
