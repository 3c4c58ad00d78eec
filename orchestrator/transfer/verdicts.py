"""The verdict: what follows from the paired comparisons on the test set."""

from __future__ import annotations

import math
from collections.abc import Mapping

from orchestrator.transfer.comparison import Comparison
from orchestrator.transfer.records import Control, VerdictKind
from orchestrator.transfer.scoring import SMALLEST_GAIN
from orchestrator.transfer.seeds import OverSeeds
from orchestrator.values import Value

MAX_DIGITS = 5
_WORST_FIRST: tuple[VerdictKind, ...] = ("negative", "no gain", "inconclusive", "positive")
_NAMES: dict[Control, str] = {
    "none": "the base",
    "head": "head",
    "scratch": "training from scratch",
    "shuffled": "shuffled answers",
    "k_shot": "the base with examples in its prompt",
}


class Verdict(Value):
    """Kind of the verdict, and a sentence with its figures."""

    kind: VerdictKind
    finding: str
    """The figures that led to it."""

    @property
    def sentence(self) -> str:
        """The kind and the finding: `positive: 2.09 ± 0.05 nats better than the base, on 180 test examples`."""
        return f"{self.kind}: {self.finding}"


def verdict(
    vs_none: Comparison,
    vs_scratch: Comparison | None = None,
    *,
    others: Mapping[Control, Comparison] | None = None,
    over_seeds: OverSeeds | None = None,
    failed_seeds: int = 0,
) -> Verdict:
    """Return the verdict on the promoted model.

    `negative` when it is worse than the base or than training from scratch; `positive` when it is better than both
    (than the one that ran); else `no gain` when no gain that matters is possible against one of them, and
    `inconclusive` when the data cannot tell: by the examples, or because trainings from other seeds failed or came out so
    unlike that their mean gain over the base may be none.

    Args:
        vs_none: Comparison with the base model, on the test set.
        vs_scratch: Against random weights trained on the same budget.
        others: Comparisons that the sentence reports and the verdict does not depend on (`head`, `shuffled`).
        over_seeds: Gain over the base on the test set, by seed.
        failed_seeds: From how many other seeds the same training failed.
    """
    judged = [vs_none] if vs_scratch is None else [vs_none, vs_scratch]
    kinds: list[VerdictKind] = [_kind(comparison) for comparison in judged]
    kind: VerdictKind = min(kinds, key=_WORST_FIRST.index)
    told: dict[Control, Comparison] = {"none": vs_none}
    if vs_scratch is not None:
        told["scratch"] = vs_scratch
    sentence = _sentence({**told, **(others or {})})
    if over_seeds is not None:
        sentence += f"; {_seeds_sentence(over_seeds)}"
    if failed_seeds:
        sentence += f"; from {failed_seeds} other seed{'s' if failed_seeds > 1 else ''} training failed"
    if kind == "positive" and (failed_seeds or (over_seeds is not None and over_seeds.low <= 0)):
        kind = "inconclusive"
        sentence += ": inconclusive, since another seed could give a different result"
    return Verdict(kind=kind, finding=sentence)


def _kind(comparison: Comparison) -> VerdictKind:
    """Return the verdict that follows from a single comparison."""
    if comparison.low > 0:
        return "positive"
    if comparison.high < 0:
        return "negative"
    return "no gain" if comparison.high < SMALLEST_GAIN else "inconclusive"


def _sentence(comparisons: Mapping[Control, Comparison]) -> str:
    """Return `2.09 ± 0.05 nats better than the base, 1.27 ± 0.04 better than head, on 180 test examples`."""
    base = comparisons["none"]
    task = _task(base, comparisons["shuffled"]) if "shuffled" in comparisons else ""
    parts: list[str] = []
    for against, comparison in comparisons.items():
        if against == "shuffled" and task:
            continue
        unit = "" if parts else f" {_unit(comparison.unit)[1]}"
        parts.append(f"{_figure(comparison)}{unit} {_side(comparison)} than {_NAMES[against]}")
    few = ": too few for an interval" if any(not math.isfinite(_margin(c)) for c in comparisons.values()) else ""
    plural = "s" if base.num_examples != 1 else ""
    return f"{', '.join(parts)}, on {base.num_examples} test example{plural}{few}{task}"


def _task(gain: Comparison, over_shuffled: Comparison) -> str:
    """Return the part of a gain over the base that the task explains; shuffled answers explain the rest. Empty without a gain."""
    if gain.low <= 0 or not math.isfinite(_margin(over_shuffled)):
        return ""
    scale, unit, _ = _unit(gain.unit)
    told, figure = f"the gain of {gain.mean * scale:.{_digits(gain)}f} {unit}", _figure(over_shuffled)
    if over_shuffled.high < 0:
        return f"; of {told}, nothing comes from the task: shuffled answers gain {figure} more"
    if over_shuffled.low <= 0:
        return f"; of {told}, no measurable part comes from the task: shuffled answers gain as much (difference {figure})"
    if over_shuffled.mean < gain.mean:
        return f"; of {told}, {figure} comes from the task; shuffled answers gain the rest"
    return f"; all of {told} comes from the task: shuffled answers gain none of it, and are {figure} behind"


def _side(found: Comparison | OverSeeds) -> str:
    return "better" if found.mean > 0 else "worse" if found.mean < 0 else "better or worse"


def _figure(found: Comparison | OverSeeds) -> str:
    """Return `2.09 ± 0.05`: without the sign, and without the margin if there is none."""
    scale, digits = _unit(found.unit)[0], _digits(found)
    mean, margin = abs(found.mean) * scale, _margin(found) * scale
    return f"{mean:.{digits}f} ± {margin:.{digits}f}" if math.isfinite(margin) else f"{mean:.{digits}f}"


def _digits(found: Comparison | OverSeeds) -> int:
    """Return the decimals that show the margin: at least the unit's, at most MAX_DIGITS."""
    scale, _, digits = _unit(found.unit)
    margin = _margin(found) * scale
    if margin <= 0 or not math.isfinite(margin):
        return digits
    return max(digits, min(MAX_DIGITS, math.ceil(-math.log10(margin))))


def _margin(found: Comparison | OverSeeds) -> float:
    """Return the longer side of the interval."""
    return max(found.high - found.mean, found.mean - found.low)


def _seeds_sentence(found: OverSeeds) -> str:
    """Return `over 3 seeds, on the same examples, 0.41 ± 0.20 nats better than the base (each alone: +0.32, +0.43, +0.48)`."""
    (scale, unit, _), digits = _unit(found.unit), _digits(found)
    gain = f"{_figure(found)} {unit} {_side(found)}"
    each = ", ".join(f"{value * scale:+.{digits}f}" for value in found.values)
    return f"over {len(found.values)} seeds, on the same examples, {gain} than the base (each alone: {each})"


def _unit(unit: str) -> tuple[float, str, int]:
    """Return factor, word and digits: losses in nats, shares in percentage points."""
    return (1.0, "nats", 2) if unit.startswith("nats") else (100.0, f"points of {unit}", 1)
