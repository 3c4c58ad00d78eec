"""Pictures that can be read: in the page's own colours, in text of 12 px, small gains beside large ones, equal budgets."""

from __future__ import annotations

import math
import re

import matplotlib as mpl
import pytest

from orchestrator.report import figures
from orchestrator.report.figures import BY_PAGE, SMALLEST_TEXT, Curve, TradeOff
from orchestrator.report.gain_chart import gains
from orchestrator.report.heatmap import heatmap, ink_on
from orchestrator.report.matrix import rate_matrices
from orchestrator.report.page import write_report
from orchestrator.transfer.records import ComparisonRecord


def compared(against, mean, half):
    return ComparisonRecord(against=against, mean=mean, low=mean - half, high=mean + half, method="bootstrap", num_examples=180)


@pytest.fixture
def pictures(make):
    trials = make.sweep(24).searched
    points = [TradeOff("lora", 0.1, 2.0), TradeOff("head only", 0.0, 3.0), TradeOff("full", 0.3, 0.2, early=True)]
    lines = [Curve("a", (1.0, 2.0), (9.0, 0.3), "promoted", marked=True), Curve("b", (1.0, 2.0), (9.0, 0.2))]
    return {
        "heatmap": heatmap(rate_matrices(trials, False), "loss", False),
        "gains": gains([compared("none", 8.7, 0.05), compared("shuffled", 0.04, 0.06)]),
        "front": figures.front(points, 0.2, "loss", False),
        "curves": figures.curves([("loss", "loss", lines)]),
    }


def test_ink_and_lines_are_the_pages_and_text_is_never_under_12_px(pictures):
    """9 points are 12 px: style.css never shows a picture smaller than drawn."""
    for name, svg in pictures.items():
        assert "var(--ink, #222222)" in svg, name
        for colour in BY_PAGE:
            assert not re.search(rf": {colour}[;\"]", svg), f"{name} has a colour that the page cannot change: {colour}"
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:[\w ]*? )?([\d.]+)px", svg)]
        assert sizes, name
        assert min(sizes) >= SMALLEST_TEXT, name
        assert 'role="img"' in svg
        assert re.search(r'aria-label="[^"]{10,}"', svg), name


def test_small_gains_get_a_scale_of_their_own(pictures):
    assert "the small ones, 88 times larger" in pictures["gains"]
    assert "+0.040 (-0.020 to +0.100)" in pictures["gains"]
    alike = gains([compared("none", 2.0, 0.05), compared("head", 1.2, 0.06)])
    assert "the small ones" not in alike


def test_each_budget_has_its_own_panels_and_scale(pictures):
    for step in (6, 18, 54):
        assert f"LoRA, step {step}" in pictures["heatmap"]
        assert f"loss after {step} steps" in pictures["heatmap"]


def test_trials_of_an_earlier_rung_are_marked_and_the_head_control_is_drawn(pictures):
    assert "full fine-tuning, evaluated early" in pictures["front"]
    assert "head only" in pictures["front"]


def test_losses_over_a_wide_range_are_drawn_logarithmically(pictures):
    ticks = re.findall(r">(0\.2|0\.5|1|2|5)<", pictures["curves"])
    assert {"0.5", "1", "2", "5"} <= set(ticks)


def test_every_cell_can_be_read_on_its_colour():
    def luminance(colour):
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    for place in range(101):
        cell = mpl.colormaps["cividis"](place / 100)
        ink = luminance([int(ink_on(cell)[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        high, low = sorted((ink, luminance(cell)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, place


def test_the_page_has_dark_colours_for_every_variable_it_uses(fake_run):
    written = write_report(fake_run()).read_text()
    style = written[written.index("<style>") : written.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    defined = [set(re.findall(r"(--[\w-]+):", part)) for part in (light, dark.split("} }")[0])]
    used = set(re.findall(r"var\((--[\w-]+)", written))
    assert used <= defined[0]
    assert used <= defined[1]


def test_the_page_is_as_wide_as_the_screen_and_boxes_scroll(fake_run):
    written = write_report(fake_run()).read_text()
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in written
    assert re.search(r'<figure><div class="scroll" tabindex="0"><svg', written)
    assert not re.search(r"<table(?![^>]*)(?<!<div class=\"scroll\" tabindex=\"0\"><table)", written)
    assert math.isclose(9.2 * 72, float(re.search(r'<svg [^>]*width="([\d.]+)pt"', written)[1]), abs_tol=0.1)
