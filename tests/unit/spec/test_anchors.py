"""The table of anchors is complete, and nothing outside it asks for an anchor's name."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args

import pytest

from orchestrator.spec.anchors import ANCHORS, AnchorKind
from orchestrator.spec.models import AnchorSpec, Tune
from orchestrator.train.anchors import ANCHOR_CLASSES

PACKAGE = Path(__file__).resolve().parents[3] / "orchestrator"


def test_every_anchor_has_a_row_and_a_class() -> None:
    assert set(ANCHORS) == set(get_args(AnchorKind))
    assert set(ANCHOR_CLASSES) == set(ANCHORS)


def test_every_tuning_method_has_an_anchor() -> None:
    assert {traits.tune for traits in ANCHORS.values()} == set(get_args(Tune))


@pytest.mark.parametrize("kind", ANCHORS)
def test_a_row_says_why_it_does_not_fit(kind: AnchorKind) -> None:
    traits = AnchorSpec(kind=kind, strength=1.0).traits
    assert traits is ANCHORS[kind]
    assert "search.tune" in traits.misfit.format(where="search.tune")
    assert f"tune: {traits.tune}" in traits.instead


def test_advice_recommends_one_anchor_for_each_tuning_method() -> None:
    recommended = [traits.tune for traits in ANCHORS.values() if traits.recommended_strength is not None]
    assert sorted(recommended) == sorted(get_args(Tune))


def comparisons_with_an_anchor(path: Path) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare)
        and any(isinstance(part, ast.Constant) and part.value in ANCHORS for part in (node.left, *node.comparators))
    ]


def test_no_file_compares_with_an_anchors_name() -> None:
    found = {
        str(path.relative_to(PACKAGE)): lines for path in PACKAGE.rglob("*.py") if (lines := comparisons_with_an_anchor(path))
    }
    assert not found, "ask for a trait (spec/anchors.py), which says why"


def test_the_rule_finds_a_comparison(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text('x = anchor.kind == "ewc"\n')
    assert comparisons_with_an_anchor(file) == [1]
