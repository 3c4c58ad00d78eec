"""Pictures as inline SVG, drawn by matplotlib without a display. Text stays text, so it can be searched and read aloud.

Colours are from the Okabe-Ito palette (Okabe & Ito 2008, "Color Universal Design"), told apart by colour-blind readers;
lora and full differ in marker too, so a page printed in grey can still be read.
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
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from orchestrator.report.matrix import RateMatrix
from orchestrator.transfer.records import CONTROL_NAMES, ComparisonRecord
from orchestrator.units import format_count

BLUE, ORANGE, GREEN, RED, PURPLE, GREY, INK = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#9a9a9a", "#222222"
KIND_LOOK: dict[str, dict[str, Any]] = {
    "lora": {"s": 38, "color": BLUE, "marker": "o"},
    "full": {"s": 38, "color": ORANGE, "marker": "s"},
    "untouched base": {"s": 75, "color": INK, "marker": "X"},
    "head control": {"s": 60, "color": GREEN, "marker": "D"},
}
TERM_HATCHES = ("", "///", "xxx")
"""More terms than colours: the second round is hatched."""
TERM_COLOURS = (BLUE, "#56b4e9", GREEN, "#f0e442", ORANGE, RED, PURPLE, GREY)

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.edgecolor": "none",
    "legend.facecolor": "white",
    "legend.framealpha": 0.85,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Curve:
    """A line of the loss picture. x is training tokens."""

    label: str
    tokens: tuple[float, ...]
    values: tuple[float, ...]
    emphasis: str = ""
    """`promoted`, `base`, `head`, or empty for the crowd."""
    marked: bool = False


@dataclass(frozen=True)
class TradeOff:
    """A trial or control by its forgetting (nats per token) and its metric; both finite."""

    kind: str
    """A key of KIND_LOOK."""
    forgetting: float
    metric: float
    on_front: bool = False
    promoted: bool = False


@dataclass(frozen=True)
class PlannedBar:
    """Planned memory of one choice, term by term, and what was measured of it. Bytes per rank."""

    label: str
    terms: tuple[tuple[str, float], ...]
    measured: float | None


def draw(name: str, size: tuple[float, float], paint: Callable[[Figure], None], description: str) -> str:
    """An `<svg>` of `size` inches; `name` keeps its ids apart from those of the page's other pictures."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    referred = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred else "", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


def finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def heatmap(panels: Sequence[RateMatrix], metric: str, higher_is_better: bool) -> str:
    """Best metric by layers and learning rate, lora and full apart."""
    shown = finite([value for panel in panels for row in panel.values for value in row])
    best, worst = (max(shown), min(shown)) if higher_is_better else (min(shown), max(shown))
    middle = sorted(shown)[len(shown) // 2]
    # A diverged trial must not turn all the others into one colour.
    worst = best + min(abs(worst - best), 3 * abs(middle - best) or abs(worst - best)) * (-1 if higher_is_better else 1)
    low, high = sorted((best, worst if worst != best else best + 1e-9))
    colours, norm = mpl.colormaps["cividis" if higher_is_better else "cividis_r"], Normalize(low, high, clip=True)

    def paint(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[max(len(p.columns), 2) for p in panels])[0]
        for axis, panel in zip(axes, panels, strict=True):
            axis.grid(False)
            axis.set_facecolor("#f2f2f2")
            axis.set_xlim(-0.5, len(panel.columns) - 0.5)
            axis.set_ylim(len(panel.rows) - 0.5, -0.5)
            axis.set_xticks(range(len(panel.columns)), panel.columns, rotation=35, ha="right")
            axis.set_yticks(range(len(panel.rows)), panel.rows)
            axis.set_title(panel.title, loc="left", fontweight="bold")
            axis.set_xlabel("learning rate")
            for y, row in enumerate(panel.values):
                for x, value in enumerate(row):
                    if value is not None:
                        _cell(axis, x, y, value, colours(norm(value)) if math.isfinite(value) else (0.9, 0.9, 0.9, 1.0))
        scale = ScalarMappable(norm, colours)
        bar = figure.colorbar(
            scale, ax=list(axes), label=f"{metric} ({'higher' if higher_is_better else 'lower'} is better)", pad=0.02
        )
        if bar.solids is not None:
            bar.solids.set(rasterized=False, edgecolor="face")

    rows = max(len(panel.rows) for panel in panels)
    return draw("heatmap", (9.2, 1.7 + 0.42 * rows), paint, f"{metric} by layers and learning rate")


def _cell(axis: Axes, x: int, y: int, value: float, colour: tuple[float, float, float, float]) -> None:
    """A filled square with its figure, in whichever ink can be read on it (luma of ITU-R BT.601)."""
    red, green, blue, _ = colour
    ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else INK
    axis.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, linewidth=0))
    axis.text(x, y, f"{value:.3g}" if math.isfinite(value) else "failed", ha="center", va="center", color=ink, fontsize=9)


