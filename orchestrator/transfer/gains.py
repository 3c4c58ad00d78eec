"""Which gains matter."""

from __future__ import annotations

SMALLEST_GAIN = 0.01
"""A gain that matters: a hundredth of a nat per token, one point of an accuracy. Where an interval holds no gain too, it
parts `no gain` (a gain that matters is excluded) from `inconclusive` (it is not)."""