def curves(panels: Sequence[tuple[str, str, Sequence[Curve]]]) -> str:
    """Panels (title, y label, curves) side by side over training tokens. A diverged trial leaves the frame."""

    def paint(figure: Figure) -> None:
        for axis, (title, label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axis.set_title(title, loc="left", fontweight="bold")
            axis.set_xlabel("training tokens")
            axis.set_ylabel(label)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
            for line in sorted(lines, key=lambda line: bool(line.emphasis)):
                _curve(axis, line)
            _frame(axis, [v for line in lines for v in line.values], [v for line in lines if line.emphasis for v in line.values])
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
    """Keep the y axis on the bulk of the values, and on all that must be seen."""
    ordered = sorted(finite(values))
    if not ordered:
        return
    low = min(ordered[0], *kept) if kept else ordered[0]
    high = max([ordered[min(len(ordered) - 1, int(0.97 * len(ordered)))], *kept])
    if high > low:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))


def front(points: Sequence[TradeOff], bound: float, metric: str, higher_is_better: bool) -> str:
    """Target against forgetting, with the Pareto front, the bound (where there is one) and the promoted trial."""

    def paint(figure: Figure) -> None:
        axis = figure.subplots()
        if math.isfinite(bound):
            axis.axvspan(bound, bound + 1e6, color="#000000", alpha=0.05, linewidth=0)
            axis.axvline(bound, color=INK, linestyle="--", linewidth=1.2, label=f"bound {bound:g}")
        for kind, look in KIND_LOOK.items():
            _scatter(
                axis, [point for point in points if point.kind == kind], label=kind, edgecolor="white", linewidth=0.6, **look
            )
        on_front = sorted((point for point in points if point.on_front), key=lambda point: point.forgetting)
        if len(on_front) > 1:
            x, y = [point.forgetting for point in on_front], [point.metric for point in on_front]
            axis.plot(x, y, color=GREEN, linewidth=1.4, drawstyle="steps-post", label="Pareto front", zorder=1)
        promoted = [point for point in points if point.promoted]
        _scatter(axis, promoted, label="promoted", s=190, facecolor="none", edgecolor=RED, linewidth=2)
        forgettings = sorted(point.forgetting for point in points)
        bulk = forgettings[: max(1, math.ceil(0.95 * len(forgettings)))]
        low, high = min(0.0, forgettings[0]), max([bulk[-1], *finite([bound])])
        pad = 0.06 * ((high - low) or 1.0)
        axis.set_xlim(low - pad, high + pad)
        _frame(axis, [point.metric for point in points], [point.metric for point in points if point.kind not in ("lora", "full")])
        axis.set_xlabel("forgetting: rise of retention loss, nats per token (left is better)")
        axis.set_ylabel(f"{metric} ({'up' if higher_is_better else 'down'} is better)")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return draw("front", (9.2, 4.0), paint, f"{metric} against forgetting")


def _scatter(axis: Axes, points: Sequence[TradeOff], **look: Any) -> None:
    if points:
        axis.scatter([point.forgetting for point in points], [point.metric for point in points], **look)


def gains(comparisons: Sequence[ComparisonRecord]) -> str:
    """Gain over each control with its 95% interval; right of zero is better."""

    def paint(figure: Figure) -> None:
        axis = figure.subplots()
        axis.axvline(0.0, color=INK, linewidth=1.2)
        for y, comparison in enumerate(comparisons):
            below, above = comparison.mean - comparison.low, comparison.high - comparison.mean
            colour = GREEN if comparison.low > 0 else RED if comparison.high < 0 else GREY
            span = [[max(below, 0.0)], [max(above, 0.0)]]
            axis.errorbar([comparison.mean], [y], xerr=span, fmt="o", color=colour, capsize=5, linewidth=2, markersize=7)
        axis.set_yticks(range(len(comparisons)), [f"over {CONTROL_NAMES[c.against]}" for c in comparisons])
        axis.set_ylim(len(comparisons) - 0.5, -0.5)
        axis.set_xlabel(f"gain in {comparisons[0].unit}; right of zero is better")

    return draw("gains", (9.2, 1.1 + 0.45 * len(comparisons)), paint, "gain over the controls with intervals")


def memory(bars: Sequence[PlannedBar], scale: float, unit: str) -> str:
    """Planned memory per rank, stacked by term, with a diamond where it was measured."""
    names = list(dict.fromkeys(name for bar in bars for name, _ in bar.terms))

    def paint(figure: Figure) -> None:
        axis = figure.subplots()
        left = [0.0] * len(bars)
        for index, name in enumerate(names):
            widths = [dict(bar.terms).get(name, 0.0) / scale for bar in bars]
            turn, colour = divmod(index, len(TERM_COLOURS))
            look: dict[str, Any] = {"color": TERM_COLOURS[colour], "hatch": TERM_HATCHES[turn % len(TERM_HATCHES)]}
            axis.barh(range(len(bars)), widths, left=left, label=name, height=0.62, edgecolor="white", linewidth=0, **look)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        measured = [(bar.measured / scale, y) for y, bar in enumerate(bars) if bar.measured]
        if measured:
            x, y = zip(*measured, strict=True)
            axis.scatter(x, y, marker="D", s=44, color=INK, edgecolor="white", zorder=3, label="measured peak")
        axis.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axis.set_ylim(len(bars) - 0.5, -0.5)
        axis.set_xlabel(f"{unit} per rank")
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))

    return draw("memory", (9.2, max(2.2, 1.0 + 0.36 * len(bars))), paint, "planned and measured memory per rank")
